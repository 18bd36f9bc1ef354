"""The outcomes that EvoLink's answers prove, or their lack: pure functions, which never raise.

A response that these functions do not understand is uncertain, unreadable or not final, never a
guess. They also tell whether an answer comes from the API, and whether it refuses the service's key
or account.
"""

from collections.abc import Mapping
from dataclasses import replace

from service.errors import CallTimedOut, EgressError, EgressRefused, NotConnected, type_of
from service.links import is_data, usable
from service.net.responses import Response, retry_after
from service.upstreams.base import (
    Accepted,
    Finished,
    Found,
    NoAnswer,
    NotCreated,
    NotFound,
    QueryOutcome,
    Refused,
    Report,
    Status,
    SubmitOutcome,
    Uncertain,
)
from service.upstreams.lenient import document_of, section_of, task_of, text_of
from service.upstreams.reports import MESSAGE, code_of, report_of

# Codes of a 403 about our key, user, account or address begin so, such as `key_disabled`.
OUR_ACCOUNT = ("key_", "api_key_", "token_", "user_", "account_", "ip_")
REASONS: Mapping[type[object], str] = {
    EgressRefused: "refused by the guard",
    NotConnected: "not connected",
    CallTimedOut: "timed out",
}
LOOKED_AT = 1024  # bytes of a body
BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, too
FIXED_PATHS = ("credits", "models")  # by kind of call
KEPT = 2048  # bytes of a response that cannot be read
ABOUT = ("id", "task_id", "status")  # an answer with none of them is about no task
# Error codes that prove nothing, under any status.
UNPROVED = frozenset({"paid_outcome_unknown", "idempotency_conflict"})
# Older pages give the status as the code. These are the names of the newer pages.
CODES = {
    402: "insufficient_quota",
    403: "permission_denied",
    404: "not_found",
    413: "request_too_large",
}


def classify_submit(
    status: int, headers: Mapping[str, str], body: bytes, now: float
) -> SubmitOutcome:
    """The outcome that a submission's response proves (docs/api.md). Header names are lower-case,
    `now` is Unix seconds.
    """
    document = task_of(body)
    if 200 <= status < 300:
        report = report_of(document) if document is not None else None
        if report is not None and report.upstream_id:
            return Accepted(report)
        finished = report and finished_at_once(report)
        return finished or Uncertain(f"{status} without an id", body[:KEPT])
    error = section_of(document, "error")
    code, message = code_of(error.get("code")), text_of(error.get("message"), MESSAGE)
    reason = reason_of(status, code or message)
    own = bool(code or message)  # a gateway's page may have replaced another response
    if status == 408 or code in UNPROVED or not (400 <= status < 500 or (status == 503 and own)):
        return Uncertain(reason)
    if status in (429, 503):
        wait = retry_after(headers.get("retry-after"), now)
        return NotCreated(reason, wait, throttled=status == 429)
    if refuses_account(status, code):
        return NotCreated(reason, account=True)
    if status == 403 and not own:
        return Uncertain(reason)
    return Refused(
        status,
        {
            "code": code if code and code != str(status) else CODES.get(status, "invalid_request"),
            "message": message or f"the upstream refused the request with status {status}",
            "type": text_of(error.get("type")) or type_of(status),
            "param": text_of(error.get("param")),
        },
    )


def classify_query(
    status: int, headers: Mapping[str, str], body: bytes, now: float, upstream_id: str
) -> QueryOutcome:
    """The outcome of a query. A response about another task tells nothing. One about the task that
    has no documented status is found, so that the task has an end, and kept for operators.
    """
    if status == 404:
        return NotFound()
    if not 200 <= status < 300:
        wait = retry_after(headers.get("retry-after"), now)
        return NoAnswer(f"{status}", wait, throttled=status == 429)
    document = task_of(body, alone=True, id=upstream_id) or {}
    report = report_of(document) if not document.keys().isdisjoint(ABOUT) else None
    if report is None:
        return NoAnswer(f"{status} unreadable", raw=body[:KEPT])
    if report.upstream_id not in (None, upstream_id):
        return NoAnswer(f"{status} for another task", raw=body[:KEPT])
    return Found(report, raw=body[:KEPT] if report.status is None else b"")


def reason_of(status: int, said: str | None) -> str:
    return f"{status} {said or 'without an error of its own'}"


def refuses_account(status: int, code: str | None) -> bool:
    return status == 401 or (status == 403 and code is not None and code.startswith(OUR_ACCOUNT))


def refusal_of(answer: Response | EgressError) -> str | None:
    """Why the answer refuses the service's key or account, as `NotCreated.reason` says it."""
    if isinstance(answer, EgressError) or answer.status not in (401, 403):
        return None
    error = section_of(document_of(answer.body), "error")
    code, message = text_of(error.get("code")), text_of(error.get("message"))
    refused = refuses_account(answer.status, code)
    return reason_of(answer.status, code or message) if refused else None


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
    page = answer.body[:LOOKED_AT].lstrip(BLANK)[:1] not in (b"{", b"[")
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
