"""The result of a call: a whole response, or one with a body that is still to be read."""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

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
    truncated: bool
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
