"""The result of a call: a whole response, or one with a body that is still to be read. Also the
`Retry-After` header.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

from service.errors import EgressError


@dataclass(frozen=True, slots=True)
class Response:
    """Header names are in lower case. The body is as sent (never decoded), cut at the caller's
    limit. `failure`: the body broke off or was late, so it has only what came before. `duration` is
    in seconds.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    duration: float
    failure: EgressError | None = None


@dataclass(frozen=True, slots=True)
class Streamed:
    """A response with an unread body. `url` is the last one after redirects. `chunks` may be
    iterated once.
    """

    status: int
    headers: Mapping[str, str]
    url: str
    chunks: Callable[[], AsyncGenerator[bytes, None]]


def retry_after(value: str | None, now: float, limit: float = 3600) -> float | None:
    """The seconds of a `Retry-After` header (RFC 9110, 10.2.3), from 0 to `limit`. None: it is
    absent, or neither a number of seconds nor an HTTP date.
    """
    text = (value or "").strip(" \t")
    if text.isascii() and text.isdigit():
        return min(float(text), limit)  # an endless row of digits becomes infinity, not an error
    if not 0 < len(text) <= 64:
        return None
    try:
        date = parsedate_to_datetime(text)
        # asctime's form names no zone: HTTP means GMT
        then = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(then - now, 0.0), limit)
