"""Connects to the PostgreSQL server that accepts writes, also after a failover.

asyncpg knows several hosts and `target_session_attrs`. Its timeout covers all hosts together, so a
host that accepts connections and stays silent would hide the next one. Each host therefore gets a
timeout of its own here (see docs/decisions/0026).
"""

import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import structlog
from asyncpg.connect_utils import SessionAttribute
from asyncpg.exceptions import TargetServerAttributeNotMatched

from service.db.postgres_url import parse_postgres_url
from service.errors import ConfigurationError

log = structlog.get_logger()

CHANNEL = "darkroom"
CONNECT_S = 10  # to one host
IDLE_S, INTERVAL_S = 5, 5  # of keepalives
SILENT_S = 15  # without an acknowledgement, after which the host counts as gone


class HintingConnection(asyncpg.Connection):
    """Sends the transaction's `hint` together with its COMMIT, which saves a round trip."""

    hint: str | None = None

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if query == "COMMIT;" and self.hint is not None:
            hint = self.hint.replace("'", "''")
            query = f"NOTIFY {CHANNEL}, '{hint}';COMMIT;"
        return await super().execute(query, *args, timeout=timeout)


def connecting(
    url: str, server_settings: dict[str, str]
) -> Callable[[], Awaitable["asyncpg.Connection[Any]"]]:
    """Returns a function that connects to the first host that accepts writes. It begins with the
    host of the last connection.

    OSError, CannotConnectNowError: no host accepts writes. ConfigurationError: the URL names a file
    that does not exist.
    """
    database = parse_postgres_url(url)
    if database.ignored:
        log.warning("store.parameters_ignored", parameters=",".join(database.ignored))
    for name, file in database.files.items():
        if not Path(file).is_file():
            raise ConfigurationError(f"DARKROOM_DATABASE_URL: {name}: there is no file {file}")
    hosts, seconds = list(database.dsns), database.numbers.get("connect_timeout", 0)
    trust = ssl.create_default_context() if database.system_roots else None
    if trust is not None:
        trust.set_alpn_protocols(["postgresql"])  # which `sslnegotiation=direct` needs

    async def connect() -> "asyncpg.Connection[Any]":
        failure: Exception = ConnectionError("no host")
        for host in list(hosts):
            try:
                connection = await asyncpg.connect(
                    host,
                    timeout=seconds if seconds > 0 else CONNECT_S,
                    server_settings=server_settings,
                    target_session_attrs=SessionAttribute.primary,
                    ssl=trust,
                    connection_class=HintingConnection,
                )
            except TargetServerAttributeNotMatched:
                failure = ConnectionError("no host is a primary server")
            except (OSError, asyncpg.CannotConnectNowError) as error:
                failure = error if str(error) else ConnectionError("no answer in time")
            else:
                hosts.remove(host)
                hosts.insert(0, host)
                transport = connection._transport  # type: ignore[attr-defined]  # noqa: SLF001
                notice_silence(transport.get_extra_info("socket"), database.numbers)
                return connection
        raise failure

    return connect


def notice_silence(connected: socket.socket, given: Mapping[str, int]) -> None:
    """Ends the connection when its peer's machine is gone, also while the connection is idle.

    `given` are libpq's parameters. 0 stands for the default.
    """
    if connected.family == socket.AF_UNIX or sys.platform != "linux":
        return
    alive = given.get("keepalives", 1)
    options = {
        socket.TCP_KEEPIDLE: given.get("keepalives_idle") or IDLE_S,
        socket.TCP_KEEPINTVL: given.get("keepalives_interval") or INTERVAL_S,
        socket.TCP_KEEPCNT: given.get("keepalives_count"),
        socket.TCP_USER_TIMEOUT: given.get("tcp_user_timeout") or SILENT_S * 1000,
    }
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(alive != 0))
    for option, value in options.items():
        if value:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
