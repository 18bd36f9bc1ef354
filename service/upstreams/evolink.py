"""EvoLink's image API: pure functions from bytes to outcomes, and an adapter that makes the calls.

Reading never raises. A response that these functions do not understand is uncertain, unreadable or
not final, never a guess.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from service.errors import EgressError, type_of
from service.net.egress_client import Egress
from service.net.responses import Response
from service.net.retry_after import retry_after
from service.upstreams.base import (
    OUTCOME_NAMES,
    Accepted,
    Found,
    NoAnswer,
    NotCreated,
    NotFound,
    QueryOutcome,
    Refused,
    Report,
    SubmitOutcome,
    Uncertain,
    UpstreamCall,
)
from service.upstreams.large_answers import LargeAnswers, judged
from service.upstreams.lenient import USUAL_BYTES, section_of, task_of, text_of
from service.upstreams.reports import MESSAGE, code_of, parse_task, report_of
from service.upstreams.result_links import inline_content
from service.upstreams.verdicts import (
    finished_at_once,
    is_from_api,
    refusal_of,
    refuses_account,
    unanswered_submit,
    why,
)

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


# --- classifying


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
        finished = finished_at_once(report) if report is not None else None
        return finished or Uncertain(f"{status} without an id", body[:KEPT])
    error = section_of(document, "error")
    code, message = code_of(error.get("code")), text_of(error.get("message"), MESSAGE)
    reason = f"{status} {code or message or 'without an error of its own'}"
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


# --- calling

Outcome = TypeVar("Outcome")
KINDS = {"/v1/credits": "credits", "/v1/models": "models"}


class EvoLink:
    """The `Upstream` that calls EvoLink through the guarded client. Timeouts are in seconds, `now`
    gives Unix seconds. `max_bytes` limits a response. Large ones go to files in `folder`.
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
        on_call: Callable[[UpstreamCall], None] | None = None,
        *,
        max_bytes: int = USUAL_BYTES,
        folder: Path | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._answers = LargeAnswers(egress, max_bytes, folder)
        self._base_url = base_url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}", "accept": "application/json"}
        self._submit_timeout = submit_timeout
        self._query_timeout = query_timeout
        self._on_call = on_call
        self._now = now
        self._proved = False  # a submission or a query was answered
        self.on_refused: Callable[[str, str], None] = lambda _kind, _reason: None

    async def submit(self, body: bytes, idempotency_key: str) -> SubmitOutcome:
        def judge(answer: Response | EgressError) -> SubmitOutcome:
            if isinstance(answer, EgressError):
                return unanswered_submit(answer)
            return classify_submit(answer.status, answer.headers, answer.body, self._now())

        headers = {"idempotency-key": idempotency_key, "content-type": "application/json"}
        path, timeout = "/v1/images/generations", self._submit_timeout
        return await self._call("submit", "POST", path, timeout, judge, headers, body)

    async def query(self, upstream_id: str) -> QueryOutcome:
        def judge(answer: Response | EgressError) -> QueryOutcome:
            if isinstance(answer, EgressError):
                return NoAnswer(why(answer))
            return classify_query(
                answer.status, answer.headers, answer.body, self._now(), upstream_id
            )

        path = f"/v1/tasks/{quote(upstream_id, safe='')}"
        return await self._call("query", "GET", path, self._query_timeout, judge)

    async def inline_result(self, upstream_id: str, link: str) -> bytes | NoAnswer | None:
        def judge(answer: Response | EgressError) -> bytes | NoAnswer | None:
            if isinstance(answer, EgressError):
                return NoAnswer(why(answer))
            if not 200 <= answer.status < 300:
                return NoAnswer(f"{answer.status}")
            return inline_content(answer.body, link)

        path = f"/v1/tasks/{quote(upstream_id, safe='')}"
        return await self._call("query", "GET", path, self._query_timeout, judge)

    async def passthrough(self, method: str, path: str) -> Response:
        if not path.startswith("/"):
            raise ValueError("a path begins with /")
        kind, timeout = KINDS.get(path, "passthrough"), self._query_timeout
        answer = await self._call(kind, method, path, timeout, lambda answer: answer)
        if isinstance(answer, EgressError):
            raise answer
        return answer

    def read_callback(self, body: bytes) -> Report | None:
        return parse_task(body)

    async def _call(
        self,
        kind: str,
        method: str,
        path: str,
        timeout: float,
        judge: Callable[[Response | EgressError], Outcome],
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Outcome:
        """Sends one request and judges the response, or the error that came instead."""
        started, url = time.perf_counter(), self._base_url + path
        headers = {**(headers or {}), **self._headers}
        large = kind in ("submit", "query")
        asking = self._answers.request(method, url, headers, content, timeout, large=large)
        async with asking as answer:
            seconds, status, request_id = time.perf_counter() - started, None, None
            outcome = await judged(judge, answer)
        if isinstance(answer, Response):
            status, request_id = answer.status, text_of(answer.headers.get("x-request-id"))
        from_api = is_from_api(kind, answer, proved=self._proved)
        self._proved |= bool(from_api) and kind in ("submit", "query")
        self.answering = self.answering if from_api is None else from_api
        if (refusal := refusal_of(answer)) is not None:
            self.on_refused(kind, refusal)
        if self._on_call is not None:
            word = OUTCOME_NAMES.get(type(outcome), "no_answer")
            self._on_call(UpstreamCall(kind, status, word, seconds, request_id))
        return outcome
