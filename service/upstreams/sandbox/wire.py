"""Sends an `Answer`, even if it breaks the rules of HTTP."""

import asyncio
from operator import attrgetter

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.upstreams.sandbox.answers import Answer

LINGER_S = 60.0  # how long a slow client may read before the connection ends


class AnswerResponse(Response):
    """An `Answer` as a response of Starlette."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._announced = max(0, len(answer.body) + answer.excess)
        headers = {**answer.headers, "content-length": str(self._announced)}
        super().__init__(answer.body, answer.status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer, announced = self._answer, self._announced
        if answer.wait and await disconnected(receive, answer.wait):
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
            if await disconnected(receive, answer.stall):
                return
            body, announced = body[len(first) :], announced - len(first)
        honest = len(body) == announced or scope["method"] == "HEAD"
        await send(
            {"type": "http.response.body", "body": body[:announced], "more_body": not honest}
        )
        if not honest:
            await hang_up(receive, body[announced:])


async def disconnected(receive: Receive, seconds: float) -> bool:
    """Waits, and returns True as soon as the client disconnects, so that a stop need not wait."""
    try:
        async with asyncio.timeout(seconds):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return False
    return True


async def hang_up(receive: Receive, last: bytes = b"") -> None:
    """Writes `last` and ends the connection on uvicorn's transport. ASGI cannot do that."""
    transport: asyncio.Transport = attrgetter("__self__.transport")(receive)
    if not transport.is_closing():
        transport.write(last)
        transport.close()
    await disconnected(receive, LINGER_S)
