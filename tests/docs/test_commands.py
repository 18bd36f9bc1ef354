"""Every command on a page exists, and a test runs it."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from service.__main__ import HELP
from service.cli import program
from tests.docs.pages import PAGES, commands, program_lines
from tests.docs.render import ROOT, first_help
from tests.docs.render import commands as program_commands
from tests.docs.run_elsewhere import NOT_RUN, RUN_BY_STORIES, RUN_BY_TYPED_CLIENTS, RUN_ELSEWHERE

KNOWN = dict(program_commands(get_command(program)))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_every_command_of_a_page_is_run_by_a_test() -> None:
    """Either by a story in tests/e2e/test_documented_commands.py, or as tests/docs/run_elsewhere.py
    says.
    """
    whole = {*RUN_BY_STORIES, *RUN_BY_TYPED_CLIENTS, *NOT_RUN}
    for page in PAGES:
        left = [command for command in commands(page) if command not in RUN_ELSEWHERE]
        assert not left or page.relative_to(ROOT).as_posix() in whole, left


def test_every_command_that_is_run_elsewhere_is_on_a_page() -> None:
    """The list has no row that no page needs, and the tests that it names exist."""
    assert set(RUN_ELSEWHERE) <= {command for page in PAGES for command in commands(page)}
    for where in RUN_ELSEWHERE.values():
        for test in re.findall(r"tests/[a-z_/]+\.py", where):
            assert (ROOT / test).exists(), where


def test_the_first_page_of_help_is_what_the_program_would_say() -> None:
    """`python -m tests.docs.render` writes it."""
    assert HELP.read_text("utf-8") == first_help()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_darkroom_command_exists_with_its_options(page: Path) -> None:
    """The words before the first argument are a command, and each option is one of its own."""
    for line in program_lines(page):
        words = line.split()
        names = [" ".join(words[:length]) for length in (3, 2)]
        name = next((name for name in names if name in KNOWN), None)
        if name is None:
            assert any(known.startswith(line) for known in KNOWN), line
            continue
        taken = {option for parameter in KNOWN[name].params for option in parameter.opts}
        asked = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert asked <= taken | {"--help", "--json"}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_and_module_of_a_page_exists(page: Path) -> None:
    """`make TARGET` is in the Makefile, and `python -m MODULE` can be imported."""
    text = page.read_text("utf-8")
    asked = re.findall(r"(?:^ *|`)make ([a-z]+)", text, re.MULTILINE)
    assert set(asked) <= TARGETS
    for module in re.findall(r"python -m ((?:tests|service)[\w.]*)", text):
        assert find_spec(module) is not None, module
