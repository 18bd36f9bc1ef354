"""Values of the catalogue's fields: sizes as numbers, and values and ranges in words."""

import json
import re
from typing import Any

SIZE = re.compile("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
RATIO = re.compile("[1-9][0-9]*:[1-9][0-9]*")
SHOWN_CHARS = 40


def span(least: int | None, most: int | None) -> str:
    """A range in words. Without limits it is empty."""
    if least is not None and most is not None:
        return f"{least} to {most}"
    if most is not None:
        return f"at most {most}"
    return "" if least is None else f"at least {least}"


def shown(value: Any) -> str:
    """A value as JSON, cut to a few characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"


def is_texts(value: Any) -> bool:
    """Whether the value is a list of texts that are not empty."""
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def pixels_of(size: Any) -> tuple[int, int] | None:
    """Width and height of WIDTHxHEIGHT."""
    match = SIZE.fullmatch(size) if isinstance(size, str) else None
    return None if match is None else (int(match[1]), int(match[2]))
