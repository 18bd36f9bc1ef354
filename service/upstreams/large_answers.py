"""Reads responses of an upstream, of which a few hold whole images."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TypeVar

from service.errors import EgressError
from service.net import Egress, Response, Streamed
from service.strict_json import LARGE
from service.upstreams.lenient import USUAL_BYTES, readable

Outcome = TypeVar("Outcome")


class LargeAnswers:
    """Only one body over `USUAL_BYTES` is in memory at a time, of at most `most` bytes. A response
    that is not 2xx is never that large.
    """

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
        *,
        large: bool,
    ) -> AsyncGenerator[Response | EgressError, None]:
        """The readable response, or the error that came instead. Only with `large` its body may be.
        A large body has the only place until the caller leaves the context.
        """
        answer: Response | EgressError
        async with AsyncExitStack() as stack:
            try:
                sending = self._egress.stream(
                    method, url, headers=headers, content=content, timeout=timeout
                )
                async with sending as streamed:
                    most = self._most if large and 200 <= streamed.status < 300 else USUAL_BYTES
                    sent = await self._read(streamed, most, stack)
                answer = await self._readable(sent, most, stack)
            except EgressError as error:
                answer = error
            yield answer

    async def _read(self, streamed: Streamed, most: int, stack: AsyncExitStack) -> Response:
        """The response with its body, or with the part that came before it broke off."""
        body, failure = bytearray(), None
        async with aclosing(streamed.chunks()) as chunks:
            try:
                async for chunk in chunks:
                    if len(body) <= USUAL_BYTES < min(most, len(body) + len(chunk)):
                        await stack.enter_async_context(self._place)
                    body += chunk
                    if len(body) > most:
                        break
            except EgressError as error:
                failure = error
        cut = len(body) > most
        del body[most:]
        return Response(streamed.status, streamed.headers, bytes(body), cut, 0.0, failure)

    async def _readable(
        self, sent: Response, most: int, stack: AsyncExitStack
    ) -> Response | EgressError:
        if len(sent.body) > USUAL_BYTES:
            return await asyncio.to_thread(readable, sent, most)
        answer = readable(sent, USUAL_BYTES)
        if isinstance(answer, EgressError) or not min(most, len(answer.body)) > USUAL_BYTES:
            return answer
        await stack.enter_async_context(self._place)  # it was compressed
        return await asyncio.to_thread(readable, sent, most)


async def judged(
    judge: Callable[[Response | EgressError], Outcome], answer: Response | EgressError
) -> Outcome:
    """The outcome that the response proves. A large body is parsed in a thread."""
    if isinstance(answer, Response) and len(answer.body) > LARGE:
        return await asyncio.to_thread(judge, answer)
    return judge(answer)
