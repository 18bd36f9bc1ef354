"""The upstream's callbacks: first the token, then the body, then one commit (docs/callbacks.md).

The route is an ASGI class instead of an endpoint function, because it takes bursts and its answers
are prepared bytes. Its address is open to the internet. A request with a wrong token costs next to
nothing, and a token bucket delays a flood of them.
"""

import asyncio
import json
import time
from contextlib import suppress

import structlog
from starlette.types import Message, Receive, Scope, Send

from service.errors import StoreUnavailable
from service.resources import Resources
from service.tasks.inbox_worker import MAX_BODY, refused
from service.web.context import Context
from service.web.error_responses import error_body
from service.web.middleware import CLOSE, MAX_DISCARDED
from service.web.overload import MAX_QUEUED, LogSampler, TokenBucket

log = structlog.get_logger()

BODY_S = 5.0
# For the rest of a body that is too large. Most senders read the answer after their whole body.
DISCARD_S = 1.0
# A body up to here arrives with its request. The server discards it, and the connection lives on.
SMALL_BODY = 16 * 1024
MAX_DELAYED_BODIES = 256  # up to 320 KiB each in the server's buffers, 80 MiB in all
JSON_TYPE, RETRY = (b"content-type", b"application/json"), (b"retry-after", b"1")
ACCEPTED = b'{"status":"accepted"}'
REFUSALS = {
    401: ("unauthorized", "the token is wrong"),
    408: ("timeout", "the body was not complete after 5 s"),
    413: ("body_too_large", f"a callback has at most {MAX_BODY} bytes"),
    503: ("unavailable", "the callback was not kept: send it again"),
}


class CallbackRoute:
    """`POST /callbacks/{upstream}/{task_id}/{token}`."""

    def __init__(self) -> None:
        self._bucket, self._sampler = TokenBucket(), LogSampler()
        self._delayed_bodies = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, path = time.monotonic(), scope["path_params"]
        context: Context = scope["state"]["context"]
        resources, upstream = context.resources, path["upstream"]
        valid = resources.keyring.callback_token_valid(upstream, path["task_id"], path["token"])
        if not valid or upstream not in resources.upstreams:
            await self._refuse_token(resources, started, scope, send)
            return
        with context.gate.callback():
            await self._take(context, started, scope, receive, send)

    async def _refuse_token(
        self, resources: Resources, started: float, scope: Scope, send: Send
    ) -> None:
        """Does not read the body. Behind a long one, the connection ends."""
        resources.metrics.callbacks.labels("wrong_token").inc()
        now = asyncio.get_running_loop().time()
        delay = self._bucket.delay(now)
        if (withheld := self._sampler.take(now, force=not delay)) is not None:
            duration_ms = round((time.monotonic() - started) * 1000, 1)
            figures = {"task_id": None, "duration_ms": duration_ms, "withheld": withheld}
            log.warning("callback.refused", reason="wrong_token", **figures)
        long = has_long_body(scope)
        if delay and not (long and self._delayed_bodies >= MAX_DELAYED_BODIES):
            self._delayed_bodies += long
            try:
                await asyncio.sleep(delay)
            finally:
                self._delayed_bodies -= long
        await refuse(scope, send, 401, *[CLOSE] * long)

    async def _take(
        self, context: Context, started: float, scope: Scope, receive: Receive, send: Send
    ) -> None:
        resources, path = context.resources, scope["path_params"]
        upstream, task_id = path["upstream"], path["task_id"]
        try:
            content = await read_body(receive)
        except TimeoutError:
            refused(resources, "incomplete", task_id, time.monotonic() - started)
            await refuse(scope, send, 408)
            return
        if content is None:  # the upstream disconnected, and will send it again
            refused(resources, "disconnected", task_id, time.monotonic() - started)
            return
        body, more = content
        if context.gate.queued_callbacks > MAX_QUEUED:
            context.shedder.callback_refused()
            await refuse(scope, send, 503, RETRY)
            return
        try:
            with context.gate.commit():
                await context.inbox.receive(upstream, task_id, body, time.monotonic())
        except StoreUnavailable:
            await refuse(scope, send, 503, RETRY)
            return
        if len(body) <= MAX_BODY:
            await respond(send, 200, ACCEPTED)
        else:
            if more:
                await discard(receive)
            await refuse(scope, send, 413)


def has_long_body(scope: Scope) -> bool:
    """Whether more of the body may follow than what arrives with the request."""
    headers = dict(scope["headers"])
    unknown = b"transfer-encoding" in headers or b"expect" in headers
    return unknown or int(headers.get(b"content-length", 0)) > SMALL_BODY


async def discard(receive: Receive) -> None:
    """Reads the rest of a body, within limits."""
    left = MAX_DISCARDED
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b"")) if message.get("more_body") else left


async def read_body(receive: Receive) -> tuple[bytes, bool] | None:
    """The whole body, or its beginning once it is over the limit, and whether more of it follows.
    None: the client disconnected. Raises TimeoutError after 5 s.
    """
    body = bytearray()
    async with asyncio.timeout(BODY_S):
        while True:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY or not more:
                return bytes(body), more


async def refuse(scope: Scope, send: Send, status: int, *headers: tuple[bytes, bytes]) -> None:
    error = error_body(status, *REFUSALS[status], scope["request_id"])
    await respond(send, status, json.dumps(error).encode(), *headers)


async def respond(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    headers = (JSON_TYPE, (b"content-length", str(len(body)).encode()), *headers)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
