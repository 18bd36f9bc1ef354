"""The sandbox's routes: the upstream's wire format over HTTP."""

import asyncio
import hmac
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import ApiError, EgressRefused, NotConnected
from service.net import Egress, Rules
from service.upstreams.sandbox.answers import HTTP_ERRORS, Answer, error_answer, json_answer
from service.upstreams.sandbox.callback_sender import Caller
from service.upstreams.sandbox.checks import (
    MAX_BODY,
    MODELS,
    invalid,
    read_body,
    read_key,
    read_order,
)
from service.upstreams.sandbox.faults import (
    FAULTS,
    Asked,
    Faults,
    check_shares,
    read_faults,
    struck,
)
from service.upstreams.sandbox.lifecycle import (
    Ledger,
    SandboxTask,
    digest_of,
    document,
    live,
    number,
    submitted,
)
from service.upstreams.sandbox.options import SandboxOptions
from service.upstreams.sandbox.renderer import FORMATS, draw
from service.upstreams.sandbox.sent import Sent

# a callback's name that cannot be looked up in time is taken; the call itself is judged again
LOOKUP_S = 3.0


def create_sandbox(options: SandboxOptions, clock: Callable[[], float] = time.time) -> Starlette:
    """The emulator as an ASGI application; `clock` gives Unix seconds. ValueError for a default
    fault or a share that cannot be.

    Its lifespan holds the running tasks: at its end they stop where they are, and callbacks not yet
    sent are lost, as upstream.
    """
    sandbox = Sandbox(options, clock)
    return Starlette(
        routes=[
            Route("/v1/images/generations", sandbox.submit, methods=["POST"]),
            Route("/v1/tasks/{task_id}", sandbox.query),
            Route("/v1/credits", sandbox.credits),
            Route("/v1/models", sandbox.models),
            Route("/files/{task_id}/{name}", sandbox.file),
            Route("/moved/{task_id}/{name}", sandbox.file),
            Route("/sandbox/tasks", sandbox.tasks),
        ],
        exception_handlers={ApiError: refused, HTTPException: refused},
        lifespan=sandbox.lifespan,
    )


