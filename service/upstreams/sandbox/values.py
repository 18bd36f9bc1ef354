"""The values that faults take: each in words, for people and for refusals, with what it accepts."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service.upstreams.sandbox.answers import Page


@dataclass(frozen=True, slots=True)
class Value:
    """What a value is in words, which values are such, and what is made of one."""

    words: str
    accepts: Callable[[Any], bool]
    made: Callable[[Any], Any] = lambda value: value


def whole(least: int, most: int) -> Value:
    return Value(
        f"an integer from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def one_of(*words: str, otherwise: Value | None = None) -> Value:
    """One of these words; or what `otherwise` accepts."""
    if otherwise is None:
        return Value(
            "one of " + ", ".join(words), lambda value: isinstance(value, str) and value in words
        )
    known = ", ".join([*words, f"or {otherwise.words}"])
    return Value(
        known, lambda value: (isinstance(value, str) and value in words) or otherwise.accepts(value)
    )


def matching(words: str, pattern: str) -> Value:
    return Value(
        words,
        lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None,
    )


def up_to(most: int, of: str) -> Value:
    return Value(
        f"{of} from 0 to {most}",
        lambda value: type(value) in (int, float) and 0 <= value <= most,
        float,
    )


FLAG = Value("true or false", lambda value: isinstance(value, bool))
SECONDS = up_to(86400, "seconds")
CREDITS = up_to(1_000_000, "credits")
BYTES = whole(0, 1 << 30)
WORD = matching("a word of a-z and _", r"[a-z_]{1,100}")
MEDIA_TYPE = matching("a media type", r"[a-z]+/[a-z0-9.+-]{1,100}(; ?[a-z0-9=-]{1,100})?")
URL = matching("a URL", r"[a-z][a-z0-9+.-]*:[!-~]{1,2000}")

PAGE_FIELDS: Mapping[str, Value] = {
    "status": whole(300, 599),
    "code": WORD,
    "html": FLAG,
    "retry_after": whole(0, 86400),
    "times": whole(0, 1000),
}


def fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {"status": value}


PAGE = Value(
    "a status from 300 to 599, or an object with status, code, html, retry_after, times",
    lambda value: (
        "status" in fields(value)
        and all(
            name in PAGE_FIELDS and PAGE_FIELDS[name].accepts(v)
            for name, v in fields(value).items()
        )
    ),
    lambda value: Page(**fields(value)),
)
