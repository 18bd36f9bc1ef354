"""The upstream's callbacks: token first, then the body, then one commit (contract section 4).

An ASGI class, not an endpoint function: this route takes bursts, and its answer is bytes made
beforehand. Its address is open to the internet: what has no token costs next to nothing, and a
flood of it waits at a turnstile while callbacks pass.
"""

import asyncio
import json
import math
import time
from contextlib import suppress

import structlog
from starlette.types import Message, Receive, Scope, Send

from service.errors import StoreUnavailable
from service.resources import Resources
from service.tasks import callbacks
from service.web.context import Context
from service.web.error_responses import error_body
from service.web.middleware import CLOSE, SWALLOWED

log = structlog.get_logger()

MAX_BODY = 256 * 1024
BODY_S = 5.0
# for the rest of a body that is too large: most senders look for the answer when they have sent it
# all
SWALLOW_S = 1.0
SMALL = (
    16 * 1024
)  # comes along with its request; the server throws it away unread, and the connection lives on
TURNS_S, BURST, WAIT_S = 100, 100, 1.0
MOST_HELD = 256  # with up to 320 KiB each in the server's buffers: 80 MiB
JSON_TYPE = (b"content-type", b"application/json")
ANSWERS = {
    verdict: b'{"status":"%s"}' % verdict.encode()
    for verdict in ("accepted", "duplicate", "conflict", "unreadable", "unknown")
}
REFUSALS = {
    401: ("unauthorized", "the token is wrong"),
    408: ("timeout", "the body was not complete after 5 s"),
    413: ("body_too_large", f"a callback has at most {MAX_BODY} bytes"),
    503: ("unavailable", "the callback was not kept: send it again"),
}


class CallbackRoute:
    """`POST /callbacks/{upstream}/{task_id}/{token}`."""

    def __init__(self) -> None:
        self._turnstile = Turnstile()
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, path = scope["state"]["context"], scope["path_params"]
        resources, task_id = context.resources, path["task_id"]
        started = time.perf_counter()
        if not resources.keyring.callback_token_valid(path["upstream"], task_id, path["token"]):
            await self._turn_away(resources, started, scope, send)
            return
        with context.precedence.callback():
            await self._take(context, task_id, started, scope, receive, send)

    async def _turn_away(
        self, resources: Resources, started: float, scope: Scope, send: Send
    ) -> None:
        """The body is not read: behind a long one the connection ends."""
        resources.metrics.callbacks.labels("wrong_token").inc()
        wait, withheld = self._turnstile.turn(asyncio.get_running_loop().time())
        if withheld is not None:
            duration_ms = round((time.perf_counter() - started) * 1000, 1)
            log.warning(
                "callback.refused",
                reason="wrong_token",
                task_id=None,
                duration_ms=duration_ms,
                withheld=withheld,
            )
        long = long_body(scope)
        if wait and not (long and self._held >= MOST_HELD):
            self._held += long
            try:
                await asyncio.sleep(wait)
            finally:
                self._held -= long
        await refuse(scope, send, 401, *[CLOSE] * long)

    async def _take(
        self,
        context: Context,
        task_id: str,
        started: float,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        resources = context.resources
        try:
            body = await read_body(receive)
        except TimeoutError:
            callbacks.refused(resources, "incomplete", task_id, time.perf_counter() - started)
            await refuse(scope, send, 408)
            return
        if body is None:  # the sender left: it will come again
            callbacks.refused(resources, "disconnected", task_id, time.perf_counter() - started)
            return
        came = time.monotonic()
        try:
            async with context.precedence.turn(context.admission.refused):
                verdict = await callbacks.receive(
                    resources,
                    task_id,
                    body,
                    context.result_ttl_s,
                    came,
                    whole=len(body) <= MAX_BODY,
                )
        except StoreUnavailable:
            await refuse(scope, send, 503, (b"retry-after", b"1"))
            return
        if len(body) > MAX_BODY:
            await swallow(receive)
            await refuse(scope, send, 413)
        else:
            await respond(send, 200, ANSWERS[verdict.verdict])


class Turnstile:
    """Lets so many refusals a second through at once, after a quiet second twice as many; the
    others wait, a second at most.

    Whoever sends one after the other is slowed down by that, and callbacks find the processor free.
    """

    def __init__(self) -> None:
        self._free = self._told = -math.inf
        self._withheld = 0

    def turn(self, now: float) -> tuple[float, int | None]:
        """How long this one waits, and, if it deserves a line in the log, how many before it got
        none. `now` in seconds.
        """
        wait = max(0.0, self._free - now)
        if wait < WAIT_S:
            self._free = max(self._free, now - BURST / TURNS_S) + 1 / TURNS_S
        if wait and now - self._told < WAIT_S:
            self._withheld += 1
            return min(wait, WAIT_S), None
        told, self._told, self._withheld = self._withheld, now, 0
        return min(wait, WAIT_S), told


def long_body(scope: Scope) -> bool:
    """Whether more is announced than comes along with a request: much, no telling how much, or what
    waits to be asked for.
    """
    headers = dict(scope["headers"])
    return (
        b"transfer-encoding" in headers
        or b"expect" in headers
        or int(headers.get(b"content-length", 0)) > SMALL
    )


async def swallow(receive: Receive) -> None:
    """What is left of a body, within limits."""
    left = SWALLOWED
    with suppress(TimeoutError):
        async with asyncio.timeout(SWALLOW_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b"")) if message.get("more_body") else left


async def read_body(receive: Receive) -> bytes | None:
    """The whole body, or as soon as it is over the limit what came so far; None: the sender left.
    TimeoutError after 5 s.
    """
    body = bytearray()
    async with asyncio.timeout(BODY_S):
        while True:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > MAX_BODY or not message.get("more_body", False):
                return bytes(body)


async def refuse(scope: Scope, send: Send, status: int, *headers: tuple[bytes, bytes]) -> None:
    await respond(
        send,
        status,
        json.dumps(error_body(status, *REFUSALS[status], scope["request_id"])).encode(),
        *headers,
    )


async def respond(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send(
        {"type": "http.response.start", "status": status, "headers": [JSON_TYPE, length, *headers]}
    )
    await send({"type": "http.response.body", "body": body})
