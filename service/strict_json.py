"""JSON objects from outside, parsed by one set of rules. The service can store, sign and send on
every accepted object, and every line reader can read what it writes.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

JSON = dict[str, Any]
Made = TypeVar("Made")

COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
LARGE = 64 << 10  # bytes, which take up to 10 ms to parse
MAX_DEPTH = 100  # levels, far below the limits of encoders and databases
FORBIDDEN_TEXT = re.compile("[\0\ud800-\udfff]")
# JSON escapes the other characters at which some readers end a line. It permits these.
LINE_ENDS = {"\x85": r"\u0085", "\u2028": r"\u2028", "\u2029": r"\u2029"}


async def off_loop(large: bool, work: Callable[[], Made]) -> Made:
    """Does the work on a document, in a thread if it is `large`: callbacks do not wait for it."""
    if not large:
        return work()
    import asyncio  # client commands have no loop

    return await asyncio.to_thread(work)


def read_object(body: bytes | bytearray, *, finite: bool = False) -> JSON:
    """The object in UTF-8. Raises ValueError with a reason for the sender.

    The rules exclude a duplicate field, NaN, more than 100 levels, and text that `check_text`
    rejects. `finite` also excludes numbers such as 1e400, which no JSON can represent again.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_not_json,
            parse_float=_finite if finite else float,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - callers catch one type of error
    _check(value)
    return value


def compact_json(document: object) -> str:
    """The document on one line for every reader: Python's `splitlines`, on which httpx and requests
    build their line readers, and Node's readline end lines at NEL, LS and PS too.
    """
    text = COMPACT(document)
    for char, escape in LINE_ENDS.items():
        text = text.replace(char, escape)
    return text


def check_text(text: str) -> None:
    """Raises ValueError for NUL or a lone surrogate, which databases and upstreams reject."""
    if FORBIDDEN_TEXT.search(text):
        raise ValueError("text must not hold NUL or a lone surrogate")


def storable(text: str) -> str:
    """The text with U+FFFD for each character that `check_text` rejects."""
    return FORBIDDEN_TEXT.sub("\ufffd", text)


def _unique(pairs: list[tuple[str, Any]]) -> JSON:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object names a field twice")
    return fields


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large")
    return number


def _check(document: JSON) -> None:
    """Walks level by level, so that depth uses no stack."""
    level: list[object] = [document]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                check_text(item)
            elif isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise ValueError(f"it is nested over {MAX_DEPTH} levels")
