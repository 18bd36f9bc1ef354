"""A message for a broker."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Message:
    """An event on its way to a broker. Events with the same `key` keep their order. `body`: the
    CloudEvent as structured JSON. `trace`: headers of the message.
    """

    id: str
    type: str
    key: str
    body: bytes
    trace: Mapping[str, str] = field(default_factory=dict)
