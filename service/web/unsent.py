"""What readers of answers have not taken: a budget of bytes for all connections of a process."""

from collections import Counter
from typing import Protocol

MAX_UNSENT = 64 << 20  # bytes in this process, without what the kernel has of each connection


class SlowReader(Protocol):
    """A connection that holds a part of an answer."""

    address: str

    def abort(self) -> None: ...


class UnsentBytes:
    """The bytes that connections hold. Over the budget, connections end: those of the address that
    holds the most, and of these first the ones that have taken nothing for the longest time.
    """

    def __init__(self) -> None:
        self._held: dict[SlowReader, int] = {}  # the longest first
        self.total = 0

    def hold(self, reader: SlowReader, size: int) -> None:
        self.release(reader)
        self._held[reader] = size
        self.total += size
        if self.total > MAX_UNSENT:
            self._end_slowest()

    def release(self, reader: SlowReader) -> None:
        self.total -= self._held.pop(reader, 0)

    def _end_slowest(self) -> None:
        """Down to three quarters, as each look at all connections takes time."""
        by_address = Counter[str]()
        for reader, size in self._held.items():
            by_address[reader.address] += size
        for address, _ in by_address.most_common():
            for reader in [each for each in self._held if each.address == address]:
                if self.total <= MAX_UNSENT * 3 // 4:
                    return
                self.release(reader)
                reader.abort()
