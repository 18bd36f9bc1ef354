"""Where events go: what a sink must be able to do, and what came of one try."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sent:
    """One try. `status` None: no answer came, `error` says why. `retry_after` is the answer's
    header; `answer` its first 2 KiB.

    `ours`: the fault was on this side, and says nothing of the subscriber.
    """

    status: int | None
    duration: float
    error: str | None = None
    retry_after: str | None = None
    answer: bytes = b""
    ours: bool = False


class Webhooks(Protocol):
    """Sends signed webhooks to one purpose's addresses; raises nothing that a network can cause."""

    async def send(
        self,
        url: str,
        id: str,
        timestamp: int,
        body: bytes,
        content_type: str,
        secrets: Sequence[str],
    ) -> Sent:
        """One POST with the Standard Webhooks headers, signed over the bytes sent; `timestamp` in
        seconds.
        """

    async def check(self, url: str) -> None:
        """EgressRefused for an address that would never be sent to; a name that does not resolve
        now is fine.
        """


@dataclass(frozen=True, slots=True)
class Message:
    """An event on its way to a broker. `key`: events with the same one keep their order; `body`:
    the CloudEvent, structured JSON.
    """

    id: str
    type: str
    key: str
    body: bytes


class Broker(Protocol):
    """A message broker that takes events. Whatever goes wrong is SinkUnavailable; nothing is known
    to have been taken then.
    """

    name: str
    types: Sequence[str]  # of events it gets; none: all

    async def open(self) -> None:
        """Connects, or asks whether the connection is still good."""

    async def publish(self, message: Message) -> None:
        """Returns once the broker has confirmed that it has the message, under the event's id."""

    async def close(self) -> None:
        """Ends the connection, whatever state it is in."""
