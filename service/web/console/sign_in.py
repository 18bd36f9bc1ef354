"""Sign-in by an API key, and sign-out. Failed attempts of an address are limited."""

import re
import time
from collections import deque

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from service.errors import ApiError
from service.signing import hash_api_key
from service.web.auth import HINT_CHARS, KEY_PREFIX, Caller
from service.web.console.form_bodies import FormFields, read_form
from service.web.console.visits import Visit
from service.web.context import context_of
from service.web.key_shares import address_of
from service.web.sessions import COOKIE, Sessions

log = structlog.get_logger()

HOME, SIGN_IN = "/console/", "/console/sign-in"
LOCAL = re.compile(r"/(console|docs)(/[\w./~%-]*)?(\?[\w.~%&=+:@,-]*)?", re.ASCII)
ATTEMPTS, WINDOW_S, ADDRESSES = 10, 60.0, 10_000
VISITOR = Caller("", frozenset(), "")


class LoginLimiter:
    """Failed attempts of each address: `ATTEMPTS` in `WINDOW_S`."""

    def __init__(self) -> None:
        self._failed: dict[str, deque[float]] = {}

    def check(self, address: str, now: float) -> None:
        times = self._failed.get(address, deque())
        while times and times[0] <= now - WINDOW_S:
            times.popleft()
        if len(times) >= ATTEMPTS:
            wait = int(times[0] + WINDOW_S - now) + 1
            message = f"{ATTEMPTS} attempts failed: wait {wait} s before the next one"
            raise ApiError(429, "rate_limit_exceeded", message, retry_after=wait)

    def failed(self, address: str, now: float) -> None:
        if len(self._failed) >= ADDRESSES and address not in self._failed:
            del self._failed[next(iter(self._failed))]  # the oldest
        self._failed.setdefault(address, deque()).append(now)


def local_path(text: str) -> str:
    """The page to go to after the sign-in. Another site's address becomes the first page."""
    return text if LOCAL.fullmatch(text) else HOME


def sessions_of(request: Request) -> Sessions:
    sessions = context_of(request).access.sessions
    assert sessions is not None
    return sessions


def sign_in_page(
    request: Request, target: str, *, error: ApiError | None = None, fresh: bool = True
) -> Response:
    """The form. A link of another site brings no strict cookie: the page then loads once more."""
    sessions = sessions_of(request)
    session, cookie = sessions.read(request), ""
    if session is None:
        session, cookie = sessions.start()
    elsewhere = fresh and request.headers.get("sec-fetch-site") == "cross-site"
    visit = Visit(request, session, VISITOR)
    status = None if error or fresh else 401
    response = visit.render("sign_in.html", status, error=error, target=target, elsewhere=elsewhere)
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


async def sign_in(request: Request, limiter: LoginLimiter) -> Response:
    form = FormFields()
    try:
        form = await sign_in_form(request, limiter)
        caller = await key_owner(request, limiter, form.get("key"))
    except ApiError as error:
        return sign_in_page(request, local_path(form.get("next")), error=error, fresh=False)
    log.info("console.signed_in", owner=caller.owner)
    _, cookie = sessions_of(request).start(hash_api_key(form.get("key")))
    response = RedirectResponse(local_path(form.get("next")), 303)
    response.headers.append("set-cookie", cookie)
    return response


async def sign_in_form(request: Request, limiter: LoginLimiter) -> FormFields:
    """Raises ApiError 403 for another site's form, 429 after too many failures."""
    sessions, address = sessions_of(request), address_of(request.scope.get("client"))
    session = sessions.read(request)
    if session is None or not sessions.same_origin(request):
        raise ApiError(403, "csrf_failed", "The form is too old: try again.")
    limiter.check(address, time.monotonic())
    return await read_form(request, session, address, Visit(request, session, VISITOR).keep)


async def key_owner(request: Request, limiter: LoginLimiter, key: str) -> Caller:
    caller = await context_of(request).access.by_key(key) if key else None
    if caller is None:
        limiter.failed(address_of(request.scope.get("client")), time.monotonic())
        hint = key[:HINT_CHARS] if key.startswith(KEY_PREFIX) else None
        log.warning("auth.refused", reason="no valid key at the console", hint=hint)
        raise ApiError(401, "unauthorized", "That is no valid key.")
    return caller


async def sign_out(visit: Visit) -> Response:
    response = RedirectResponse(SIGN_IN, 303)
    response.headers.append("set-cookie", sessions_of(visit.request).cookie(COOKIE, "", 0))
    return response
