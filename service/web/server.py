"""A server on a bound socket, and the signals that stop a process."""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from service.errors import ConfigurationError
from service.web.accepting import MOST_KEPT, Acceptor
from service.web.protocol import BoundedHeads

# Longer than the idle connections that clients and load balancers keep (5 to 60 s as a rule):
# whoever may reuse a connection is the one to close it, or a request meets our close on its way and
# is lost.
KEEP_ALIVE_S = 75
OPEN_MAX = 10_240  # where the hard limit is none, macOS takes no more than this


class Server(uvicorn.Server):
    """uvicorn on a bound socket, without its signals (see `stopping`)."""

    def __init__(self, app: ASGIApp, bound: socket.socket, stop_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=BoundedHeads,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                backlog=MOST_KEPT,
                timeout_graceful_shutdown=max(1, round(stop_s)),
            )
        )
        self._bound = bound

    async def run_bound(self) -> None:
        allow_descriptors()
        await self._serve([self._bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._bound.listen(MOST_KEPT)  # one that was handed over listens with another's
        connections = self.server_state.connections
        self._acceptor = Acceptor(self._bound, self._connection, lambda: len(connections))

    def _connection(self) -> BoundedHeads:
        return BoundedHeads(self.config, self.server_state, self.lifespan.state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._acceptor.close()
        await super().shutdown(sockets)


def allow_descriptors() -> None:
    """As many open connections and files as the process may have at all: a usual limit of 1024
    would turn callbacks of a burst away.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (most, OPEN_MAX):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
            break


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigurationError when the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only on sockets that say they are TCP:
    # 40 ms an answer otherwise.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigurationError(
            f"{host}:{port} cannot be listened on: {error.strerror} (DARKROOM_HOST, DARKROOM_PORT)"
        ) from error
    bound.listen(MOST_KEPT)
    bound.setblocking(False)
    return bound


@contextmanager
def stopping() -> Iterator[asyncio.Event]:
    """Set by SIGTERM or SIGINT, from here to the end of the block; a second SIGINT interrupts at
    once.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupted() -> None:
        if stop.is_set():
            os._exit(
                130
            )  # whoever insists does not wait for a tidy end; the store is safe at every moment
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
    """A server that answers for as long as the block runs; should it end by itself, it asks for the
    stop.
    """
    serving = asyncio.create_task(server.run_bound(), name="server")
    serving.add_done_callback(lambda _: stop.set())
    try:
        yield
    finally:
        server.should_exit = True
        await serving
