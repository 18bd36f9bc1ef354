"""The tables of the documentation that are made from the code.

`python -m tests.docs.render` writes each table between its markers on its page.
"""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType
from typing import Any

from typer.main import get_command

from service.__main__ import HELP, HELP_WIDTH
from service.cli import program
from service.cli.money_commands import model_row
from service.ops.metrics import Metrics
from service.setting_types import log_value
from service.settings import Settings
from service.upstreams.catalogue import load_catalogue
from service.upstreams.catalogue_entry import catalogue_schema
from service.upstreams.sandbox import FAULTS
from service.web.routes.table import SPECS
from tests.bench.program import markdown, written
from tests.checkpoints import CHECKPOINTS, INPUT_CHECKPOINTS
from tests.docs.bounds import bounds_table
from tests.docs.client_journeys import clients_table
from tests.docs.log_lines import ALWAYS, LINES, WHERE_KNOWN
from tests.docs.log_schema import log_schema

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def first_help() -> str:
    """The page of `darkroom --help`."""
    settings: Any = {"max_content_width": HELP_WIDTH, "terminal_width": HELP_WIDTH - 2}
    context = get_command(program).make_context("darkroom", [], resilient_parsing=True, **settings)
    return context.get_help() + "\n"


def routes_table() -> str:
    """Every operation, in the order of the table of routes."""
    rows = []
    for spec in SPECS:
        query = f"?{'&'.join(f'{name}=' for name in spec.query)}" if spec.query else ""
        scopes = " or ".join(f"`{scope}`" for scope in spec.scopes) or "no key"
        request = f"`{spec.method} {spec.path}{query}`"
        rows.append((request, scopes, f"{spec.status}: {spec.summary}"))
    return markdown(("request", "scope", "response"), rows)


def metrics_table() -> str:
    """Every metric under its exposed name. A histogram has the common prefix of its series."""
    rows = []
    for family in Metrics().registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.append((f"`{name}{labels_of(name)}`", family.type, family.documentation))
    return markdown(("metric", "kind", "meaning"), rows)


def labels_of(name: str) -> str:
    """The declared labels of a metric as `{kind,outcome}`, or an empty text."""
    for metric in vars(Metrics()).values():
        known = getattr(metric, "_name", None)
        if known is not None and name in (known, f"{known}_total") and metric._labelnames:
            return f"{{{','.join(metric._labelnames)}}}"
    return ""


def commands(command: Any, name: str = "darkroom") -> Iterator[tuple[str, Any]]:
    """Every command that can be run, with its whole name."""
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from commands(inner, f"{name} {word}")
    else:
        yield name, command


def commands_table() -> str:
    """Every command with its arguments and options, except `--help` and those that say where."""
    rows = []
    for name, command in commands(get_command(program)):
        common = ("help", "at_url", "at_local")
        takes = [usage(each) for each in command.params if each.name not in common]
        about = " ".join(command.help.split("\n\n")[0].split())
        rows.append((f"`{' '.join([name, *takes])}`", about))
    return markdown(("command", "does"), rows)


def usage(parameter: Any) -> str:
    word = parameter.metavar or parameter.name.upper()
    if parameter.param_type_name == "option":
        word = parameter.opts[0] if parameter.is_flag else f"{parameter.opts[0]} {word}"
    word += "…" if parameter.multiple or parameter.nargs == -1 else ""
    return word if parameter.required else f"[{word}]"


# Defaults of the table that are no plain values.
DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "data_dir": "`./data`",
        "secret_key": (
            "on SQLite a new key in `{data_dir}/secret.key`, mode 600; on PostgreSQL required"
        ),
        "evolink_api_key": "required by workers",
        "decode_concurrency": "the cores minus one, at least 1",
        "reconcile_after_s": "`max(60, 2 × estimated_time)`",
    }
)


