"""Sending callbacks as the upstream says it does: POST, 10 s for an answer, any 2xx is success, at
most 3 retries, after 1, 2 and 4 s.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from service.errors import EgressError
from service.net import Egress
from service.upstreams.sandbox.faults import Waves


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt at a callback: when (Unix seconds), and the status it brought or what went
    wrong.
    """

    at: float
    status: int | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Sends callbacks; `delays` and `timeout` in seconds, `clock` gives Unix seconds."""

    egress: Egress
    timeout: float
    delays: Sequence[float]
    clock: Callable[[], float]

    async def send(
        self, url: str, waves: Waves, record: Callable[[Call], None], slow: float = 0
    ) -> None:
        """All of them: the waves one after another, those of a wave at once. Every attempt is
        recorded when it ends.

        `slow`: seconds over which each body comes.
        """
        for wave in waves:
            async with asyncio.TaskGroup() as group:
                for body in wave:
                    group.create_task(self._insist(url, body, record, slow))

    async def _insist(
        self, url: str, body: bytes, record: Callable[[Call], None], slow: float
    ) -> None:
        for wait in (0, *self.delays):
            await asyncio.sleep(wait)
            call = await self._attempt(url, body, slow)
            record(call)
            if call.status is not None and 200 <= call.status < 300:
                return

    async def _attempt(self, url: str, body: bytes, slow: float) -> Call:
        at, content = self.clock(), dribbled(body, slow) if slow else body
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        try:
            response = await self.egress.request(
                "POST",
                url,
                headers=headers,
                content=content,
                timeout=self.timeout + slow,
                max_bytes=1 << 16,
            )
        except EgressError as error:
            return Call(at, None, f"{type(error).__name__}: {error}")
        return Call(at, response.status)


async def dribbled(body: bytes, seconds: float) -> AsyncIterator[bytes]:
    """A byte at a time, the first at once."""
    for at in range(len(body)):
        yield body[at : at + 1]
        await asyncio.sleep(seconds / len(body))
