"""Sends callbacks as the upstream documents it: POST, 10 s for a response, any 2xx is success, at
most 3 retries after 1, 2 and 4 s.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from service.errors import EgressError
from service.net.egress_client import Egress
from service.upstreams.sandbox.faults import Waves


@dataclass(frozen=True, slots=True)
class CallbackAttempt:
    """One attempt: its time in Unix seconds, and the response's status or the problem."""

    at: float
    status: int | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class CallbackSender:
    """`delays` and `timeout` are seconds. `clock` returns Unix seconds."""

    egress: Egress
    timeout: float
    delays: Sequence[float]
    clock: Callable[[], float]

    async def send(
        self, url: str, waves: Waves, record: Callable[[CallbackAttempt], None], slow: float = 0
    ) -> None:
        """Sends the waves one after another, and the bodies of a wave at once.

        Every attempt is recorded when it ends. Each body takes `slow` seconds.
        """
        for wave in waves:
            async with asyncio.TaskGroup() as group:
                for body in wave:
                    group.create_task(self._deliver(url, body, record, slow))

    async def _deliver(
        self, url: str, body: bytes, record: Callable[[CallbackAttempt], None], slow: float
    ) -> None:
        for wait in (0, *self.delays):
            await asyncio.sleep(wait)
            attempt = await self._attempt(url, body, slow)
            record(attempt)
            if attempt.status is not None and 200 <= attempt.status < 300:
                return

    async def _attempt(self, url: str, body: bytes, slow: float) -> CallbackAttempt:
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
            return CallbackAttempt(at, None, f"{type(error).__name__}: {error}")
        return CallbackAttempt(at, response.status)


async def dribbled(body: bytes, seconds: float) -> AsyncIterator[bytes]:
    """The body a byte at a time, the first one at once."""
    for at in range(len(body)):
        yield body[at : at + 1]
        await asyncio.sleep(seconds / len(body))
