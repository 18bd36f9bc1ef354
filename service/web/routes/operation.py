"""One operation of the API, and the guard before its endpoint: load, key, scopes, limits."""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope
from structlog.contextvars import bind_contextvars

from service.errors import ApiError, invalid_request
from service.fair_slots import HOLDER
from service.web.bodies import check_coding
from service.web.context import context_of

Handler = Callable[[Request], Awaitable[Response]]
Model = type[BaseModel]

ID = re.compile("[!-~]{1,200}")
OPERATORS = ("/healthz", "/readyz", "/metrics")
ANY_KEY = ".KEY"  # ends a parameter that is a family, such as `metadata.KEY`
REPEATABLE = ("type",)  # parameters that are lists
NAME_CHARS = 100  # of a parameter, in the answer


@dataclass(frozen=True, slots=True)
class Spec:
    """A key needs one of the scopes. Without scopes, no key is needed. `query`: parameters."""

    method: str
    path: str
    endpoint: Handler
    scopes: tuple[str, ...]
    answer: Model | None
    body: Model | None
    query: tuple[str, ...]
    status: int

    @property
    def id(self) -> str:
        return self.endpoint.__module__.rsplit(".", 1)[-1] + "_" + self.endpoint.__name__

    @property
    def summary(self) -> str:
        """The endpoint's docstring, on one line."""
        return " ".join((self.endpoint.__doc__ or "").split()).removesuffix(".")


def row(
    operation: str,
    endpoint: Handler,
    scopes: str,
    answer: Model | None = None,
    body: Model | None = None,
    status: int | None = None,
) -> Spec:
    """A row of the table, in short notation: spaces separate scopes, and `?` and `&` parameters."""
    method, _, url = operation.partition(" ")
    path, _, query = url.partition("?")
    parameters = tuple(query.split("&")) if query else ()
    status = status or (204 if method == "DELETE" else 200)
    return Spec(method, path, endpoint, tuple(scopes.split()), answer, body, parameters, status)


def check_query(request: Request, spec: Spec) -> None:
    """Raises ApiError 400 for an unknown or repeated parameter, because an ignored filter would
    give a wrong list, and for text that is no UTF-8, such as a lone surrogate.
    """
    if not request.scope["query_string"]:
        return
    for name in request.query_params:
        family, dot, _ = name.partition(".")
        if name not in spec.query and not (dot and family + ANY_KEY in spec.query):
            hint = f"it has {', '.join(spec.query)}" if spec.query else "it has none"
            message = f"{name[:NAME_CHARS]} is no query parameter of {spec.path}: {hint}"
            raise invalid_request(message, name[:NAME_CHARS])
        if name not in REPEATABLE and len(request.query_params.getlist(name)) > 1:
            message = f"{name[:NAME_CHARS]} is given more than once"
            raise invalid_request(message, name[:NAME_CHARS])
    try:
        unquote_to_bytes(request.scope["query_string"]).decode()
    except UnicodeDecodeError:
        raise invalid_request("the query is not valid UTF-8") from None


def guarded(spec: Spec) -> Handler:
    """The endpoint behind its checks and limits. An impossible id is 404 without a look-up."""

    async def endpoint(request: Request) -> Response:
        shedder = context_of(request).shedder
        if spec.path in OPERATORS:
            await authorise(request)
            return await checked(request)
        with shedder.lookup():
            await authorise(request)
        with shedder.request(), shedder.bodies.request() as request.state.body:
            return await checked(request)

    async def authorise(request: Request) -> None:
        if not spec.scopes:
            return
        caller = await context_of(request).access.caller(request, *spec.scopes)
        request.state.caller, request.state.scopes = caller, spec.scopes
        bind_contextvars(owner=caller.owner)
        HOLDER.set(caller.owner)
        if spec.path not in OPERATORS:
            await context_of(request).limits.count(caller.key)

    async def checked(request: Request) -> Response:
        check_query(request, spec)
        check_coding(request)
        if not all(ID.fullmatch(value) for value in request.path_params.values()):
            raise ApiError(404, "not_found", "nothing has that id")
        return await spec.endpoint(request)

    return endpoint


class Path(Route):
    """Also takes its path with a slash at the end: clients repeat a redirected POST as a GET."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope.get("path", "")
        if path.endswith("/") and len(path) > 1:
            scope = {**scope, "path": path.removesuffix("/")}
        return super().matches(scope)


def path_routes(endpoints: Iterable[tuple[str, str, Handler]]) -> list[Route]:
    """One route per path of all methods, paths and endpoints: a 405 names every method."""
    paths: dict[str, dict[str, Handler]] = {}
    for method, path, endpoint in endpoints:
        paths.setdefault(path, {})[method] = endpoint
    return [Path(path, by_method(each), methods=list(each)) for path, each in paths.items()]


def by_method(endpoints: Mapping[str, Handler]) -> Handler:
    async def answer(request: Request) -> Response:
        return await endpoints["GET" if request.method == "HEAD" else request.method](request)

    return answer
