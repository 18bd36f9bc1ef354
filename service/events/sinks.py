"""What the broker worker needs of a broker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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
