"""The README's tables, made from the code: `python -m tests.docs.render` writes each between its
markers.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.main import get_command

from service.cli import program
from service.ops import lines
from service.ops.metrics import Metrics
from service.pipeline import checkpoints
from service.settings import settings_table
from service.web.routes import SPECS

README = Path(__file__).parents[2] / "README.md"


def routes_table() -> str:
    """Every operation, in the order of the table of routes."""
    rows = ["| request | scope | answer |", "|---|---|---|"]
    for spec in SPECS:
        query = f"?{'&'.join(f'{name}=' for name in spec.query)}" if spec.query else ""
        scopes = " or ".join(f"`{scope}`" for scope in spec.scopes) or "no key"
        rows.append(
            f"| `{spec.method} {spec.path}{query}` | {scopes} | {spec.status}: {spec.summary} |"
        )
    return "\n".join(rows)


def metrics_table() -> str:
    """Every metric as it is exposed: histograms by the name their series begin with."""
    rows = ["| metric | kind | meaning |", "|---|---|---|"]
    for family in Metrics().registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.append(f"| `{name}{labels_of(name)}` | {family.type} | {family.documentation} |")
    return "\n".join(rows)


def labels_of(name: str) -> str:
    """`{kind,outcome}`, or nothing: what a metric says it is labelled by, before it has any
    series.
    """
    for metric in vars(Metrics()).values():
        known = getattr(metric, "_name", None)
        if known is not None and name in (known, f"{known}_total") and metric._labelnames:
            return f"{{{','.join(metric._labelnames)}}}"
    return ""


def commands(command: Any, name: str = "darkroom") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its whole name."""
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from commands(inner, f"{name} {word}")
    else:
        yield name, command


def commands_table() -> str:
    """Every command with its arguments and options; `--help` is everybody's."""
    rows = ["| command | does |", "|---|---|"]
    for name, command in commands(get_command(program)):
        takes = [usage(parameter) for parameter in command.params if parameter.name != "help"]
        about = " ".join(command.help.split("\n\n")[0].split())
        rows.append(f"| `{' '.join([name, *takes])}` | {about} |")
    return "\n".join(rows)


def usage(parameter: Any) -> str:
    word = parameter.metavar or parameter.name.upper()
    if parameter.param_type_name == "option":
        word = parameter.opts[0] if parameter.is_flag else f"{parameter.opts[0]} {word}"
    word += "…" if parameter.multiple or parameter.nargs == -1 else ""
    return word if parameter.required else f"[{word}]"


def documented(fields: str) -> set[str]:
    """The names in a log line's row."""
    return set(re.findall(r"`([a-z_0-9]+)`", fields))


SECTIONS: Mapping[str, Callable[[], str]] = {
    "settings": settings_table,
    "commands": commands_table,
    "routes": routes_table,
    "log": lines.markdown,
    "metrics": metrics_table,
    "checkpoints": checkpoints.markdown,
}


def section(text: str, name: str) -> re.Match[str]:
    """What stands between a section's markers, as `body`; AssertionError unless they are there
    once.
    """
    found = list(
        re.finditer(
            rf"(?P<open><!-- {name} -->\n)(?P<body>.*?)(?P<close><!-- /{name} -->)", text, re.DOTALL
        )
    )
    assert len(found) == 1, (
        f"README.md has {len(found)} sections <!-- {name} --> … <!-- /{name} -->"
    )
    return found[0]


def rendered(text: str) -> str:
    """The README with every table as the code has it."""
    for name, table in SECTIONS.items():
        place = section(text, name)
        text = f"{text[: place.start('body')]}{table().strip()}\n{text[place.end('body') :]}"
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text("utf-8")), "utf-8")
