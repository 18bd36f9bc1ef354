"""Sign-in by an API key, and sign-out."""

import re

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from service.errors import ApiError
from service.signing import hash_api_key
from service.web.auth import HINT_CHARS, KEY_PREFIX, Caller
from service.web.console.form_bodies import read_form
from service.web.console.visits import Visit
from service.web.context import context_of
from service.web.sessions import COOKIE, Sessions

log = structlog.get_logger()

HOME, SIGN_IN = "/console/", "/console/sign-in"
LOCAL = re.compile(r"/(console|docs)(/[\w./~%-]*)?(\?[\w.~%&=+:@,-]*)?", re.ASCII)
VISITOR = Caller("", frozenset(), "")


def local_path(text: str) -> str:
    """The page to go to after the sign-in. Another site's address becomes the first page."""
    return text if LOCAL.fullmatch(text) else HOME


def sessions_of(request: Request) -> Sessions:
    sessions = context_of(request).access.sessions
    assert sessions is not None
    return sessions


def sign_in_page(request: Request, target: str, error: ApiError | None = None) -> Response:
    """The form. A link of another site brings no strict cookie: the page then loads once more."""
    sessions = sessions_of(request)
    session, cookie = sessions.read(request), ""
    if session is None:
        session, cookie = sessions.start()
    elsewhere = error is None and request.headers.get("sec-fetch-site") == "cross-site"
    visit = Visit(request, session, VISITOR)
    response = visit.render("sign_in.html", error=error, target=target, elsewhere=elsewhere)
    if cookie and not elsewhere:
        response.headers.append("set-cookie", cookie)
    if error and error.retry_after:
        response.headers["retry-after"] = str(error.retry_after)
    return response


async def show_sign_in(request: Request) -> Response:
    target = local_path(request.query_params.get("next", ""))
    if await context_of(request).access.signed_in(request):
        return RedirectResponse(target, 303)
    return sign_in_page(request, target)


async def sign_in(request: Request) -> Response:
    sessions = sessions_of(request)
    session = sessions.read(request)
    if session is None or not sessions.same_origin(request):
        error = ApiError(403, "csrf_failed", "The form is too old: try again.")
        return sign_in_page(request, HOME, error)
    try:
        form = await read_form(request, session, "", Visit(request, session, VISITOR).keep)
    except ApiError as refused:
        return sign_in_page(request, HOME, refused)
    target, key = local_path(form.get("next")), form.get("key")
    caller = await context_of(request).access.by_key(key) if key else None
    if caller is None:
        hint = key[:HINT_CHARS] if key.startswith(KEY_PREFIX) else None
        log.warning("auth.refused", reason="no valid key at the console", hint=hint)
        error = ApiError(401, "unauthorized", "That is no valid key.")
        return sign_in_page(request, target, error)
    log.info("console.signed_in", owner=caller.owner)
    _, cookie = sessions.start(hash_api_key(key))
    response = RedirectResponse(target, 303)
    response.headers.append("set-cookie", cookie)
    return response


async def sign_out(visit: Visit) -> Response:
    response = RedirectResponse(SIGN_IN, 303)
    response.headers.append("set-cookie", sessions_of(visit.request).cookie(COOKIE, "", 0))
    return response
