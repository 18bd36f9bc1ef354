"""Which PostgreSQL server: of several hosts the one that takes writes, also after another has taken
over.
"""

import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute
from asyncpg.exceptions import TargetServerAttributeNotMatched

CONNECT_S = 10.0  # to one host
# a host that has not acknowledged anything for so long is gone: its machine died, and nobody closes
# its connections
SILENT_S = 15


def dsns(url: str) -> list[str]:
    """The servers of `postgresql://…`, `postgres://…` or one with a driver's name: one URL for each
    of its comma-separated hosts.
    """
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    query = f"?{parts.query}" if parts.query else ""
    return [f"postgresql://{user}{at}{host}{parts.path}{query}" for host in hosts.split(",")]


def connecting(
    url: str, server_settings: dict[str, str]
) -> Callable[[], Awaitable["asyncpg.Connection[Any]"]]:
    """What connects to the first of the hosts that is there and takes writes, beginning with the
    last that did; else OSError.
    """
    places = dsns(url)

    async def connect() -> "asyncpg.Connection[Any]":
        failure: Exception | None = None
        for place in list(places):
            try:
                connection = await asyncpg.connect(
                    place,
                    timeout=CONNECT_S,
                    server_settings=server_settings,
                    target_session_attrs=SessionAttribute.primary,
                )
            except (
                OSError,
                asyncpg.CannotConnectNowError,
                TargetServerAttributeNotMatched,
            ) as error:
                failure = error
                continue
            places.remove(place)
            places.insert(0, place)
            transport = connection._transport  # type: ignore[attr-defined]  # noqa: SLF001
            notice_silence(transport.get_extra_info("socket"))
            return connection
        if isinstance(failure, TargetServerAttributeNotMatched):
            raise ConnectionError("no host is a primary server") from failure
        assert failure is not None
        raise failure

    return connect


def notice_silence(connected: socket.socket) -> None:
    """Ends a connection to a machine that is gone, whether or not anything is under way on it."""
    if connected.family != socket.AF_UNIX and sys.platform == "linux":
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, 5),
            (socket.TCP_KEEPINTVL, 5),
            (socket.TCP_USER_TIMEOUT, SILENT_S * 1000),
        ):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
