"""Connects to the PostgreSQL server that accepts writes, also after a failover.

asyncpg knows several hosts and `target_session_attrs`. Its timeout covers all hosts together, so a
host that accepts connections and stays silent would hide the next one. Each host therefore gets a
timeout of its own here (see docs/decisions/0026).
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
SILENT_S = 15  # without an acknowledgement, after which the host counts as gone


def dsns(url: str) -> list[str]:
    """One URL for each comma-separated host of `postgresql://…` or `postgres://…`. A driver in the
    scheme (`postgresql+asyncpg://…`) is dropped.
    """
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    query = f"?{parts.query}" if parts.query else ""
    return [f"postgresql://{user}{at}{host}{parts.path}{query}" for host in hosts.split(",")]


def connecting(
    url: str, server_settings: dict[str, str]
) -> Callable[[], Awaitable["asyncpg.Connection[Any]"]]:
    """Returns a function that connects to the first host that accepts writes. It begins with the
    host of the last connection. OSError, CannotConnectNowError: no host accepts writes.
    """
    hosts = dsns(url)

    async def connect() -> "asyncpg.Connection[Any]":
        failure: Exception = ConnectionError("no host")
        for host in list(hosts):
            try:
                connection = await asyncpg.connect(
                    host,
                    timeout=CONNECT_S,
                    server_settings=server_settings,
                    target_session_attrs=SessionAttribute.primary,
                )
            except TargetServerAttributeNotMatched:
                failure = ConnectionError("no host is a primary server")
            except (OSError, asyncpg.CannotConnectNowError) as error:
                failure = error
            else:
                hosts.remove(host)
                hosts.insert(0, host)
                transport = connection._transport  # type: ignore[attr-defined]  # noqa: SLF001
                notice_silence(transport.get_extra_info("socket"))
                return connection
        raise failure

    return connect


def notice_silence(connected: socket.socket) -> None:
    """Ends the connection when its peer's machine is gone, also while the connection is idle."""
    if connected.family != socket.AF_UNIX and sys.platform == "linux":
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_S * 1000)
