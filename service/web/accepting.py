"""Connections are taken from the kernel as they come, hundreds in a turn of the event loop.

The loop's own server takes one in a turn: of a burst each callback would have a commit of its own,
and the kernel, which keeps a few thousand that nobody took, would drop who knocks.
"""

import asyncio
import resource
import socket
from collections.abc import Callable

MOST_KEPT = 16_384  # by the kernel, which makes it `net.core.somaxconn` if that is less
TAKEN = 500  # in one turn of the loop: some 50 ms
# descriptors that are left for files and for connections to others; of a small limit the half
SPARE = 512
FULL_S = 0.1  # then there may be room again


def most() -> int:
    """How many connections the process may hold."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_KEPT if limit == resource.RLIM_INFINITY else limit - min(SPARE, limit // 2)


class Acceptor:
    """Takes connections from a listening socket and makes protocols of them; `held`: how many there
    are already.

    When there are as many as the process may hold the others stay with the kernel.
    """

    def __init__(
        self, bound: socket.socket, make: Callable[[], asyncio.Protocol], held: Callable[[], int]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._bound, self._make, self._held = bound, make, held
        self._opening = set[asyncio.Task[None]]()
        self._later: asyncio.TimerHandle | None = None
        self._listen()

    async def close(self) -> None:
        """Takes those who have come by now, then nobody any more; returns when all of them are
        ready.
        """
        self._resume()  # there may be room by now
        while self._later is None and self._take() == TAKEN:
            pass
        self._resume()
        self._loop.remove_reader(self._bound)
        await asyncio.gather(*self._opening)

    def _resume(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _listen(self) -> None:
        self._later = None
        self._loop.add_reader(self._bound, self._take)

    def _pause(self) -> None:
        self._loop.remove_reader(self._bound)
        self._later = self._loop.call_later(FULL_S, self._listen)

    def _take(self) -> int:
        """How many there were."""
        room = most() - self._held() - len(self._opening)
        for count in range(min(TAKEN, room)):
            try:
                taken, _ = self._bound.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return count
            except OSError:  # descriptors or the kernel's memory are used up
                self._pause()
                return count
            taken.setblocking(False)
            opening = self._loop.create_task(self._open(taken))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)
        if room < TAKEN:
            self._pause()
        return TAKEN

    async def _open(self, taken: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, taken)
        except OSError:  # it has gone already
            taken.close()
