"""Proof that nothing was connected to: listeners that count who comes, and the interpreter's own
word on every `connect`.
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

    sys.addaudithook(hear)  # for good: no hook can be taken away


@contextmanager
def connects() -> Iterator[set[Place]]:
    """Every address and port that this process connects to meanwhile, whether somebody listens
    there or not.
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
    """One port of this machine, by every address of its own that it has."""

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
        ):  # not every machine has them; `connects` sees those connections all the same
            listeners.append(await asyncio.start_server(came, address, made.port))
    try:
        yield made
    finally:
        for listener in listeners:
            listener.close()
            await listener.wait_closed()
