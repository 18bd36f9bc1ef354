"""Readers of an upstream's JSON. A value that is missing or malformed is None, and costs nothing
else of the document.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from service.content_coding import decoded
from service.errors import EgressError
from service.links import MAX_LINK, is_data, stored_form, trimmed
from service.net.responses import Response
from service.strict_json import JSON, storable
from service.upstreams.base import Status

USUAL_BYTES = 1 << 20  # of a document without images, as much as is parsed
OTHER_BYTES = 8 << 20  # of a document beside its images
# A text of JSON with a `data:` URL, or with base64 in a field of this name.
INLINE = re.compile(
    rb'(?<=")(?:(?:\s|\\[nrt])*data:|(?<="b64_json":")|(?<="b64_json": ")|(?<="base64":")'
    rb'|(?<="base64": "))[^"]{32,}',
    re.IGNORECASE,
)
INLINE_URLS = 500  # more of them are no images
BACKSLASH = b"\\"
BLANK = "\ufeff \t\r\n"
# A text of JSON, a comma in front of a bracket, and a word, which may be no scalar of JSON.
UNTIDY = re.compile(
    r'"(?P<text>[^"\\]*+(?:\\.[^"\\]*+)*+)"?|,(?=\s*+[\]}])|(?P<word>[^\s\[\]{},:"]++)', re.DOTALL
)
SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*+)(?:\.\d++)?(?:[eE][-+]?\d++)?", re.ASCII)
# A backslash with what it escapes. A backslash alone escapes nothing.
ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}|())')
STATUSES = {status.value: status for status in Status} | {"canceled": Status.CANCELLED}
WRAPPERS, ENVELOPES = ("data", "task", "result"), 3  # fields with a task, and levels around it
TELLING = ("id", "task_id", "status", "error")  # a task has one of them
USUAL = (*TELLING, "progress", "results", "task_info", "usage")
LINKS = ("url", "image_url")
LINKED = (*LINKS, "urls", "image", "images", "results", "output")
# The fields from which reports are made.
FIELDS = frozenset(
    b"id task_id status progress error code message type param task_info can_cancel estimated_time"
    b" usage billing_rule user_group credits_reserved credits_used billing refunded_credits"
    b" results result_data result result_urls result_url output_url file_url"
    b" url image_url images image urls data task output uri link download_url"
    b" b64_json base64".split()
)
LEVELS = 32  # of lists and objects. Links and figures have fewer around them
LONG = 128 << 10  # bytes of a text. A link has fewer, with all of its characters escaped
TOKENS = 1 << 19  # texts and rows of brackets, which take 0.3 s
TOKEN = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"?(\s*+:)?+|[\[{]++|[\]}]++', re.DOTALL)


def document_of(body: bytes | bytearray, *, alone: bool = False) -> JSON | None:
    """The object in a response that was paid for, as far as it can be read. None: there is none.
    `alone` refuses a body with another object or list behind the first.

    What JSON excludes counts as unknown: NaN, numbers without end, and a field that one object
    names twice with different values. Bytes that are no UTF-8 become U+FFFD. A byte order mark,
    control characters in text, escapes that JSON does not have, and trailing commas are read. A
    word that JSON does not have, such as `undefined`, is null. Bytes behind the
    object are not. Of a large body the short forms of `data:` URLs are read. Of a body that is
    still large, or deep, only the needed fields are.
    """
    if len(body) > USUAL_BYTES:
        body = _without_images(body)
    if len(body) > USUAL_BYTES:
        body = needed_part(body)
    if len(body) > USUAL_BYTES:
        return None
    try:
        try:
            value, rest = _first_value(body)
        except RecursionError:
            value, rest = _first_value(needed_part(body))
    except (ValueError, RecursionError):
        return None
    if alone and rest.lstrip()[:1] in ("{", "["):
        return None
    return value if isinstance(value, dict) else None


def needed_part(body: bytes | bytearray) -> bytes:
    """The first object of the body without other fields than `FIELDS`, without lists and objects
    below `LEVELS`, and without long texts. A body that cannot be read so far comes back as it is.
    """
    kept: list[bytes | bytearray] = []
    depth, start = 0, 0
    left_out: int | None = None  # the level of a field or a value that is left out
    for token in islice(TOKEN.finditer(body), TOKENS):
        mark = token[0][:1]
        if mark == b'"':
            name = token[1] if token[2] and depth <= LEVELS else None
            needed = name is not None and (name in FIELDS or name.isdigit())
            if name is not None and not needed and left_out is None:
                kept.append(body[start : token.start()])
                left_out = depth
            elif needed and left_out == depth:
                start, left_out = token.start(), None
            elif left_out is None and len(token[0]) > LONG:
                kept.append(body[start : token.start()] + b'""')
                start = token.end()
        elif mark in b"[{":
            if left_out is None and depth + len(token[0]) > LEVELS:
                kept.append(body[start : token.start() + LEVELS - depth] + b"null")
                left_out = LEVELS + 1
            depth += len(token[0])
        else:
            if left_out is not None and depth >= left_out > depth - len(token[0]):
                within = left_out > LEVELS
                kept.append(b"" if within else b'"":0')
                start, left_out = token.start() + depth - left_out + within, None
            depth -= len(token[0])
            if depth <= 0:
                return b"".join([*kept, body[start : token.end() + depth]])
    return bytes(body)


def _first_value(body: bytes | bytearray) -> tuple[object, str]:
    """The first value and the text behind it."""
    text = body.decode("utf-8", "replace").lstrip(BLANK)
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError:
        if text[:1] != "{":
            raise
        text = UNTIDY.sub(_tidied, text)
        value, end = _DECODER.raw_decode(text)
    return value, text[end:]


def _tidied(match: re.Match[str]) -> str:
    """JSON for a text with escapes of no JSON, a trailing comma, or a word such as `undefined`."""
    token = match[0]
    if match["text"] is not None:
        return ESCAPE.sub(_escaped, token) if "\\" in token else token
    if match["word"] is not None:
        return token if SCALAR.fullmatch(token) else "null"
    return ""


def inline_url(match: re.Match[bytes]) -> str:
    """A match of `INLINE` as a `data:` URL, without its escapes. Empty: JSON has no such escape."""
    try:
        text = _DECODER.decode(f'"{match[0].rstrip(BACKSLASH).decode("utf-8", "replace")}"')
    except ValueError:
        return ""
    return base64_link(text)


def base64_link(text: str) -> str:
    """A link, or base64 as a `data:` URL."""
    return link_of(text) if is_data(trimmed(text)) else link_of(f"data:;base64,{trimmed(text)}")


def _without_images(body: bytes | bytearray) -> bytes:
    """The body with the short forms of `data:` URLs. Empty: it has too much beside them."""
    kept: list[bytes | bytearray] = []
    start = size = 0
    for match in islice(INLINE.finditer(body), INLINE_URLS):
        if (size := size + match.start() - start) > OTHER_BYTES:
            return b""
        kept += (body[start : match.start()], _shortened(match))
        start = match.end()
    return b"".join([*kept, body[start:]]) if size + len(body) - start <= OTHER_BYTES else b""


def _shortened(match: re.Match[bytes]) -> bytes:
    rest = match[0][len(match[0].rstrip(BACKSLASH)) :]
    return stored_form(inline_url(match)).encode() + rest


def link_of(text: str) -> str:
    """A result's link as browsers trim it. A link that is too long stays too long."""
    link = trimmed(text)
    return text_of(link, len(link) if is_data(link) else MAX_LINK + 1) or ""


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
    object: an object ends with its last bracket, and the response's framing does not matter.
    """
    body = decoded(answer.body, answer.headers.get("content-encoding", ""), limit)
    if answer.failure is not None and document_of(body) is None:
        return answer.failure
    return replace(answer, body=body)


def task_of(body: bytes | bytearray, *, alone: bool = False, id: str | None = None) -> JSON | None:
    """The task in a body, or the error. Some gateways wrap a task in an object that may have an id
    and a status of its own. The answer is the object that looks most like a task, or like the task
    with this `id`. Of equals the innermost counts.
    """
    document = document_of(body, alone=alone)
    if document is None:
        return None
    wrapped = [each for each in _wrapped(document, ENVELOPES) if any(map(each.get, TELLING))]
    return max((*wrapped[::-1], document), key=lambda each: _likeness(each, id))


def _wrapped(document: JSON, depth: int) -> Iterator[JSON]:
    """The objects in the fields of an envelope. One without a status may have it beside it."""
    for name in WRAPPERS if depth else ():
        inner = document.get(name)
        if isinstance(inner, list) and len(inner) == 1:
            inner = inner[0]
        if isinstance(inner, dict):
            named = inner.get("id") or inner.get("task_id")
            if named and "status" not in inner and not any(map(inner.get, LINKED)):
                inner = {**inner, "status": document.get("status")}
            yield inner
            yield from _wrapped(inner, depth - 1)


def _likeness(document: JSON, id: str | None) -> int:
    """How many fields of a task the object has. What has a link of its own is a result."""
    named = document.get("id") or document.get("task_id")
    ids = 0 if id is None or not named else 4 if named == id else -4
    status = 2 if status_of(document) is not None else 0
    fields = sum(map(bool, map(document.get, USUAL)))
    return ids + status + fields - 2 * any(map(document.get, LINKS))


def status_of(document: JSON) -> Status | None:
    """None: it is not one of the documented ones."""
    word = document.get("status")
    return STATUSES.get(word.strip().lower()) if isinstance(word, str) else None


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
    return storable(value[:limit])


def number_of(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
