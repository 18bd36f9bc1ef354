"""One operation of the API: method and path, endpoint, scopes and schemas."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]
Model = type[BaseModel]


@dataclass(frozen=True, slots=True)
class Spec:
    """One operation. A key needs one of the scopes. Without scopes, no key is needed. `query`:
    names of the parameters.
    """

    method: str
    path: str
    endpoint: Handler
    scopes: tuple[str, ...]
    answer: Model | None
    body: Model | None
    query: tuple[str, ...]
    status: int

    @property
    def summary(self) -> str:
        """The endpoint's docstring, on one line."""
        return " ".join((self.endpoint.__doc__ or "").split()).removesuffix(".")


def spec(
    operation: str,
    endpoint: Handler,
    scopes: str,
    answer: Model | None = None,
    body: Model | None = None,
    status: int | None = None,
) -> Spec:
    """A Spec in short notation: spaces separate scopes, and `?` and `&` parameters."""
    method, _, url = operation.partition(" ")
    path, _, query = url.partition("?")
    parameters = tuple(query.split("&")) if query else ()
    status = status or (204 if method == "DELETE" else 200)
    needs = tuple(scopes.split())
    return Spec(method, path, endpoint, needs, answer, body, parameters, status)
