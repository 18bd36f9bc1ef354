"""A PostgreSQL server that is still starting up when a process connects."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import asyncpg
import pytest
from sqlalchemy import Connection
from sqlalchemy.util import await_only
from structlog.testing import capture_logs

from service.db import postgres, schema
from service.db.postgres import MIGRATION_LOCK
from service.errors import ConfigurationError
from service.resources import new_id
from service.upkeep.store_figures import mark
from tests.stores import open_postgres
from tests.waiting import wait_until

SAID = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"


@asynccontextmanager
async def starting(url: str, refusals: int) -> AsyncIterator[str]:
    """A proxy to the server. It answers the first `refusals` connections like a server that is
    starting up.
    """
    parts, left = urlsplit(url), [None] * refusals
    folder, user = (dict(parse_qsl(parts.query)).get(name) for name in ("host", "user"))

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if left:
            left.pop()
            (length,) = struct.unpack("!i", await reader.readexactly(4))
            await reader.readexactly(length - 4)
            writer.write(b"E" + struct.pack("!i", len(SAID) + 4) + SAID)
            writer.close()
            return
        to = (
            asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")
            if folder
            else asyncio.open_connection(parts.hostname, parts.port)
        )
        theirs, ours = await to
        await asyncio.gather(pipe(reader, ours), pipe(theirs, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield parts._replace(
            netloc=f"{parts.netloc.rpartition('@')[0] or user}@127.0.0.1:{port}",
            query="sslmode=disable",
        ).geturl()
    finally:
        server.close()


async def test_a_start_waits_for_a_server_that_starts_up(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut both start at once. The process logs one line, waits, and can then
    commit.
    """
    monkeypatch.setattr(postgres, "BETWEEN_S", 0.01)
    with capture_logs() as lines:
        async with (
            starting(postgres_url, 3) as url,
            open_postgres(url, process="one", new_id=new_id) as store,
        ):
            await store.write(mark, None)
    (waiting,) = [line for line in lines if line["event"] == "store.waiting"]
    assert "starting up" in waiting["reason"]


async def test_a_server_that_goes_on_starting_up_is_given_up(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start fails with one clear line."""
    monkeypatch.setattr(postgres, "BETWEEN_S", 0.01)
    monkeypatch.setattr(postgres, "TURNS", 3)
    async with starting(postgres_url, 1000) as url:
        with pytest.raises(
            ConfigurationError,
            match=r"DARKROOM_DATABASE_URL: .* the database system is starting up",
        ):
            async with open_postgres(url, process="one", new_id=new_id):
                pass


STOPPED_WITH = {
    "a row that a write needs": "SELECT value FROM counters WHERE name = 'ready' FOR UPDATE",
    "the lock of the migration": f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})",
}


async def stop_within_statement(connection: "asyncpg.Connection[Any]") -> None:
    """Sends the first half of a statement, like a process that is stopped before the second
    half.
    """
    parse = b"\0SELECT 1\0\0\0"
    transport = connection._transport  # type: ignore[attr-defined]
    transport.write(b"P" + (4 + len(parse)).to_bytes(4, "big") + parse + b"H\0\0\0\4")


@pytest.mark.parametrize("lock", STOPPED_WITH.values(), ids=STOPPED_WITH)
async def test_a_start_ends_the_session_of_a_stopped_process(
    postgres_url: str, lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stopped process holds a lock that the start needs, and no working process is there to end
    its session.

    The server waits for the other half of a statement without a limit.
    """
    monkeypatch.setattr(postgres, "STALLED_LOOK_S", 0.05)
    monkeypatch.setattr(postgres, "STALLED_MS", 1500)
    monkeypatch.setattr(postgres, "BETWEEN_S", 0.05)
    async with open_postgres(postgres_url, process="first", new_id=new_id):
        pass
    stopped = await asyncpg.connect(postgres_url, server_settings={"application_name": "darkroom"})
    try:
        await stopped.execute(f"BEGIN; {lock}")
        await stop_within_statement(stopped)
        with capture_logs() as lines:
            async with open_postgres(postgres_url, process="second", new_id=new_id) as store:
                await store.write(mark, None)

                def freed() -> set[int]:  # a session that ends slowly is ended again
                    return {line["session"] for line in lines if line["event"] == "store.freed"}

                # The write may be done before the watch hears that the session has ended.
                pid = stopped.get_server_pid()
                assert await wait_until(lambda: freed() & {pid}) == {pid}
    finally:
        stopped.terminate()


async def test_a_start_outlasts_a_process_that_is_stopped_while_it_migrates(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is stopped between two statements. The server ends its session and releases the
    lock. The process cannot start when it goes on.
    """
    migrate, stopped, resumed = schema.migrate, asyncio.Event(), asyncio.Event()

    def stop_once(connection: Connection, *, allowed: bool) -> str:
        if stopped.is_set():
            return migrate(connection, allowed=allowed)
        stopped.set()
        await_only(resumed.wait())
        return migrate(connection, allowed=allowed)

    monkeypatch.setitem(postgres.SESSION, "idle_in_transaction_session_timeout", "3000")
    monkeypatch.setattr(schema, "migrate", stop_once)

    async def start(process: str) -> None:
        async with open_postgres(postgres_url, process=process, new_id=new_id) as store:
            await store.write(mark, None)

    first = asyncio.create_task(start("first"))
    await stopped.wait()
    await start("second")
    resumed.set()
    with pytest.raises(ConfigurationError, match="connection"):
        await first