class Sandbox:
    """What the routes share: the ledger, the sender of callbacks, and the tasks that are
    running.
    """

    def __init__(self, options: SandboxOptions, clock: Callable[[], float]) -> None:
        check_shares(options.shares, read_faults(None, options.faults))
        self.options = options
        self.ledger = Ledger(options, clock)
        self.egress = Egress(Rules("sandbox", networks=options.networks))
        self.caller = Caller(
            self.egress, options.callback_timeout_s, options.callback_delays_s, clock
        )
        self.running: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self.egress:
            yield
            for life in self.running:
                life.cancel()
            await asyncio.gather(*self.running, return_exceptions=True)

    async def submit(self, request: Request) -> Response:
        """`POST /v1/images/generations`: 200 with the pending task; every refusal is the documented
        error.
        """
        self._authorise(request)
        key = read_key(request.headers.get("idempotency-key"))
        body = read_body(await read_whole(request))
        digest, lot = digest_of(body), self.ledger.lot(key, body)
        try:
            faults = read_faults(
                body.get("sandbox"), struck(self.options.faults, self.options.shares, lot)
            )
        except ValueError as wrong:
            raise invalid("sandbox", str(wrong)) from None
        if (instead := self._refusal(faults, key or digest)) is not None:
            return Sent(replace(instead, wait=faults.get("submit_delay", 0)))
        order = read_order(body)
        await self._check_callback(order.callback_url)
        if (known := self.ledger.replayed(key, digest)) is not None:
            return Sent(
                json_answer(
                    200, submitted(known, self.options.delay_s), {"idempotency-replayed": "true"}
                )
            )
        base_url = self.options.base_url or str(request.base_url)
        task = self.ledger.create(order, faults, base_url.rstrip("/"), lot, key, digest)
        self._start(live(task, self.ledger, self.caller, self.options.delay_s))
        answer = json_answer(200, submitted(task, self.options.delay_s))
        for name, value in faults.items():
            if (change := FAULTS[name].answer) is not None:
                answer = change(value, answer)
        if faults.get("callback_first"):
            await task.called.wait()
        return Sent(answer)

    async def query(self, request: Request) -> Response:
        """`GET /v1/tasks/{id}`: the task as it is now."""
        self._authorise(request)
        task = self.ledger.find(request.path_params["task_id"])
        answer, asked = json_answer(200, document(task)), counted(task, request)
        for name, value in task.faults.items():
            if (change := FAULTS[name].query) is not None and asked.before < task.faults.get(
                "query_times", math.inf
            ):
                answer = change(value, asked, answer)
        return Sent(answer)

    async def credits(self, request: Request) -> Response:
        self._authorise(request)
        left = number(self.ledger.credits)
        data = {
            "token": {"remaining_credits": left, "unlimited_credits": False},
            "user": {"remaining_credits": left},
        }
        return Sent(json_answer(200, {"success": True, "data": data}))

    async def models(self, request: Request) -> Response:
        self._authorise(request)
        data = [{"id": name, "object": "model", "owned_by": "sandbox"} for name in MODELS]
        return Sent(json_answer(200, {"object": "list", "data": data}))

    async def file(self, request: Request) -> Response:
        """A result, drawn when it is asked for; 404 once its link is dead. No key is wanted, as on
        a content delivery network.
        """
        task, index = self._result(request.path_params["task_id"], request.path_params["name"])
        asked = counted(task, request)

        def made() -> Answer:
            order, type = task.order, FORMATS[task.format]
            answer = Answer(
                200,
                draw(f"{task.id}/{index}", order.prompt, order.width, order.height, task.format),
                {"content-type": type},
            )
            for name, value in task.faults.items():
                if (change := FAULTS[name].file) is not None and asked.before < task.faults.get(
                    "file_times", math.inf
                ):
                    answer = change(value, asked, answer)
            return ranged(answer, request.headers.get("range", ""))

        return Sent(await asyncio.to_thread(made))

    async def tasks(self, request: Request) -> Response:
        """`GET /sandbox/tasks`: what really happened, for whoever tests against the sandbox;
        nothing of the kind exists upstream.
        """
        self._authorise(request)
        data = [
            document(task)
            | {"idempotency_key": task.key, "callbacks": [asdict(call) for call in task.calls]}
            for task in self.ledger.all()
        ]
        return Sent(json_answer(200, {"data": data}))

    def _authorise(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        wanted = self.options.api_key
        right = (
            bool(key.strip())
            if wanted is None
            else hmac.compare_digest(key.strip().encode(), wanted.encode())
        )
        if scheme.lower() != "bearer" or not right:
            raise ApiError(401, "unauthorized", "the API key is missing or wrong")

    def _refusal(self, faults: Faults, submission: str) -> Answer | None:
        for name, value in faults.items():
            if (refuse := FAULTS[name].refuse) is not None:
                before = self.ledger.submissions[f"{name}/{submission}"]
                self.ledger.submissions[f"{name}/{submission}"] += 1
                if (answer := refuse(value, before)) is not None:
                    return answer
        return None

    async def _check_callback(self, url: str | None) -> None:
        """400 unless a callback may go there: public and https, or inside the allowed networks."""
        if url is None:
            return
        try:
            async with asyncio.timeout(LOOKUP_S):
                await self.egress.check(url)
        except EgressRefused as reason:
            raise invalid(
                "callback_url", f"callback_url must be a public https address: {reason}"
            ) from None
        except (NotConnected, TimeoutError):
            return

    def _start(self, life: Coroutine[None, None, None]) -> None:
        running = asyncio.create_task(life)
        self.running.add(running)
        running.add_done_callback(self.running.discard)

    def _result(self, task_id: str, name: str) -> tuple[SandboxTask, int]:
        task = self.ledger.find(task_id)
        names = [f"{index}.{task.format}" for index in range(task.outcome.images)]
        ttl = task.faults.get("link_ttl", self.options.result_ttl_s)
        if name not in names or task.ended is None or self.ledger.clock() >= task.ended + ttl:
            raise ApiError(404, "not_found", "the file does not exist or has expired")
        return task, names.index(name)


def counted(task: SandboxTask, request: Request) -> Asked:
    """What a query or a file's request is to its faults, from now on one more."""
    path = request.url.path
    task.asked[path] += 1
    return Asked(task.asked[path] - 1, path)


def ranged(answer: Answer, wanted: str) -> Answer:
    """What an answer sends from a byte on, if no more is wanted, as a content delivery network
    does; other ranges are ignored.
    """
    size, match = len(answer.body), re.fullmatch(r"bytes=([0-9]{1,18})-", wanted)
    if answer.status != 200 or match is None:
        return answer
    if (start := int(match[1])) >= size:
        return replace(answer, status=416, body=b"", headers={"content-range": f"bytes */{size}"})
    headers = {**answer.headers, "content-range": f"bytes {start}-{size - 1}/{size}"}
    return replace(answer, status=206, body=answer.body[start:], headers=headers)


async def read_whole(request: Request) -> bytes:
    """The body; 413 over `MAX_BODY` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise ApiError(413, "request_too_large", f"the body has more than {MAX_BODY} bytes")
    return bytes(body)


async def refused(_: Request, error: Exception) -> Response:
    """The documented error for a refusal of ours or of the router."""
    if isinstance(error, ApiError):
        return Sent(error_answer(error.status, error.code, error.message, error.param))
    status = error.status_code if isinstance(error, HTTPException) else 500
    answer = error_answer(
        status,
        HTTP_ERRORS.get(status, "invalid_request"),
        getattr(error, "detail", "internal error"),
    )
    return Sent(
        replace(answer, headers={**answer.headers, **(getattr(error, "headers", None) or {})})
    )
