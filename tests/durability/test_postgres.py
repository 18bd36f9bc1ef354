"""PostgreSQL's durability depends on its settings alone, so these tests check the settings."""

import asyncio
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Connection, text
from structlog.testing import capture_logs

from service.resources import new_id
from tests.servers import execute, missing, postgres_binaries, postgres_database, postgres_running
from tests.stores import open_postgres


def synchronous(connection: Connection) -> str:
    return str(connection.execute(text("SHOW synchronous_commit")).scalar_one())


@pytest.mark.parametrize(
    ("default", "ours"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("remote_apply", "remote_apply")],
)
async def test_a_commit_waits_for_the_disk_whatever_the_default_is(
    postgres_url: str, default: str, ours: str
) -> None:
    """`synchronous_commit` is `on` or stricter in every session. The rollback of a failed
    transaction does not undo that.
    """
    await execute(
        postgres_url,
        f'ALTER DATABASE "{urlsplit(postgres_url).path[1:]}" SET synchronous_commit = {default}',
    )
    with capture_logs() as lines:
        async with open_postgres(postgres_url, process="one", new_id=new_id) as store:
            with pytest.raises(ZeroDivisionError):
                await store.read(lambda _: 1 // 0)
            assert (
                await asyncio.gather(*(store.read(synchronous) for _ in range(10))) == [ours] * 10
            )
    assert [line for line in lines if line["event"] == "store.unsafe"] == []


async def test_a_server_that_may_lose_commits_is_told_of() -> None:
    """With `fsync` or `full_page_writes` off, no setting of a client makes a commit durable. The
    log warns at every start.
    """
    binaries = postgres_binaries()
    if binaries is None:
        missing("PostgreSQL")

    def unsafe() -> list[str]:
        async def look(url: str) -> list[str]:
            with capture_logs() as lines:
                async with open_postgres(url, process="one", new_id=new_id):
                    return [line["setting"] for line in lines if line["event"] == "store.unsafe"]

        with postgres_running(binaries) as server:
            for setting in ("fsync", "full_page_writes"):
                asyncio.run(execute(server, f"ALTER SYSTEM SET {setting} = off"))
            asyncio.run(execute(server, "SELECT pg_reload_conf()"))
            with postgres_database(server) as url:
                return asyncio.run(look(url))

    assert await asyncio.to_thread(unsafe) == ["fsync", "full_page_writes"]


async def test_a_default_that_changes_under_a_session_is_not_its_own() -> None:
    """The server reloads its configuration while the service is connected."""
    binaries = postgres_binaries()
    if binaries is None:
        missing("PostgreSQL")

    def changed() -> str:
        async def look(server: str, url: str) -> str:
            async with open_postgres(url, process="one", new_id=new_id) as store:
                assert await store.read(synchronous) == "on"
                await execute(server, "ALTER SYSTEM SET synchronous_commit = off")
                await execute(server, "SELECT pg_reload_conf()")
                await asyncio.sleep(1)  # the server signals the reload to its sessions
                return await store.read(synchronous)

        with postgres_running(binaries) as server, postgres_database(server) as url:
            return asyncio.run(look(server, url))

    assert await asyncio.to_thread(changed) == "on"
