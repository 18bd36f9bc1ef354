"""A visit: one request for a page by a signed-in person, and what its page needs to answer."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from service.errors import ApiError
from service.web.auth import Caller
from service.web.console.api_calls import Query, api_document, api_response
from service.web.console.form_bodies import FormFields
from service.web.console.templating import environment
from service.web.context import Context, context_of
from service.web.sessions import FLASH, FLASH_S, Session

FRAGMENT = "x-fragment"  # a script asks for a part of the page
Headers = Mapping[str, str] | None


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
        """A parameter of the page's path."""
        text: str = self.request.path_params[name]
        return text

    async def answer(
        self,
        operation: str,
        query: Query | None = None,
        body: object = None,
        headers: Headers = None,
        **path: str,
    ) -> Response:
        """The response of an operation of the API as it is, such as a file."""
        return await api_response(
            self.request, self.caller, operation, query, body, headers, **path
        )

    async def call(
        self,
        operation: str,
        query: Query | None = None,
        body: object = None,
        headers: Headers = None,
        **path: str,
    ) -> Any:
        """The document that an operation of the API answers with. Raises ApiError."""
        response = await self.answer(operation, query, body, headers, **path)
        return await api_document(self.request, response)

    async def list_of(self, operation: str, query: Query) -> tuple[Any, ApiError | None]:
        """The document of a list, or an empty one with the error that refused the filter."""
        try:
            return await self.call(operation, query), None
        except ApiError as error:
            return {"data": [], "next_cursor": None}, error

    async def keep(self, form: FormFields, name: str | None, content: AsyncIterator[bytes]) -> str:
        """Stores an input image of a form within the limits of the form's model, and returns its
        id. Raises ApiError.
        """
        files, rule = (
            self.context.files,
            self.context.intake.catalogue.image_rule(form.get("model")),
        )
        owner = self.caller.owner
        return (await files.keep(owner, lambda: name, content, rule, param="image_urls")).id

    def render(
        self,
        template: str,
        status: int | None = None,
        *,
        error: ApiError | None = None,
        **values: Any,
    ) -> Response:
        """The page, by default with the status of its error. A script that asks for a fragment gets
        it without the frame around it.
        """
        status = status or (error.status if error else 200)
        links = self.context.resources.links
        sessions = self.context.access.sessions
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


def image_src(image: Mapping[str, Any], image_base_url: str | None) -> str:
    """Where the browser finds a stored image: on this host, under any base URL."""
    url: str = image["url"]
    return url if image_base_url else urlsplit(url).path


Page = Callable[[Visit], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class View:
    """A page or an act: method and path, and the scopes of which a key needs one. A GET with a
    `title` is in the navigation.
    """

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
        return not caller.scopes.isdisjoint({"admin", *self.scopes.split()})
