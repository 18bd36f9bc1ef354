"""Reads responses of an upstream, of which a few hold whole images."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TypeVar

from service.errors import EgressError
from service.net import Egress, Response, Streamed
from service.upstreams.lenient import readable

USUAL_BYTES = 1 << 20
Outcome = TypeVar("Outcome")


class LargeAnswers:
    """Only one body over `USUAL_BYTES` is in memory at a time, of at most `most` bytes."""

    def __init__(self, egress: Egress, most: int) -> None:
        self._egress = egress
        self._most = most
        self._place = asyncio.Lock()

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes | None,
        timeout: float,
    ) -> AsyncGenerator[Response | EgressError, None]:
        """The readable response, or the error that came instead. A large body has the only place
        until the caller leaves the context.
        """
        answer: Response | EgressError
        async with AsyncExitStack() as stack:
            try:
                sending = self._egress.stream(
                    method, url, headers=headers, content=content, timeout=timeout
                )
                async with sending as streamed:
                    sent = await self._read(streamed, stack)
                large = len(sent.body) > USUAL_BYTES
                answer = sent if large else readable(sent, USUAL_BYTES)
                if not large and isinstance(answer, Response) and len(answer.body) > USUAL_BYTES:
                    await stack.enter_async_context(self._place)  # it was compressed
                    large = True
                if large:
                    answer = await asyncio.to_thread(readable, sent, self._most)
            except EgressError as error:
                answer = error
            yield answer

    async def _read(self, streamed: Streamed, stack: AsyncExitStack) -> Response:
        """The response with its body, or with the part that came before it broke off."""
        body, failure = bytearray(), None
        async with aclosing(streamed.chunks()) as chunks:
            try:
                async for chunk in chunks:
                    if len(body) <= USUAL_BYTES < len(body) + len(chunk):
                        await stack.enter_async_context(self._place)
                    body += chunk
                    if len(body) > self._most:
                        break
            except EgressError as error:
                failure = error
        cut = len(body) > self._most
        del body[self._most :]
        return Response(streamed.status, streamed.headers, bytes(body), cut, 0.0, failure)


async def judged(
    judge: Callable[[Response | EgressError], Outcome], answer: Response | EgressError
) -> Outcome:
    """The outcome that the response proves. A large body is parsed in a thread."""
    if isinstance(answer, Response) and len(answer.body) > USUAL_BYTES:
        return await asyncio.to_thread(judge, answer)
    return judge(answer)
