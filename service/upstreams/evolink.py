"""The adapter of EvoLink's image API. `verdicts` has the outcomes that its answers prove."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from service.errors import EgressError
from service.net.egress_client import Egress
from service.net.responses import Response
from service.upstreams.base import (
    OUTCOME_NAMES,
    NoAnswer,
    QueryOutcome,
    Report,
    SubmitOutcome,
    UpstreamCall,
)
from service.upstreams.large_answers import LargeAnswers, judged
from service.upstreams.lenient import USUAL_BYTES, text_of
from service.upstreams.reports import inline_content, parse_task
from service.upstreams.verdicts import (
    classify_query,
    classify_submit,
    is_from_api,
    refusal_of,
    unanswered_submit,
    why,
)

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
        def judge(answer: Response) -> QueryOutcome:
            now = self._now()
            return classify_query(answer.status, answer.headers, answer.body, now, upstream_id)

        return await self._ask(upstream_id, judge)

    async def inline_result(self, upstream_id: str, link: str) -> bytes | NoAnswer | None:
        def judge(answer: Response) -> bytes | NoAnswer | None:
            if not 200 <= answer.status < 300:
                return NoAnswer(f"{answer.status}")
            return inline_content(answer.body, link)

        return await self._ask(upstream_id, judge)

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

    async def _ask(
        self, upstream_id: str, judge: Callable[[Response], Outcome]
    ) -> Outcome | NoAnswer:
        """Queries the task. Without a response there is none to judge."""
        path, timeout = f"/v1/tasks/{quote(upstream_id, safe='')}", self._query_timeout

        def outcome(answer: Response | EgressError) -> Outcome | NoAnswer:
            return NoAnswer(why(answer)) if isinstance(answer, EgressError) else judge(answer)

        return await self._call("query", "GET", path, timeout, outcome)

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
