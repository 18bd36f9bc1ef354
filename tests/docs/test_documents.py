"""The documentation and the code agree: tables are made from the code, and every logged line is in
the table of log lines.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import service
from service.settings import Settings
from service.web.event_schemas import EVENT_TYPES
from service.web.routes.table import SPECS, routes
from tests.bench.program import written
from tests.docs.client_journeys import CLIENTS, Client
from tests.docs.log_lines import ALWAYS, LINES, WHERE_KNOWN
from tests.docs.pages import PAGES, anchors, links
from tests.docs.render import DOCS, README, SECTIONS, documented, rendered

ANY_LINE = {*ALWAYS, *WHERE_KNOWN}
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


README_LINES = 160


@pytest.mark.parametrize("name", SECTIONS)
def test_a_table_of_the_documentation_is_what_the_code_has(name: str) -> None:
    """Settings, commands, routes, log lines, metrics and checkpoints on their pages
    (`python -m tests.docs.render`).
    """
    page, table = SECTIONS[name]
    text = (DOCS / page).read_text("utf-8")
    assert written(text, table().strip(), name) == text


@pytest.mark.parametrize("page", sorted({page for page, _ in SECTIONS.values()}))
def test_rendering_changes_nothing_outside_of_the_markers(page: str) -> None:
    """The script rewrites the tables alone. A second run changes nothing."""
    names = [name for name, (home, _) in SECTIONS.items() if home == page]
    text = "".join(
        f"before {name}\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n" for name in names
    )
    once = rendered(text, page)
    assert rendered(once, page) == once
    assert re.sub(r"(?s)(<!-- \w+ -->\n).*?(<!-- /)", r"\1old\n\2", once) == text


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_each_client_of_the_table_has_its_tests(client: Client) -> None:
    """Each function that shows its journey is in the file that the table names."""
    for file, functions in client.tests.items():
        tree = ast.parse((DOCS.parent / "tests" / file).read_text("utf-8"))
        assert set(functions) <= {getattr(node, "name", None) for node in tree.body} != set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_a_page_names_exists(page: Path) -> None:
    """A `DARKROOM_` variable in the text of a page is one of the settings."""
    text = page.read_text("utf-8")
    named = set(re.findall(r"\bDARKROOM_(?!TEST_)[A-Z0-9_]*[A-Z0-9]\b", text))
    assert named <= {f"DARKROOM_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_resolves(page: Path) -> None:
    """The file exists, and a fragment is one of its headings."""
    for target in links(page):
        name, _, fragment = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        assert not fragment or fragment in anchors(other), target


def test_every_page_is_linked_from_the_index() -> None:
    """docs/index.md names each page of docs/."""
    index = DOCS / "index.md"
    linked = {(DOCS / target).resolve() for target in links(index)}
    assert set(DOCS.glob("*.md")) - linked == {index}


def test_every_event_type_is_explained() -> None:
    """docs/api.md names each type of event."""
    text = (DOCS / "api.md").read_text("utf-8")
    assert {f"`{name}`" for name in EVENT_TYPES} <= set(re.findall(r"`[^`\n]+`", text))


def test_the_readme_is_short() -> None:
    """The README introduces, and the pages of docs/ explain."""
    assert len(README.read_text("utf-8").splitlines()) <= README_LINES


def test_the_table_of_routes_is_all_that_is_answered() -> None:
    """What a web process answers is in the table, but for the upstream's callbacks."""
    answered = {(route.path, method) for route in routes() for method in route.methods or ()}
    listed = {(spec.path, spec.method) for spec in SPECS}
    callbacks = {("/callbacks/{upstream}/{task_id}/{token}", method) for method in ("POST", "PUT")}
    assert (
        answered
        == listed | {(path, "HEAD") for path, method in listed if method == "GET"} | callbacks
    )


# --- the log
# --------------------------------------------------------------------------------------------------


def logged() -> Iterator[tuple[str, str, set[str]]]:
    """Every line that the code writes: where, its name, its fields."""
    for path in sorted(Path(service.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                dictionaries = mappings(function)
                for call in ast.walk(function):
                    if isinstance(call, ast.Call) and is_log(call.func):
                        name = call.args[0]
                        assert isinstance(name, ast.Constant), (
                            f"{path.name}:{call.lineno}: a line's name is fixed"
                        )
                        yield (
                            f"{path.name}:{call.lineno}",
                            str(name.value),
                            fields(call, dictionaries),
                        )


def is_log(function: ast.expr) -> bool:
    """`log.info(…)`, or `level(…)` where the level is chosen first."""
    if isinstance(function, ast.Attribute):
        return (
            isinstance(function.value, ast.Name)
            and function.value.id == "log"
            and function.attr in LEVELS
        )
    return isinstance(function, ast.Name) and function.id == "level"


def mappings(function: ast.AST) -> dict[str, set[str]]:
    """The keys of the dictionaries that a function gives a name, for `**name`."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            for inner in ast.walk(node.value):
                if isinstance(inner, ast.Dict):
                    found[node.targets[0].id] |= {
                        str(key.value) for key in inner.keys if isinstance(key, ast.Constant)
                    }
    return found


def fields(call: ast.Call, dictionaries: dict[str, set[str]]) -> set[str]:
    names: set[str] = set()
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Attribute) and keyword.arg is None:
            assert keyword.value.attr == "ids"  # of a task's origin, which any line may have
        elif keyword.arg is None:
            assert isinstance(keyword.value, ast.Name)
            names |= dictionaries[keyword.value.id]
        else:
            names.add(keyword.arg)
    return names - {"exc_info"}


def test_every_line_that_is_logged_is_listed_with_its_fields() -> None:
    """A log line's name is in the list, and its fields are those of the list or of any line."""
    for place, name, given in logged():
        assert name in LINES, place
        assert given - ANY_LINE <= documented(LINES[name]), place


def test_every_line_that_is_listed_is_logged_with_its_fields() -> None:
    """The list names no line and no field that the code never writes; what workers bind is in their
    lines too.
    """
    written: defaultdict[str, set[str]] = defaultdict(set)
    for _, name, given in logged():
        written[name] |= given
    bound = {"image_id"}  # by the worker that runs the job
    assert written.keys() | {"library.message"} == LINES.keys()
    for name, given in written.items():
        assert documented(LINES[name]) - bound <= given, name
