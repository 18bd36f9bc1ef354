"""What stands before each endpoint: load shedding, the key and its scopes, and limits."""

import re
from urllib.parse import unquote_to_bytes

from starlette.requests import Request
from starlette.responses import Response
from structlog.contextvars import bind_contextvars

from service.errors import ApiError, invalid_request
from service.fair_places import HOLDER
from service.web.bodies import check_coding
from service.web.context import context_of
from service.web.routes.operation import Handler, Spec

ID = re.compile("[!-~]{1,200}")
OPERATORS = ("/healthz", "/readyz", "/metrics")
ANY_KEY = ".KEY"  # ends a parameter that is a family, such as `metadata.KEY`
NAME_CHARS = 100  # of a parameter, in the answer


def check_query(request: Request, spec: Spec) -> None:
    """Raises ApiError 400 for a parameter that the route does not have. An ignored filter would
    give a wrong list. The same holds for text that is no UTF-8, such as a lone surrogate.
    """
    if not request.scope["query_string"]:
        return
    try:
        unquote_to_bytes(request.scope["query_string"]).decode()
    except UnicodeDecodeError:
        raise invalid_request("the query is not valid UTF-8") from None
    for name in request.query_params:
        family, dot, _ = name.partition(".")
        if name not in spec.query and not (dot and family + ANY_KEY in spec.query):
            known = f"it has {', '.join(spec.query)}" if spec.query else "it has none"
            message = f"{name[:NAME_CHARS]} is no query parameter of {spec.path}: {known}"
            raise invalid_request(message, name[:NAME_CHARS])


def guarded(spec: Spec) -> Handler:
    """The endpoint behind load shedding, its scopes and limits. An impossible id is 404 without a
    look-up.
    """

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
