"""A port that stays the same while the processes behind it come and go."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from random import Random

from tests.servers import kept_port

CHUNK = 1 << 16


class Door:
    """A load balancer: it passes each connection to one of the ports `behind` that accepts it.
    While it is closed, the port refuses connections.
    """

    def __init__(self, behind: Sequence[int], random: Random, stack: AsyncExitStack) -> None:
        self.port = kept_port(stack)
        self._behind, self._random = behind, random
        self._server: asyncio.Server | None = None
        self._passing: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        stack.push_async_callback(self.close)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._enter, "127.0.0.1", self.port, backlog=1024)

    async def shut(self, seconds: float) -> None:
        """Refuses connections for a while. A second call waits for the first one to finish."""
        async with self._lock:
            await self.close()
            await asyncio.sleep(seconds)
            await self.open()

    async def close(self) -> None:
        """Stops listening and drops the open connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass(reader, writer))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            for port in self._random.sample(self._behind, len(self._behind)):
                with suppress(OSError):
                    answers, other = await asyncio.open_connection("127.0.0.1", port)
                    ends.append(other)
                    break
            else:
                return
            ways = {
                asyncio.create_task(pump(reader, other)),
                asyncio.create_task(pump(answers, writer)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except asyncio.CancelledError:
            for end in ends:
                end.transport.abort()
            raise
        finally:
            for end in ends:
                end.close()  # the data that was read is still sent


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(CHUNK):
            writer.write(chunk)
            await writer.drain()
