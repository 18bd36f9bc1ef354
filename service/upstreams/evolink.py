"""EvoLink's image API: bytes to reports and outcomes by pure functions, and a thin adapter that
makes the calls.

Whatever the other side sends is read without raising; what is not understood is uncertain,
unreadable or not terminal, never a guess.
"""

import re
import time
from collections.abc import Callable, Mapping
from urllib.parse import quote

from service.credits import millionths
from service.errors import CallTimedOut, EgressError, EgressRefused, NotConnected, type_of
from service.ids import UPSTREAM_ID
from service.net import Egress, Response
from service.net.retry_after import retry_after
from service.strict_json import JSON, read_object
from service.upstreams.base import (
    Accepted,
    Call,
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

MAX_BODY = 1 << 20
TEXT, MESSAGE, LINK, RESULTS = (
    200,
    2000,
    4096,
    64,
)  # characters kept of ids and names, of messages, of links; results kept
WORD = 64  # as long as their columns
LONGEST_ESTIMATE = (
    6 * 3600
)  # seconds; twice that is asked after, and must lie well within the day a task is kept
YEAR_10000 = 253_402_300_800

STATUSES = {status.value: status for status in Status} | {"canceled": Status.CANCELLED}

# Answers that prove nothing, whatever their status.
UNPROVED = frozenset({"paid_outcome_unknown", "idempotency_conflict"})
# 403s about our key, user, account or address, such as key_disabled, user_disabled, ip_restricted;
# any other is about the request.
OURS = ("key_", "api_key_", "token_", "user_", "account_", "ip_")
# Older pages give the status as code: then it is named as the newer ones name it.
CODES = {
    402: "insufficient_quota",
    403: "permission_denied",
    404: "not_found",
    413: "request_too_large",
}


# --- reading
# --------------------------------------------------------------------------------------------------


def _object(body: bytes) -> JSON | None:
    """None: no JSON object that any store can keep."""
    try:
        return read_object(body)
    except ValueError:
        return None


def _text(value: object, limit: int = TEXT) -> str | None:
    return value[:limit] if isinstance(value, str) and value else None


def _code(value: object) -> str | None:
    """A code as text: it may be an integer on older pages."""
    return (
        str(value)[:TEXT]
        if isinstance(value, int) and not isinstance(value, bool)
        else _text(value)
    )


def _integer(value: object, limit: int) -> int | None:
    """A whole number from 0 to below the limit, without its fraction if it has one."""
    return (
        int(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < limit
        else None
    )


def _percent(value: object) -> int | None:
    return (
        int(min(max(value, 0), 100))
        if isinstance(value, int | float) and not isinstance(value, bool)
        else None
    )


def _section(document: JSON, name: str) -> JSON:
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def _links(document: JSON) -> tuple[str, ...]:
    """The results in order. One that is no link is kept as "", which no download accepts: a picture
    must not vanish silently.
    """
    entries = document.get("results") or document.get("result_data")
    links = []
    for entry in entries[:RESULTS] if isinstance(entries, list) else ():
        link = (entry.get("url") or entry.get("image_url")) if isinstance(entry, dict) else entry
        links.append(_text(link, LINK) or "")
    return tuple(links)


def _error(document: JSON) -> JSON | None:
    """A failed task's error: `code`, `message`, `type`."""
    error = document.get("error")
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict) or not error:
        return None
    code = _code(error.get("code")) or "unknown_error"
    return {
        "code": code,
        "message": _text(error.get("message"), MESSAGE) or code,
        "type": _text(error.get("type")) or "task_error",
    }


def _report(document: JSON) -> Report | None:
    """None: it has an id that cannot be one."""
    id, status, error = document.get("id"), document.get("status"), _error(document)
    if id is not None and not (isinstance(id, str) and re.fullmatch(UPSTREAM_ID, id)):
        return None
    known = STATUSES.get(status.lower()) if isinstance(status, str) else None
    if known is Status.FAILED and error is not None and error["code"] == "request_cancelled":
        known = Status.CANCELLED
    info, usage = _section(document, "task_info"), _section(document, "usage")
    return Report(
        upstream_id=id,
        status=known,
        results=_links(document),
        error=error,
        progress=_percent(document.get("progress")),
        model=_text(document.get("model")),
        created=_integer(document.get("created"), YEAR_10000),
        can_cancel=info["can_cancel"] if isinstance(info.get("can_cancel"), bool) else None,
        estimated_time=_integer(info.get("estimated_time"), LONGEST_ESTIMATE + 1),
        billing_rule=_text(usage.get("billing_rule"), WORD),
        user_group=_text(usage.get("user_group"), WORD),
        credits_reserved=millionths(usage.get("credits_reserved")),
        credits_used=millionths(usage.get("credits_used")),
    )


def parse_task(body: bytes) -> Report | None:
    """A task in a query's answer or a callback; only a status is demanded. None: unreadable. Never
    raises.
    """
    document = _object(body)
    if document is None or not isinstance(document.get("status"), str):
        return None
    return _report(document)


# --- judging
# --------------------------------------------------------------------------------------------------


def classify_submit(
    status: int, headers: Mapping[str, str], body: bytes, now: float
) -> SubmitOutcome:
    """What a submission's answer proves (contract section 3). `headers` by lower-case name; `now`
    in Unix seconds.
    """
    document = _object(body)
    if 200 <= status < 300:
        report = _report(document) if document is not None else None
        return (
            Accepted(report)
            if report is not None and report.upstream_id
            else Uncertain(f"{status} without an id")
        )
    error = _section(document, "error") if document is not None else {}
    code, message = _code(error.get("code")), _text(error.get("message"), MESSAGE)
    reason = f"{status} {code or message or 'without an error of its own'}"
    own = bool(
        code or message
    )  # else it is a gateway's page, which may have replaced another answer
    if status == 408 or code in UNPROVED or not (400 <= status < 500 or (status == 503 and own)):
        return Uncertain(reason)
    if status in (429, 503):
        return NotCreated(
            reason, retry_after(headers.get("retry-after"), now), throttled=status == 429
        )
    if status == 401 or (status == 403 and code is not None and code.startswith(OURS)):
        return NotCreated(reason, account=True)
    if status == 403 and not own:
        return Uncertain(reason)
    return Refused(
        status,
        {
            "code": code if code and code != str(status) else CODES.get(status, "invalid_request"),
            "message": message or f"the upstream refused the request with status {status}",
            "type": _text(error.get("type")) or type_of(status),
            "param": _text(error.get("param")),
        },
    )


def classify_query(
    status: int, headers: Mapping[str, str], body: bytes, now: float, upstream_id: str
) -> QueryOutcome:
    """What a query's answer says; an answer about another task than the one asked for says
    nothing.
    """
    if status == 404:
        return NotFound()
    if not 200 <= status < 300:
        return NoAnswer(
            f"{status}", retry_after(headers.get("retry-after"), now), throttled=status == 429
        )
    report = parse_task(body)
    if report is None:
        return NoAnswer(f"{status} unreadable")
    return (
        Found(report)
        if report.upstream_id in (None, upstream_id)
        else NoAnswer(f"{status} for another task")
    )


def unanswered_submit(error: EgressError) -> NotCreated | Uncertain:
    """What a submission without an answer proves: nothing was created only if nothing was sent."""
    return (
        NotCreated(_why(error))
        if isinstance(error, EgressRefused | NotConnected)
        else Uncertain(_why(error))
    )


def _why(error: EgressError) -> str:
    reasons = {
        EgressRefused: "refused by the guard",
        NotConnected: "not connected",
        CallTimedOut: "timed out",
    }
    return reasons.get(type(error), "connection lost")


# --- calling
# --------------------------------------------------------------------------------------------------

OUTCOMES: Mapping[type[object], str] = {
    Accepted: "accepted",
    NotCreated: "not_created",
    Refused: "refused",
    Uncertain: "uncertain",
    Found: "found",
    NotFound: "not_found",
    NoAnswer: "no_answer",
    Response: "answered",
}
KINDS = {"/v1/credits": "credits", "/v1/models": "models"}


class EvoLink:
    """The `Upstream` that speaks EvoLink's API through the guarded client. Timeouts in seconds;
    `now` gives Unix seconds.
    """

    name = "evolink"
    answering = True

    def __init__(
        self,
        egress: Egress,
        base_url: str,
        api_key: str,
        submit_timeout: float,
        query_timeout: float,
        on_call: Callable[[Call], None] | None = None,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._egress = egress
        self._base_url = base_url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}", "accept": "application/json"}
        self._submit_timeout = submit_timeout
        self._query_timeout = query_timeout
        self._on_call = on_call
        self._now = now

    async def submit(self, body: bytes, idempotency_key: str) -> SubmitOutcome:
        """The key goes along as `Idempotency-Key`, which the upstream may honour or not."""
        headers = {
            "idempotency-key": idempotency_key,
            "content-type": "application/json",
        } | self._headers
        answer, seconds = await self._send(
            "POST", "/v1/images/generations", self._submit_timeout, headers, body
        )
        outcome: SubmitOutcome
        if isinstance(answer, Response):
            outcome = classify_submit(answer.status, answer.headers, answer.body, self._now())
        else:
            outcome = unanswered_submit(answer)
        self._tell("submit", answer, outcome, seconds)
        return outcome

    async def query(self, upstream_id: str) -> QueryOutcome:
        path = f"/v1/tasks/{quote(upstream_id, safe='')}"
        answer, seconds = await self._send("GET", path, self._query_timeout, self._headers)
        outcome: QueryOutcome
        if isinstance(answer, Response):
            outcome = classify_query(
                answer.status, answer.headers, answer.body, self._now(), upstream_id
            )
        else:
            outcome = NoAnswer(_why(answer))
        self._tell("query", answer, outcome, seconds)
        return outcome

    async def passthrough(self, method: str, path: str) -> Response:
        if not path.startswith("/"):
            raise ValueError("a path begins with /")
        answer, seconds = await self._send(method, path, self._query_timeout, self._headers)
        outcome = answer if isinstance(answer, Response) else NoAnswer(_why(answer))
        self._tell(KINDS.get(path, "passthrough"), answer, outcome, seconds)
        if isinstance(answer, EgressError):
            raise answer
        return answer

    def read_callback(self, body: bytes) -> Report | None:
        return parse_task(body)

    async def _send(
        self,
        method: str,
        path: str,
        timeout: float,
        headers: Mapping[str, str],
        content: bytes | None = None,
    ) -> tuple[Response | EgressError, float]:
        started, url = time.perf_counter(), self._base_url + path
        answer: Response | EgressError
        try:
            answer = await self._egress.request(
                method, url, headers=headers, content=content, timeout=timeout, max_bytes=MAX_BODY
            )
        except EgressError as error:
            answer = error
        return answer, time.perf_counter() - started

    def _tell(
        self, kind: str, answer: Response | EgressError, outcome: object, seconds: float
    ) -> None:
        refused_us = isinstance(outcome, NotCreated) and outcome.account
        self.answering = (
            isinstance(answer, Response)
            and answer.status < 500
            and answer.status != 401
            and not refused_us
        )
        if self._on_call is not None:
            status, request_id = None, None
            if isinstance(answer, Response):
                status, request_id = answer.status, _text(answer.headers.get("x-request-id"))
            self._on_call(Call(kind, status, OUTCOMES[type(outcome)], seconds, request_id))
