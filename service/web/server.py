"""A server on a bound socket, and the signals that stop a process."""

import asyncio
import heapq
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from operator import itemgetter
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from service.errors import ConfigurationError
from service.web.key_shares import UnsentBytes
from service.web.overload import PriorityGate
from service.web.server_protocol import BoundedProtocol

# Longer than clients and load balancers keep an idle connection (usually 5 to 60 s). The side that
# reuses a connection must also close it. Otherwise a request crosses our close and is lost.
KEEP_ALIVE_S = 75
OPEN_MAX = 10_240  # macOS accepts no higher limit, even without a hard limit

BACKLOG = 16_384  # the kernel lowers it to `net.core.somaxconn`
ACCEPT_PER_TURN = 100  # about 10 ms, and as many callbacks as fit into one commit
SPARE_DESCRIPTORS = 512  # for files and outgoing connections, half of a small limit
LOST_MS = 35_000  # more than a write may take
RETRY_S = 0.1  # after which descriptors may be free again
# Slow connections that end for new ones, and the seconds between two looks for them.
ENDED_AT_ONCE, END_AGAIN_S, IDLE_S = 500, 0.5, 10.0


class Server(uvicorn.Server):
    """uvicorn on a bound socket, without its signals (see `stopping`)."""

    def __init__(
        self, app: ASGIApp, bound: socket.socket, stop_s: float, gate: PriorityGate | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="none",
            http=BoundedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
            timeout_graceful_shutdown=max(1, round(stop_s)),
        )
        super().__init__(config)
        self._bound = bound
        self._gate, self._unsent = gate or PriorityGate(), UnsentBytes()
        self._end_again_at = 0.0

    async def run_bound(self) -> None:
        allow_descriptors()
        await self._serve([self._bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._bound.listen(BACKLOG)  # an inherited socket has the backlog of its creator
        connections = self.server_state.connections
        self._accept_loop = AcceptLoop(
            self._bound, self._connection, lambda: len(connections), self._end_slow
        )

    def _connection(self) -> BoundedProtocol:
        state = self.lifespan.state
        return BoundedProtocol(self.config, self.server_state, state, self._gate, self._unsent)

    def _end_slow(self) -> None:
        """Ends slow connections, the slowest first. The address with the most connections loses
        its own first. Other addresses' connections count as slow only after `IDLE_S`.
        """
        now = asyncio.get_running_loop().time()
        if now < self._end_again_at:  # a look at 20,000 connections takes 20 ms
            return
        self._end_again_at = now + END_AGAIN_S
        connections = cast(set[BoundedProtocol], self.server_state.connections)
        most = Counter(each.address for each in connections).most_common(1)[0][0]
        slow = [
            (each.address != most, since, each)
            for each in connections
            if (since := each.slow_since) is not None
            and (each.address == most or now - since >= IDLE_S)
        ]
        for *_, connection in heapq.nsmallest(ENDED_AT_ONCE, slow, key=itemgetter(0, 1)):
            connection.transport.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._accept_loop.close()
        await super().shutdown(sockets)


def max_connections() -> int:
    """How many connections the process may hold."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return BACKLOG
    return limit - min(SPARE_DESCRIPTORS, limit // 2)


class AcceptLoop:
    """Accepts hundreds of connections in one turn of the event loop.

    The loop's own server accepts one per turn. The callbacks of a burst would then be committed one
    by one, and the kernel would drop connections beyond its backlog (docs/decisions/0034). At the
    limit of descriptors, further connections wait in the kernel, and slow ones end for them.
    `open_count` counts open connections, `end_slow` ends some.
    """

    def __init__(
        self,
        bound: socket.socket,
        make: Callable[[], asyncio.Protocol],
        open_count: Callable[[], int],
        end_slow: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._bound, self._make = bound, make
        self._open_count, self._end_slow = open_count, end_slow
        self._opening = set[asyncio.Task[None]]()
        self._retry: asyncio.TimerHandle | None = None
        self._listen()

    async def close(self) -> None:
        """Accepts the connections that are in the kernel's queue, and returns when all are open."""
        self._cancel_retry()  # descriptors may be free by now
        while self._retry is None and self._accept() == ACCEPT_PER_TURN:
            pass
        self._cancel_retry()
        self._loop.remove_reader(self._bound)
        await asyncio.gather(*self._opening)

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _listen(self) -> None:
        self._retry = None
        self._loop.add_reader(self._bound, self._accept)

    def _pause(self) -> None:
        self._loop.remove_reader(self._bound)
        self._retry = self._loop.call_later(RETRY_S, self._listen)

    def _accept(self) -> int:
        """The number of connections."""
        room = max_connections() - self._open_count() - len(self._opening)
        if room <= 0:  # and a connection waits
            self._end_slow()
        for count in range(min(ACCEPT_PER_TURN, room)):
            try:
                connection, _ = self._bound.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return count
            except OSError:  # no descriptor or no kernel memory is left
                self._pause()
                return count
            connection.setblocking(False)
            # The system would wait a quarter of an hour for a peer that lost its network.
            if connection.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_MS)
            opening = self._loop.create_task(self._open(connection))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)
        if room < ACCEPT_PER_TURN:
            self._pause()
        return ACCEPT_PER_TURN

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, connection)
        except OSError:  # the client has closed it already
            connection.close()


def allow_descriptors() -> None:
    """Raises the soft limit of open files to the hard one: 1024 would turn callbacks away."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, OPEN_MAX):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            break


def bind(host: str, port: int, named: str = "DARKROOM_HOST, DARKROOM_PORT") -> socket.socket:
    """A listening socket. Raises ConfigurationError when the address is taken.

    `named`: the settings or options that the address comes from.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on a socket with the protocol TCP. Without it, an answer takes
    # 40 ms longer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigurationError(
            f"{host}:{port} cannot be listened on: {error.strerror} ({named})"
        ) from error
    bound.listen(BACKLOG)
    bound.setblocking(False)
    return bound


@contextmanager
def stopping() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets. A second SIGINT ends the process at once with 130."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupted() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGINT)


@asynccontextmanager
async def listening(server: Server, stop: asyncio.Event) -> AsyncIterator[None]:
    """A server that answers while the block runs. If the server ends by itself, it sets `stop`."""
    serving = asyncio.create_task(server.run_bound(), name="server")
    serving.add_done_callback(lambda _: stop.set())
    try:
        yield
    finally:
        server.should_exit = True
        await serving
