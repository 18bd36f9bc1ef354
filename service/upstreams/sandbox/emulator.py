"""The sandbox's routes: the upstream's wire format over HTTP."""

import asyncio
import hmac
import math
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
from service.net.egress_client import Egress, Rules
from service.upstreams.catalogue_images import image_complaint
from service.upstreams.sandbox.answers import (
    HTTP_ERRORS,
    Answer,
    AnswerResponse,
    error_answer,
    json_answer,
)
from service.upstreams.sandbox.callback_sender import CallbackSender
from service.upstreams.sandbox.checks import (
    MAX_BODY,
    invalid,
    read_body,
    read_key,
    read_order,
    shaped_like,
)
from service.upstreams.sandbox.effects import CountedRequest
from service.upstreams.sandbox.faults import (
    FAULTS,
    Faults,
    applied,
    check_shares,
    drawn,
    read_faults,
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
from service.upstreams.sandbox.sandbox_files import SandboxFiles, file_routes

# The sandbox accepts a callback URL without its address after this time. Each attempt checks it.
LOOKUP_S = 3.0


def create_sandbox(options: SandboxOptions, clock: Callable[[], float] = time.time) -> Starlette:
    """The emulator as an ASGI application. `clock` returns Unix seconds.

    At the end of its lifespan tasks stop where they are, and callbacks not yet sent are lost.
    ValueError: a default fault or a share is wrong.
    """
    sandbox = Sandbox(options, clock)
    return Starlette(
        routes=[
            Route("/v1/images/generations", sandbox.submit, methods=["POST"]),
            Route("/v1/tasks/{task_id}", sandbox.query),
            Route("/v1/credits", sandbox.credits),
            Route("/v1/models", sandbox.models),
            *file_routes(sandbox.files),
            Route("/files/{task_id}/{name}", sandbox.file),
            Route("/moved/{task_id}/{name}", sandbox.file),
            Route("/sandbox/tasks", sandbox.tasks),
            Route("/sandbox/charges", sandbox.charges),
            Route("/sandbox/webhooks", webhooks, methods=["POST"]),
        ],
        exception_handlers={ApiError: refused, HTTPException: refused},
        lifespan=sandbox.lifespan,
    )


class Sandbox:
    """The routes and their state: the ledger, the sender of callbacks, the running tasks."""

    def __init__(self, options: SandboxOptions, clock: Callable[[], float]) -> None:
        check_shares(options.shares, read_faults(None, options.faults))
        self.options = options
        self.ledger = Ledger(options, clock)
        self.egress = Egress(Rules("sandbox", networks=options.networks))
        self.sender = CallbackSender(
            self.egress, options.callback_timeout_s, options.callback_delays_s, clock
        )
        links = Rules("inputs", networks=options.networks, redirects=5, upgrade=True)
        self.inputs = Egress(links)
        self.files = SandboxFiles(
            self._authorise,
            self.egress,
            self.inputs if options.fetch_inputs else None,
            clock,
            self._upload_faults,
            options.file_ttl_s,
        )
        self.running: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self.egress, self.inputs:
            yield
            for life in self.running:
                life.cancel()
            await asyncio.gather(*self.running, return_exceptions=True)

    async def submit(self, request: Request) -> Response:
        """`POST /v1/images/generations`: the pending task, or a documented error."""
        self._authorise(request)
        key = read_key(request.headers.get("idempotency-key"))
        body = read_body(await read_whole(request))
        digest, seed = digest_of(body), self.ledger.seed(key, body)
        defaults = drawn(self.options.faults, self.options.shares, seed)
        try:
            faults = read_faults(body.get("sandbox"), defaults)
        except ValueError as wrong:
            raise invalid("sandbox", str(wrong)) from None
        if (refusal := self._refusal(faults, key or digest)) is not None:
            return AnswerResponse(replace(refusal, wait=faults.get("submit_delay", 0)))
        order = read_order(body, self.options.catalogue)
        await self._check_callback(order.callback_url)
        inputs = await asyncio.gather(
            *(self.files.named(url, "image_urls") for url in order.image_urls)
        )
        if order.mask_url is not None:
            await self.files.named(order.mask_url, "mask_url")
        rule = self.options.catalogue.image_rule(order.model)
        for file in filter(None, inputs):
            if limit := image_complaint(rule, file):
                raise invalid("image_urls", f"image_urls: {limit}")
        if inputs and (last := inputs[-1]) is not None and not body.get("size"):
            order = shaped_like(order, last.width, last.height)
        delay = self.options.delay_s
        if (first := self.ledger.replayed(key, digest)) is not None:
            headers = {"idempotency-replayed": "true"}
            return AnswerResponse(json_answer(200, submitted(first, delay), headers))
        base_url = self.options.base_url or str(request.base_url)
        task = self.ledger.create(order, faults, base_url.rstrip("/"), seed, key, digest)
        self._start(live(task, self.ledger, self.sender, delay))
        answer = applied("answer", faults, json_answer(200, submitted(task, delay)))
        if faults.get("callback_first"):
            await task.called.wait()
        return AnswerResponse(answer)

    async def query(self, request: Request) -> Response:
        """`GET /v1/tasks/{id}`: the task as it is now."""
        self._authorise(request)
        task = self.ledger.find(request.path_params["task_id"])
        shown, counted = document(task, self.ledger.clock()), count(task, request)
        answer = json_answer(200, shown)
        if counted.before < task.faults.get("query_times", math.inf):
            answer = applied("query", task.faults, counted, answer)
        return AnswerResponse(answer)

    async def credits(self, request: Request) -> Response:
        self._authorise(request)
        left = number(self.ledger.credits)
        data = {
            "token": {"remaining_credits": left, "unlimited_credits": False},
            "user": {"remaining_credits": left},
        }
        return AnswerResponse(json_answer(200, {"success": True, "data": data}))

    async def models(self, request: Request) -> Response:
        self._authorise(request)
        names = self.options.catalogue.models
        data = [{"id": name, "object": "model", "owned_by": "sandbox"} for name in names]
        return AnswerResponse(json_answer(200, {"object": "list", "data": data}))

    async def file(self, request: Request) -> Response:
        """A result, drawn for each request. Like a content delivery network it wants no key."""
        task, index = self._result(request.path_params["task_id"], request.path_params["name"])
        counted, order = count(task, request), task.order

        def drawn_file() -> Answer:
            name = f"{task.id}/{index}"
            content = draw(name, order.prompt, order.width, order.height, task.format)
            answer = Answer(200, content, {"content-type": FORMATS[task.format]})
            if counted.before < task.faults.get("file_times", math.inf):
                answer = applied("file", task.faults, counted, answer)
            return answer

        return AnswerResponse(await asyncio.to_thread(drawn_file))

    async def charges(self, request: Request) -> Response:
        """`GET /sandbox/charges`: what every task cost. The upstream has no such path."""
        self._authorise(request)
        return AnswerResponse(json_answer(200, {"data": self.ledger.charges()}))

    async def tasks(self, request: Request) -> Response:
        """`GET /sandbox/tasks`: every task with its callbacks. No path of the upstream."""
        self._authorise(request)
        data = [
            document(task)
            | {"idempotency_key": task.key, "callbacks": [asdict(each) for each in task.attempts]}
            | {"image_urls": task.order.image_urls, "mask_url": task.order.mask_url}
            for task in self.ledger.all()
        ]
        return AnswerResponse(json_answer(200, {"data": data}))

    def _authorise(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key, expected = key.strip(), self.options.api_key
        right = bool(key)
        if expected is not None:
            right = hmac.compare_digest(key.encode(), expected.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(401, "unauthorized", "the API key is missing or wrong")

    def _upload_faults(self, asked: object, number: int) -> Faults:
        """The faults of an upload. ValueError says which is wrong."""
        seed = f"{self.options.seed}/upload/{number}"
        return read_faults(asked, drawn(self.options.faults, self.options.shares, seed))

    def _refusal(self, faults: Faults, submission: str) -> Answer | None:
        for name, value in faults.items():
            if (refuse := FAULTS[name].refuse) is not None:
                counter = f"{name}/{submission}"
                self.ledger.submissions[counter] += 1
                answer = refuse(value, self.ledger.submissions[counter] - 1)
                if answer is not None:
                    return answer
        return None

    async def _check_callback(self, url: str | None) -> None:
        """400 for an address that is not public https and not inside the allowed networks."""
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
        names = [f"{index}.{task.format}" for index in range(task.end.images)]
        ttl = task.faults.get("link_ttl", self.options.result_ttl_s)
        if name not in names or task.ended is None or self.ledger.clock() >= task.ended + ttl:
            raise ApiError(404, "not_found", "the file does not exist or has expired")
        return task, names.index(name)


async def webhooks(request: Request) -> Response:
    """`POST /sandbox/webhooks?status=410`: a subscriber that answers with this status, by default
    204. The upstream has no such path.
    """
    await read_whole(request)
    status = request.query_params.get("status", "204")
    if not (status.isascii() and status.isdecimal() and 200 <= int(status[:9]) <= 599):
        raise invalid("status", "status must be a number from 200 to 599")
    return Response(status_code=int(status))


def count(task: SandboxTask, request: Request) -> CountedRequest:
    path = request.url.path
    task.requests[path] += 1
    return CountedRequest(task.requests[path] - 1, path)


async def read_whole(request: Request) -> bytes:
    """The body, of at most `MAX_BODY` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise ApiError(413, "request_too_large", f"the body has more than {MAX_BODY} bytes")
    return bytes(body)


async def refused(_: Request, error: Exception) -> Response:
    """The documented error of the sandbox's own refusals and of the router's."""
    if isinstance(error, ApiError):
        return AnswerResponse(error_answer(error.status, error.code, error.message, error.param))
    status = error.status_code if isinstance(error, HTTPException) else 500
    code = HTTP_ERRORS.get(status, "invalid_request")
    message, headers = getattr(error, "detail", "internal error"), getattr(error, "headers", None)
    return AnswerResponse(error_answer(status, code, message, headers=headers))
