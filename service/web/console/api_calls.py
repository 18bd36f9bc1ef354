"""Calls of the public API's own functions inside the process, as the signed-in caller."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from service.errors import ApiError
from service.web.auth import Caller
from service.web.context import context_of
from service.web.routes.guarded_route import ID, check_query
from service.web.routes.operation import Spec
from service.web.routes.table import SPECS

OPERATIONS: Mapping[str, Spec] = {f"{spec.method} {spec.path}": spec for spec in SPECS}
Query = Mapping[str, Any]


async def api_response(
    request: Request,
    caller: Caller,
    operation: str,
    query: Query | None = None,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    **path: str,
) -> Response:
    """The response of an operation such as `GET /v1/tasks/{task_id}`. A parameter that is None or
    empty is left out. Raises ApiError, also for a missing scope.
    """
    spec = OPERATIONS[operation]
    if caller.scopes.isdisjoint({"admin", *spec.scopes}):
        message = f"your key needs the scope {' or '.join(spec.scopes)}"
        raise ApiError(403, "permission_denied", message)
    if not all(ID.fullmatch(value) for value in path.values()):
        raise ApiError(404, "not_found", "nothing has that id")
    asked = {name: value for name, value in (query or {}).items() if value not in (None, "")}
    content = b"" if body is None else json.dumps(body).encode()
    given = {
        "host": request.headers.get("host", ""),
        "content-type": "application/json",
        "content-length": str(len(content)),
        **(headers or {}),
    }
    scope = {
        **request.scope,
        "method": spec.method,
        "path": spec.path.format(**path),
        "raw_path": quote(spec.path.format(**path)).encode(),
        "query_string": urlencode(asked, doseq=True).encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
        "path_params": path,
        "state": {**request.scope["state"], "caller": caller, "scopes": spec.scopes},
    }
    inner = Request(scope, before(content, request.receive))
    check_query(inner, spec)
    with context_of(request).shedder.bodies.request() as inner.state.body:
        return await spec.endpoint(inner)


async def api_document(request: Request, response: Response) -> Any:
    """The JSON of a response. Raises ApiError if it is an error, such as the upstream's."""
    pieces: list[bytes] = []

    async def send(message: Message) -> None:
        pieces.append(message.get("body", b""))

    await response(request.scope, request.receive, send)
    content = b"".join(pieces)
    if response.status_code < 400:
        return json.loads(content) if content else None
    error = json.loads(content)["error"]
    status, code, message = response.status_code, error["code"], error["message"]
    raise ApiError(status, code, message, param=error["param"], task_id=error["task_id"])


def before(content: bytes, rest: Receive) -> Receive:
    """Receives the content, then what the connection brings: the disconnect of the browser."""
    waiting: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        return waiting.pop() if waiting else await rest()

    return receive
