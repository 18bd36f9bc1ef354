"""Reads responses of an upstream, of which a few hold whole images."""

import asyncio
import mmap
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TypeVar, cast

from service.errors import ConnectionLost, EgressError
from service.net.egress_client import Egress
from service.net.responses import Response, Streamed
from service.strict_json import LARGE
from service.upstreams.lenient import USUAL_BYTES, readable

Outcome = TypeVar("Outcome")


class LargeAnswers:
    """A body over `USUAL_BYTES`, of at most `most` bytes, goes to a file in `folder` while it
    arrives, so a slow one holds nothing that another call needs. Only one file is parsed at a time,
    and only one of its images is in memory. A response that is not 2xx is never that large.
    """

    def __init__(self, egress: Egress, most: int, folder: Path | None = None) -> None:
        self._egress = egress
        self._most = most
        self._folder = folder
        self._slot = asyncio.Lock()

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
        A large body has the only slot until the caller leaves the context.
        """
        answer: Response | EgressError
        folder = None if self._folder is None else str(self._folder)
        file = SpooledTemporaryFile(USUAL_BYTES, dir=folder)  # noqa: SIM115 - the stack closes it
        async with AsyncExitStack() as stack:
            stack.callback(file.close)
            try:
                sending = self._egress.stream(
                    method, url, headers=headers, content=content, timeout=timeout
                )
                async with sending as streamed:
                    most = self._most if large and 200 <= streamed.status < 300 else USUAL_BYTES
                    sent = await _read(streamed, most, file)
                if file.tell() > USUAL_BYTES:
                    await stack.enter_async_context(self._slot)
                    sent = replace(sent, body=_mapped(file, most))
                answer = await self._readable(sent, most, stack)
            except EgressError as error:
                answer = error
            except OSError as error:
                answer = ConnectionLost(f"the disk takes no large answer: {error.strerror}")
            yield answer

    async def _readable(
        self, sent: Response, most: int, stack: AsyncExitStack
    ) -> Response | EgressError:
        if len(sent.body) > USUAL_BYTES:
            return await asyncio.to_thread(readable, sent, most)
        answer = readable(sent, USUAL_BYTES)
        if isinstance(answer, EgressError) or not min(most, len(answer.body)) > USUAL_BYTES:
            return answer
        await stack.enter_async_context(self._slot)  # it was compressed
        return await asyncio.to_thread(readable, sent, most)


async def _read(streamed: Streamed, most: int, file: SpooledTemporaryFile[bytes]) -> Response:
    """The response. Its body, or the part that came before it broke off, is in the file."""
    failure, size = None, 0
    async with aclosing(streamed.chunks()) as chunks:
        try:
            async for chunk in chunks:
                size += len(chunk)
                if size > USUAL_BYTES:
                    await asyncio.to_thread(file.write, chunk)
                else:
                    file.write(chunk)
                if size > most:
                    break
        except EgressError as error:
            failure = error
    body = b""
    if size <= USUAL_BYTES or most <= USUAL_BYTES:
        file.seek(0)
        body = file.read(most)
    return Response(streamed.status, streamed.headers, body, 0.0, failure)


def _mapped(file: SpooledTemporaryFile[bytes], most: int) -> bytes:
    """What the file holds, without a copy in memory. It has the operations of bytes that readers of
    large bodies use: slices and regular expressions.
    """
    size = min(file.tell(), most)
    file.flush()
    return cast(bytes, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


async def judged(
    judge: Callable[[Response | EgressError], Outcome], answer: Response | EgressError
) -> Outcome:
    """The outcome that the response proves. A large body is parsed in a thread."""
    if isinstance(answer, Response) and len(answer.body) > LARGE:
        return await asyncio.to_thread(judge, answer)
    return judge(answer)
