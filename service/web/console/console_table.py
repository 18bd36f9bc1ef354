"""The table of the console's pages, and what surrounds each of them."""

import json
from collections.abc import Sequence
from functools import partial
from urllib.parse import quote, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from structlog.contextvars import bind_contextvars

from service.errors import ApiError, BlobUnavailable, EgressError, StoreUnavailable
from service.web.auth import Caller
from service.web.console.form_bodies import read_form
from service.web.console.pages import (
    deliveries_page,
    docs_page,
    endpoints_page,
    gallery_page,
    keys_page,
    operations_page,
    overview_page,
    playground_page,
    spending_page,
    tasks_page,
)
from service.web.console.sign_in import (
    SIGN_IN,
    VISITOR,
    LoginLimiter,
    sessions_of,
    show_sign_in,
    sign_in,
    sign_out,
)
from service.web.console.templating import asset
from service.web.console.visits import View, Visit
from service.web.context import context_of
from service.web.error_responses import respond
from service.web.routes.operation import Handler, Path, path_routes
from service.web.sessions import Session

ANY = "read submit subscribe"


async def home(visit: Visit) -> Response:
    return visit.redirect(visit.nav[0][1])


async def unknown(_: Visit) -> Response:
    raise ApiError(404, "not_found", "There is no such page.")


# The navigation has the titles in this order.
VIEWS: Sequence[View] = (
    View("GET /console", home, ANY),
    *playground_page.VIEWS,
    *gallery_page.VIEWS,
    *tasks_page.VIEWS,
    *deliveries_page.VIEWS,
    *endpoints_page.VIEWS,
    *spending_page.VIEWS,
    *overview_page.VIEWS,
    *operations_page.VIEWS,
    *keys_page.VIEWS,
    View("POST /console/sign-out", sign_out, ANY),
    View("GET /console/{rest:path}", unknown, ANY),
)
ERRORS = (ApiError, StoreUnavailable, BlobUnavailable, EgressError)


def navigation(caller: Caller) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (view.title, view.path, view.icon) for view in VIEWS if view.title and view.allows(caller)
    )


async def begin(request: Request, view: View) -> Visit | Response:
    """The visit, with its form read, or the way to the sign-in page. Raises ApiError."""
    context, sessions = context_of(request), sessions_of(request)
    session, caller = sessions.read(request), await context.access.signed_in(request)
    if session is None or caller is None:
        if request.method == "POST" or "x-fragment" in request.headers:
            raise ApiError(401, "unauthorized", "Your session has ended: sign in again.")
        query = f"?{request.url.query}" if request.url.query else ""
        target = quote(request.url.path + query, safe="/")
        if request.headers.get("sec-fetch-site") == "cross-site":
            scope = {**request.scope, "query_string": f"next={target}".encode()}
            return await show_sign_in(Request(scope, request.receive))
        return RedirectResponse(f"{SIGN_IN}?next={target}", 303)
    bind_contextvars(owner=caller.owner)
    request.state.caller = caller
    await context.limits.count(caller.key)
    if not view.allows(caller):
        names = " or ".join(view.scopes.split())
        raise ApiError(403, "permission_denied", f"your key needs the scope {names}")
    visit = Visit(request, session, caller, navigation(caller))
    if request.method == "POST":
        if not sessions.same_origin(request):
            raise ApiError(403, "csrf_failed", "another site sent this form")
        visit.form = await read_form(request, session, caller.key, visit.keep)
    return visit


def page_endpoint(view: View) -> Handler:
    async def endpoint(request: Request) -> Response:
        visit = await begin(request, view)
        return visit if isinstance(visit, Response) else await view.page(visit)

    return guarded_page(endpoint)


def guarded_page(endpoint: Handler) -> Handler:
    """The endpoint behind load shedding. An error becomes a page. Headers protect every answer."""

    async def guarded(request: Request) -> Response:
        try:
            shedder = context_of(request).shedder
            with shedder.request(), shedder.bodies.request() as request.state.body:
                response = await endpoint(request)
        except ERRORS as error:
            response = await error_page(request, error)
        response.headers.update(page_headers(request, response))
        return response

    return guarded


def page_headers(request: Request, response: Response) -> dict[str, str]:
    parts = urlsplit(context_of(request).resources.links.image_base_url or "")
    images = f" {parts.scheme}://{parts.netloc}" if parts.netloc else ""
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        f"img-src 'self'{images}; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "same-origin",  # with no-referrer, forms would have the origin "null"
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    headers["Cache-Control"] = response.headers.get("cache-control", "no-store")
    if "content-security-policy" in response.headers:  # of a file, which runs nothing at all
        del headers["Content-Security-Policy"]
    return headers


async def error_page(request: Request, error: Exception) -> Response:
    answer = await respond(request, error)
    document = json.loads(bytes(answer.body))["error"]
    caller = getattr(request.state, "caller", VISITOR)
    session = sessions_of(request).read(request) or Session("-")
    visit = Visit(request, session, caller, navigation(caller) if caller is not VISITOR else ())
    response = visit.render("error.html", answer.status_code, problem=document)
    if "retry-after" in answer.headers:
        response.headers["retry-after"] = answer.headers["retry-after"]
    return response


def console_routes() -> list[Route]:
    attempt = guarded_page(partial(sign_in, limiter=LoginLimiter()))
    forms = [("GET", SIGN_IN, guarded_page(show_sign_in)), ("POST", SIGN_IN, attempt)]
    return path_routes([*forms, *((view.method, view.path, page_endpoint(view)) for view in VIEWS)])


def page_routes(*, console: bool) -> list[Route]:
    """The routes of the pages. The documents need no key."""
    return [
        *(Path(path, docs_page.documentation) for path in docs_page.TEMPLATES),
        Route("/assets/{version}/{name}", asset),
        *(console_routes() if console else ()),
    ]
