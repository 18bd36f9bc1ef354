"""Readers of an upstream's JSON. Each gives None for a value that is missing or malformed."""

from dataclasses import replace

from service.content_coding import decoded
from service.errors import EgressError
from service.net import Response
from service.strict_json import JSON, read_object


def document_of(body: bytes) -> JSON | None:
    """None: no JSON object that every store can keep."""
    try:
        return read_object(body)
    except ValueError:
        return None


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
    """Text, cut to `limit` characters. Empty text is None."""
    return value[:limit] if isinstance(value, str) and value else None


def number_of(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
