"""The meaning of an answer, or of its lack, besides its content: whether it comes from the API,
whether it refuses the service's key or account, and whether a request was sent at all.
"""

from collections.abc import Mapping
from dataclasses import replace

from service.errors import CallTimedOut, EgressError, EgressRefused, NotConnected
from service.links import is_data, usable
from service.net.responses import Response
from service.upstreams.base import Finished, NotCreated, Report, Status, Uncertain
from service.upstreams.lenient import document_of, section_of, text_of

# Codes of a 403 about our key, user, account or address begin so, such as `key_disabled`.
OUR_ACCOUNT = ("key_", "api_key_", "token_", "user_", "account_", "ip_")
REASONS: Mapping[type[object], str] = {
    EgressRefused: "refused by the guard",
    NotConnected: "not connected",
    CallTimedOut: "timed out",
}
KEPT = 1024  # bytes of a body that are looked at
BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, too
FIXED_PATHS = ("credits", "models")  # by kind of call


def refuses_account(status: int, code: str | None) -> bool:
    return status == 401 or (status == 403 and code is not None and code.startswith(OUR_ACCOUNT))


def refusal_of(answer: Response | EgressError) -> str | None:
    """Why the answer refuses the service's key or account, as `NotCreated.reason` says it."""
    if isinstance(answer, EgressError) or answer.status not in (401, 403):
        return None
    error = section_of(document_of(answer.body), "error")
    code, message = text_of(error.get("code")), text_of(error.get("message"))
    if not refuses_account(answer.status, code):
        return None
    return f"{answer.status} {code or message or 'without an error of its own'}"


def is_from_api(kind: str, answer: Response | EgressError, *, proved: bool = False) -> bool | None:
    """Whether the API itself answered. None: the answer does not tell.

    A redirect, a page, and a 404 to a path that the API always has come from another place: a
    login page, a gateway, a website, a wrong path. `proved`: a submission or a query was answered,
    so such a 404 comes from an API that lacks the path.
    """
    if isinstance(answer, EgressError):
        return False
    status = answer.status
    if status in (401, 429):
        return True
    page = answer.body[:KEPT].lstrip(BLANK)[:1] not in (b"{", b"[")
    if status in (404, 405, 410):
        missing = kind in FIXED_PATHS and not proved
        return False if missing or (kind == "submit" and page) else None
    return not page and (200 <= status < 300 or 400 <= status < 500)


def finished_at_once(report: Report) -> Finished | None:
    """A submission's response without an id, if it has results instead. Without an id a `data:` URL
    cannot be asked for again, so only links count.
    """
    links = tuple(link if usable(link) and not is_data(link) else "" for link in report.results)
    if report.status not in (None, Status.COMPLETED) or report.error is not None or not any(links):
        return None
    return Finished(replace(report, status=Status.COMPLETED, results=links))


def unanswered_submit(error: EgressError) -> NotCreated | Uncertain:
    """A submission without a response created nothing only if the request was never sent."""
    sent = not isinstance(error, EgressRefused | NotConnected)
    return Uncertain(why(error)) if sent else NotCreated(why(error))


def why(error: EgressError) -> str:
    return REASONS.get(type(error), "connection lost")
