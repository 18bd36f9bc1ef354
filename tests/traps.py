"""Proof that a process made no connection: listeners that count connections, and the interpreter's
audit event of every `connect`.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache

Place = tuple[str, int]
_trails: list[set[Place]] = []


@cache
def _watch() -> None:
    def hear(event: str, details: tuple[object, ...]) -> None:
        if event == "socket.connect" and _trails and isinstance(details[1], tuple):
            for trail in _trails:
                trail.add(details[1][:2])

    sys.addaudithook(hear)  # Python cannot remove an audit hook


@contextmanager
def connects() -> Iterator[set[Place]]:
    """Every address and port that this process connects to during the block, with or without a
    listener there.
    """
    _watch()
    trail: set[Place] = set()
    _trails.append(trail)
    try:
        yield trail
    finally:
        _trails[:] = [each for each in _trails if each is not trail]


@dataclass(slots=True)
class Trap:
    """One port on several local addresses of this machine."""

    port: int = 0
    connections: int = 0


@asynccontextmanager
async def trap() -> AsyncIterator[Trap]:
    made = Trap()

    def came(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.connections += 1
        writer.close()

    listeners = [await asyncio.start_server(came, "127.0.0.1", 0)]
    made.port = listeners[0].sockets[0].getsockname()[1]
    for address in ("127.0.0.2", "::1"):
        with suppress(
            OSError
        ):  # a machine may lack the address, but `connects` still sees the connection
            listeners.append(await asyncio.start_server(came, address, made.port))
    try:
        yield made
    finally:
        for listener in listeners:
            listener.close()
            await listener.wait_closed()
