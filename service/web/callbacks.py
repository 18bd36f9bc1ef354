"""The upstream's callbacks: token first, then the body, then one commit (contract section 4).

An ASGI class, not an endpoint function: this route takes bursts, and its answer is bytes made beforehand.
"""

import asyncio
import json
import time

from starlette.types import Message, Receive, Scope, Send

from service.errors import StoreUnavailable
from service.pipeline.inbox import receive as take
from service.pipeline.inbox import refused
from service.web.context import Context
from service.web.errors import error_body

MAX_BODY = 256 * 1024
BODY_S = 5.0
JSON_TYPE = (b"content-type", b"application/json")
ANSWERS = {verdict: b'{"status":"%s"}' % verdict.encode() for verdict in ("accepted", "duplicate", "conflict", "unreadable", "unknown")}
REFUSALS = {
    401: ("unauthorized", "the token is wrong"),
    408: ("timeout", "the body was not complete after 5 s"),
    413: ("body_too_large", f"a callback has at most {MAX_BODY} bytes"),
    503: ("unavailable", "the callback was not kept: send it again"),
}


class CallbackRoute:
    """`POST /callbacks/{upstream}/{task_id}/{token}`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, path = scope["state"]["context"], scope["path_params"]
        resources, task_id = context.resources, path["task_id"]
        started = time.perf_counter()
        if not resources.keyring.callback_token_valid(path["upstream"], task_id, path["token"]):
            refused(resources, "wrong_token", None, time.perf_counter() - started)
            await refuse(scope, send, 401)
            return
        with context.precedence.callback():
            await self._take(context, task_id, started, scope, receive, send)

    async def _take(self, context: Context, task_id: str, started: float, scope: Scope, receive: Receive, send: Send) -> None:
        resources = context.resources
        try:
            body = await read_body(receive)
        except TimeoutError:
            refused(resources, "incomplete", task_id, time.perf_counter() - started)
            await refuse(scope, send, 408)
            return
        if body is None:  # the sender left: it will come again
            refused(resources, "disconnected", task_id, time.perf_counter() - started)
            return
        try:
            verdict = await take(resources, task_id, body, context.result_ttl_s, whole=len(body) <= MAX_BODY)
        except StoreUnavailable:
            await refuse(scope, send, 503, (b"retry-after", b"1"))
            return
        if len(body) > MAX_BODY:
            await refuse(scope, send, 413)
        else:
            await respond(send, 200, ANSWERS[verdict.verdict])


async def read_body(receive: Receive) -> bytes | None:
    """The whole body, or as soon as it is over the limit what came so far; None: the sender left. TimeoutError after 5 s."""
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
    await respond(send, status, json.dumps(error_body(status, *REFUSALS[status], scope["request_id"])).encode(), *headers)


async def respond(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [JSON_TYPE, length, *headers]})
    await send({"type": "http.response.body", "body": body})
