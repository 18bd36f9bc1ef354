"""The pages of the documentation and what stands on them: links, anchors, shell commands."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.docs.render import DOCS, README, ROOT

PAGES = (
    README,
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "deploy").glob("*.md")),
    *sorted(ROOT.glob("[A-Z]*.md")),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`[^`\n]*`")
INDENTED = re.compile(
    r"^ {4}((?:make|darkroom|curl|docker|python3?|pip|uvx?|\.venv/\S+|\.ci/run)\b.*)$", re.MULTILINE
)


@cache
def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The fragments that a link into the page may have, as GitHub makes them from headings."""
    return frozenset(slug(heading) for heading in HEADING.findall(prose(page)))


def slug(heading: str) -> str:
    words = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", ""))
    return words.strip().replace(" ", "-")


def links(page: Path) -> Iterator[str]:
    """Every link target of the page that is no address of the web."""
    for target in LINK.findall(CODE.sub("", prose(page))):
        if not re.match(r"https?:|mailto:", target):
            yield target


def blocks(page: Path) -> Iterator[str]:
    """Every `sh` block of the page, and every indented line that begins with a program."""
    text = page.read_text("utf-8")
    yield from (block for language, block in FENCE.findall(text) if language == "sh")
    yield from INDENTED.findall(prose(page))


def commands(page: Path) -> Iterator[str]:
    """Every shell command of the page, with its continuation lines and here-documents."""
    for block in blocks(page):
        lines = iter(block.splitlines())
        for line in lines:
            command = re.sub(r"\s+# .*", "", line).strip()
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            if (here := re.search(r"<<'(\w+)'", command)) is not None:
                for inner in lines:
                    command += f"\n{inner}"
                    if inner == here[1]:
                        break
            if command:
                yield command


def program_lines(page: Path) -> Iterator[str]:
    """Every `darkroom …` that the page names, in a block or inside a sentence."""
    for command in commands(page):
        yield from re.findall(r"(?:^|\s)(darkroom [^&|;>]+)", command)
    for code in CODE.findall(prose(page)):
        if re.match(r"`darkroom [a-z]", code):
            yield code.strip("`")
