"""Readers of an upstream's JSON. A value that is missing or malformed is None, and costs nothing
else of the document.
"""

import json
import re
from dataclasses import replace
from typing import Any

from service.content_coding import decoded
from service.errors import EgressError
from service.net import Response
from service.strict_json import FORBIDDEN_TEXT, JSON

# A backslash with what it escapes. A backslash alone escapes nothing.
ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}|())')


def document_of(body: bytes | bytearray) -> JSON | None:
    """The object in a response that was paid for, as far as it can be read. None: there is none.

    What JSON excludes counts as unknown: NaN, numbers without end, and a field that one object
    names twice with different values. Bytes that are no UTF-8 become U+FFFD. A byte order mark,
    control characters in text, and escapes that JSON does not have are read.
    """
    text = body.decode("utf-8-sig", "replace")
    try:
        try:
            value = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Invalid \\"):
                return None
            value = _DECODER.decode(ESCAPE.sub(_escaped, text))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _escaped(match: re.Match[str]) -> str:
    return match[0] if match[1] is None else "\\\\"


def _unambiguous(pairs: list[tuple[str, Any]]) -> JSON:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        for name, value in pairs:
            if name in fields and fields[name] != value:
                del fields[name]
    return fields


def _integer(text: str) -> int | None:
    return int(text) if len(text) <= 400 else None  # a longer one is no number of anything


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unambiguous, parse_constant=lambda _: None, parse_int=_integer, strict=False
)


def readable(answer: Response, limit: int) -> Response | EgressError:
    """The response, decoded. If its body broke, that counts only if the part that came is no JSON
    object: an object ends with its last bracket, whatever the response's framing says.
    """
    body = decoded(answer.body, answer.headers.get("content-encoding", ""), limit)
    if answer.failure is not None and document_of(body) is None:
        return answer.failure
    return replace(answer, body=body)


def section_of(document: JSON | None, name: str) -> JSON:
    """An object inside a document. An empty one stands for any other value."""
    value = document.get(name) if document else None
    return value if isinstance(value, dict) else {}


def text_of(value: object, limit: int = 200) -> str | None:
    """Text, cut to `limit` characters. Empty text is None. U+FFFD replaces characters that no
    store can keep.
    """
    if not isinstance(value, str) or not value:
        return None
    return FORBIDDEN_TEXT.sub("\ufffd", value[:limit])


def number_of(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
