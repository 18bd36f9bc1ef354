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
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`[^`\n]*`")


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


def commands(page: Path) -> Iterator[str]:
    """Every shell command of the page's `sh` blocks, continuation lines joined."""
    for language, block in FENCE.findall(page.read_text("utf-8")):
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield line
