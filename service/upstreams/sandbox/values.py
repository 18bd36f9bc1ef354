"""The values that faults accept."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service.upstreams.sandbox.answers import ErrorPage


@dataclass(frozen=True, slots=True)
class Value:
    """A kind of value: its description, a check, and a conversion."""

    words: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value


def whole(least: int, most: int) -> Value:
    return Value(
        f"an integer from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def one_of(*words: str, otherwise: Value | None = None) -> Value:
    """One of these words, or a value that `otherwise` accepts."""

    def is_word(value: Any) -> bool:
        return isinstance(value, str) and value in words

    if otherwise is None:
        return Value("one of " + ", ".join(words), is_word)
    choices = ", ".join([*words, f"or {otherwise.words}"])
    return Value(choices, lambda value: is_word(value) or otherwise.accepts(value))


def matching(words: str, pattern: str) -> Value:
    regex = re.compile(pattern, re.ASCII)
    return Value(words, lambda value: isinstance(value, str) and bool(regex.fullmatch(value)))


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
WORD = matching("a word of a-z, 0-9 and _", r"[a-z0-9_]{1,100}")
MEDIA_TYPE = matching("a media type", r"[a-z]+/[a-z0-9.+-]{1,100}(; ?[a-z0-9=-]{1,100})?")
URL = matching("a URL", r"[a-z][a-z0-9+.-]*:[!-~]{1,2000}")

PAGE_FIELDS: Mapping[str, Value] = {
    "status": whole(300, 599),
    "code": WORD,
    "html": FLAG,
    "retry_after": whole(0, 86400),
    "times": whole(0, 1000),
}


def page_fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {"status": value}


def is_page(value: Any) -> bool:
    fields = page_fields(value)
    valid = all(name in PAGE_FIELDS and PAGE_FIELDS[name].accepts(fields[name]) for name in fields)
    return "status" in fields and valid


PAGE = Value(
    "a status from 300 to 599, or an object with status, code, html, retry_after, times",
    is_page,
    lambda value: ErrorPage(**page_fields(value)),
)
