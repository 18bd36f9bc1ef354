"""A visit: a request for a page by a signed-in person, with calls of the public API."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Message, Receive

from service.errors import ApiError
from service.strict_json import JSON
from service.web.auth import Caller
from service.web.console.form_bodies import FormFields
from service.web.console.templating import environment
from service.web.context import Context, context_of
from service.web.routes.operation import ID, Spec, check_query
from service.web.routes.table import SPECS
from service.web.sessions import FLASH, FLASH_S, Session

Act = TypeVar("Act")
Query = Mapping[str, Any]

FRAGMENT = "x-fragment"  # a script asks for a part of the page
OPERATIONS: Mapping[str, Spec] = {f"{spec.method} {spec.path}": spec for spec in SPECS}


@dataclass(slots=True)
class Visit:
    """`form` is empty for a GET. The console's wrapper has checked its CSRF token."""

    request: Request
    session: Session
    caller: Caller
    nav: tuple[tuple[str, str, str], ...] = ()  # title, path, icon
    form: FormFields = field(default_factory=FormFields)

    @property
    def context(self) -> Context:
        return context_of(self.request)

    @property
    def query(self) -> dict[str, str]:
        return dict(self.request.query_params)

    @property
    def fragment(self) -> str | None:
        """The id of the part that a script wants. The page may leave the rest out."""
        return self.request.headers.get(FRAGMENT)

    def path(self, name: str) -> str:
        text: str = self.request.path_params[name]
        return text

    def act(self, acts: Mapping[str, Act]) -> tuple[str, Act]:
        """The act that the path names. Raises ApiError 404."""
        name = self.path("act")
        if name not in acts:
            raise ApiError(404, "not_found", "There is no such page.")
        return name, acts[name]

    async def answer(
        self,
        operation: str,
        query: Query | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        **path: str,
    ) -> Response:
        """The response of an operation such as `GET /v1/tasks/{task_id}`. Raises ApiError."""
        spec, outer = OPERATIONS[operation], self.request
        if not self.caller.has(spec.scopes):
            message = f"your key needs the scope {' or '.join(spec.scopes)}"
            raise ApiError(403, "permission_denied", message)
        if not all(ID.fullmatch(value) for value in path.values()):
            raise ApiError(404, "not_found", "nothing has that id")
        params = {name: value for name, value in (query or {}).items() if value not in (None, "")}
        content = b"" if body is None else json.dumps(body).encode()
        sent = {
            "host": outer.headers.get("host", ""),
            "content-type": "application/json",
            "content-length": str(len(content)),
            **(headers or {}),
        }
        scope = {
            **outer.scope,
            "method": spec.method,
            "path": spec.path.format(**path),
            "raw_path": quote(spec.path.format(**path)).encode(),
            "query_string": urlencode(params, doseq=True).encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
            "path_params": path,
            "state": {**outer.scope["state"], "caller": self.caller, "scopes": spec.scopes},
        }
        inner = Request(scope, before(content, outer.receive))
        check_query(inner, spec)
        with self.context.shedder.bodies.request() as inner.state.body:
            return await spec.endpoint(inner)

    async def call(self, operation: str, query: Query | None = None, **given: Any) -> JSON:
        """The document of an `answer`. Raises ApiError for an error, such as the upstream's."""
        response, pieces = await self.answer(operation, query, **given), list[bytes]()

        async def send(message: Message) -> None:
            pieces.append(message.get("body", b""))

        await response(self.request.scope, self.request.receive, send)
        document: JSON = json.loads(b"".join(pieces) or b"{}")
        if response.status_code < 400:
            return document
        error = document["error"]
        status, code, message = response.status_code, error["code"], error["message"]
        raise ApiError(status, code, message, param=error["param"], task_id=error["task_id"])

    async def list_of(self, operation: str, query: Query) -> tuple[JSON, ApiError | None]:
        """The document of a list, or an empty one with the error that refused the filter."""
        try:
            return await self.call(operation, query), None
        except ApiError as error:
            return {"data": [], "next_cursor": None}, error

    async def keep(self, form: FormFields, name: str | None, content: AsyncIterator[bytes]) -> str:
        """Stores an input image of a form, and returns its id. Raises ApiError."""
        keep, owner = self.context.files.keep, self.caller.owner
        rule = self.context.intake.catalogue.image_rule(form.get("model"))
        return (await keep(owner, lambda: name, content, rule, param="image_urls")).id

    def render(
        self, template: str, status: int | None = None, error: ApiError | None = None, **values: Any
    ) -> Response:
        """The page, by default with the status of its error. A fragment has no frame around it."""
        status = status or (error.status if error else 200)
        links, sessions = self.context.resources.links, self.context.access.sessions
        flash = sessions.flash(self.request) if sessions and not self.fragment else None
        shown = {
            "layout": "bare.html" if self.fragment else "layout.html",
            "visit": self,
            "csrf": self.session.csrf,
            "here": self.request.url.path,
            "query": self.query,
            "now": datetime.now(UTC),
            "flash": flash,
            "error": error,
            "image_src": lambda image: image_src(image, links.image_base_url),
        }
        html = environment().get_template(template).render({**shown, **values})
        response = Response(html, status, media_type="text/html")
        if flash and sessions:
            response.headers.append("set-cookie", sessions.cookie(FLASH, "", 0))
        return response

    def redirect(self, path: str, flash: str = "", kind: str = "good") -> Response:
        """Sends the browser to another page, which shows the message. `kind`: good or bad."""
        response = RedirectResponse(path, 303)
        sessions = self.context.access.sessions
        if flash and sessions:
            text = json.dumps({"flash": [kind, flash[:1000]]})
            response.headers.append("set-cookie", sessions.cookie(FLASH, text, FLASH_S))
        return response


def before(content: bytes, rest: Receive) -> Receive:
    """Receives the content, then what the connection brings: the disconnect of the browser."""
    waiting: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        return waiting.pop() if waiting else await rest()

    return receive


def image_src(image: Mapping[str, Any], image_base_url: str | None) -> str:
    """Where the browser finds a stored image: on this host, under any base URL."""
    url: str = image["url"]
    return url if image_base_url else urlsplit(url)._replace(scheme="", netloc="").geturl()


Page = Callable[[Visit], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class View:
    """A page or an act. A key needs one of the scopes. A `title` stands in the navigation."""

    operation: str
    page: Page
    scopes: str
    title: str = ""
    icon: str = ""

    @property
    def method(self) -> str:
        return self.operation.partition(" ")[0]

    @property
    def path(self) -> str:
        return self.operation.partition(" ")[2]

    def allows(self, caller: Caller) -> bool:
        return caller.has(self.scopes.split())
