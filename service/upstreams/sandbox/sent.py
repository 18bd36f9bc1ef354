"""Sending an `Answer`, also one that keeps to no rule of HTTP."""

import asyncio
from operator import attrgetter

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.upstreams.sandbox.answers import Answer

LINGER_S = 60.0  # for a client that does not take what it was sent before the connection ends


class Sent(Response):
    """An `Answer` on its way out."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._announced = max(0, len(answer.body) + answer.excess)
        super().__init__(
            answer.body, answer.status, {**answer.headers, "content-length": str(self._announced)}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer, announced = self._answer, self._announced
        if answer.wait and await left(receive, answer.wait):
            return
        if answer.lost:
            await hang_up(receive)
            return
        body = answer.body[: answer.cut]
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        if answer.stall:
            first = body[: min(len(body) // 2, announced)]
            await send({"type": "http.response.body", "body": first, "more_body": True})
            if await left(receive, answer.stall):
                return
            body, announced = body[len(first) :], announced - len(first)
        honest = len(body) == announced or scope["method"] == "HEAD"
        await send(
            {"type": "http.response.body", "body": body[:announced], "more_body": not honest}
        )
        if not honest:
            await hang_up(receive, body[announced:])


async def left(receive: Receive, seconds: float) -> bool:
    """Wait; True as soon as the client has left, so that nobody's stop waits for an answer nobody
    reads.
    """
    try:
        async with asyncio.timeout(seconds):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return False
    return True


async def hang_up(receive: Receive, last: bytes = b"") -> None:
    """End the connection once `last` is written. Uvicorn's own transport is taken: ASGI has no way
    to break its rules.
    """
    transport: asyncio.Transport = attrgetter("__self__.transport")(receive)
    if not transport.is_closing():
        transport.write(last)
        transport.close()
    await left(receive, LINGER_S)
