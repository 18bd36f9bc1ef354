"""JSON objects from outside, by the rules of one parser for everybody who sends some: what is taken
can be stored, signed and sent on.
"""

import json
import math
import re
from typing import Any, NoReturn

JSON = dict[str, Any]


MAX_DEPTH = 100  # far from where an encoder or a database gives up
NO_TEXT = re.compile("[\0\ud800-\udfff]")


def read_object(body: bytes | bytearray, *, finite: bool = False) -> JSON:
    """The object in UTF-8. ValueError, with a reason fit for the sender: anything else, a field
    that is there twice, NaN, more than 100 levels, text that `check_text` refuses, and if all is to
    be `finite`, so that it can be written again, 1e400 and the like.
    """
    number = _finite if finite else float
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_number,
            parse_float=number,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        # one kind of error for whatever is wrong with it
        raise ValueError("it is no object")  # noqa: TRY004
    _check(value)
    return value


def check_text(text: str) -> None:
    """ValueError for NUL or a lone surrogate: no database and no upstream takes them."""
    if NO_TEXT.search(text):
        raise ValueError("text must not hold NUL or a lone surrogate")


def _unique(pairs: list[tuple[str, Any]]) -> JSON:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object names a field twice")
    return made


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large")
    return number


def _check(document: JSON) -> None:
    """Level by level, so that depth costs no stack."""
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
