"""The size and the names of the modules of the service (CONTRIBUTING.md)."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

from tests.environment import ROOT

LINES, FUNCTION_LINES = 300, 50


@cache
def sources() -> dict[Path, ast.Module]:
    return {
        path.relative_to(ROOT): ast.parse(path.read_text())
        for path in sorted((ROOT / "service").rglob("*.py"))
        if "versions" not in path.parts  # migrations are written once
    }


def twice(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_files_and_functions_are_short() -> None:
    files = [path for path in sources() if len((ROOT / path).read_text().splitlines()) > LINES]
    functions = [
        f"{path}: {node.name}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]
    assert (files, functions) == ([], [])


def test_a_module_name_and_a_class_name_occur_once() -> None:
    modules = [path.stem for path in sources() if path.stem != "__init__"]
    classes = [
        node.name
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    assert (twice(modules), twice(classes)) == ([], [])


def test_evolink_is_named_only_by_its_adapter_its_settings_and_the_catalogue() -> None:
    known = {"evolink.py", "settings.py", "catalogue.py"}
    named = {
        path.name
        for path, tree in sources().items()
        if "sandbox" not in str(path)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "evolink"
    }
    assert named <= known


def test_the_page_about_the_architecture_names_every_folder() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    folders = {path.parent for path in sources()}
    assert all(f"`{folder}/`" in text for folder in folders)
