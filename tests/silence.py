"""A server that accepts connections and never answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def silence() -> AsyncIterator[tuple[str, set[Any]]]:
    """The address of a server that never answers, and its open connections."""
    held: set[Any] = set()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.add(writer)
        await reader.read()
        held.discard(writer)
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", held
    finally:
        server.close()
        for writer in list(held):
            writer.close()