def settings_table() -> str:
    """Every setting, in the order of the fields. The text below a field is its meaning."""
    rows = []
    body = ast.parse(dedent(inspect.getsource(Settings))).body[0].body  # type: ignore[attr-defined]
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            name = ast.unparse(field.target)
            value = log_value(Settings.model_fields[name].default)
            usual = "unset" if value is None else f"`{value}`".lower() if value != "" else "empty"
            meaning = " ".join(ast.literal_eval(text.value).split())
            rows.append((f"`DARKROOM_{name.upper()}`", DEFAULTS.get(name, usual), meaning))
    return markdown(("variable", "default", "meaning"), rows)


def log_lines_table() -> str:
    """Every log line with its own fields, below the fields that any line may have."""
    always, known = (", ".join(f"`{name}`" for name in names) for names in (ALWAYS, WHERE_KNOWN))
    rows = [(f"`{name}`", fields) for name, fields in LINES.items()]
    return markdown(("`event`", "fields"), [("any", f"{always}, and if known {known}"), *rows])


def log_schema_text() -> str:
    """One line for each log line, so that a change of one is a change of one."""
    schema = log_schema()
    lines = ",\n".join("    " + json.dumps(each) for each in schema.pop("oneOf"))
    head = "".join(f"  {json.dumps(name)}: {json.dumps(schema[name])},\n" for name in schema)
    return f'{{\n{head}  "oneOf": [\n{lines}\n  ]\n}}\n'


def checkpoints_table() -> str:
    """Every checkpoint, and what follows when the process dies there."""
    effects = {**CHECKPOINTS, **INPUT_CHECKPOINTS}
    rows = [(f"`{name}`", effect) for name, effect in effects.items()]
    return markdown(("killed here", "what happens"), rows)


def faults_table() -> str:
    """Every fault of the sandbox with the values that it takes."""
    rows = [(f"`{name}`", fault.takes.words, fault.about) for name, fault in FAULTS.items()]
    return markdown(("fault", "value", "effect"), rows)


def catalogue_table() -> str:
    """Every model of the catalogue with its most important limits and its price."""
    rows = []
    for name in load_catalogue().models:
        row = model_row(load_catalogue().document(name))
        rows.append([f"`{name}`", *(row[each] or "–" for each in list(row)[1:])])
    return markdown(("model", "edits", "`n`", "input images", "sizes", "price"), rows)


def decisions_table() -> str:
    """Every decision, by its number and title."""
    rows = []
    for path in sorted((DOCS / "decisions").glob("*.md")):
        first = path.read_text("utf-8").splitlines()[0]
        number, _, title = first.removeprefix("# ").partition(". ")
        rows.append((number, f"[{title}](decisions/{path.name})"))
    return markdown(("number", "decision"), rows)


def documented(fields: str) -> set[str]:
    """The names in a log line's row."""
    return set(re.findall(r"`([a-z_0-9]+)`", fields))


# Marker -> its page under docs/ and the function that makes the table.
SECTIONS: Mapping[str, tuple[str, Callable[[], str]]] = MappingProxyType(
    {
        "routes": ("api.md", routes_table),
        "settings": ("settings.md", settings_table),
        "commands": ("cli.md", commands_table),
        "log": ("observability.md", log_lines_table),
        "metrics": ("observability.md", metrics_table),
        "catalogue": ("catalogue.md", catalogue_table),
        "faults": ("sandbox.md", faults_table),
        "checkpoints": ("reliability.md", checkpoints_table),
        "decisions": ("decisions.md", decisions_table),
        "clients": ("clients.md", clients_table),
        "bounds": ("overload.md", bounds_table),
    }
)


def rendered(text: str, page: str) -> str:
    """The text of a page with every table of that page as the code has it."""
    for name, (home, table) in SECTIONS.items():
        if home == page:
            text = written(text, table().strip(), name)
    return text


if __name__ == "__main__":
    for page in sorted({home for home, _ in SECTIONS.values()}):
        path = DOCS / page
        path.write_text(rendered(path.read_text("utf-8"), page), "utf-8")
    schema = json.dumps(catalogue_schema(), indent=2) + "\n"
    (DOCS / "catalogue.schema.json").write_text(schema, "utf-8")
    (DOCS / "log.schema.json").write_text(log_schema_text(), "utf-8")
    HELP.write_text(first_help(), "utf-8")
