"""Two PostgreSQL servers on loopback: a primary, and a synchronous standby that has every commit
before the primary confirms it.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.servers import PostgresServer, execute, free_port, postgres_server

STANDBY = "second"


@contextlib.contextmanager
def replicated(binaries: Path) -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """The running primary and its synchronous standby."""
    with (
        postgres_server(binaries, free_port()) as primary,
        postgres_server(binaries, free_port()) as standby,
    ):
        primary.create()
        primary.start()
        source = f"host=127.0.0.1 port={primary.port} user=postgres application_name={STANDBY}"
        standby.run("pg_basebackup", "-d", source, "-R", "-c", "fast", "--no-sync")
        standby.start()
        names = f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'"
        asyncio.run(execute(url(primary), names))
        primary.control("reload")
        yield primary, standby


def url(*servers: PostgresServer) -> str:
    """A URL with all the servers. The client connects to the server that accepts writes."""
    places = ",".join(f"127.0.0.1:{each.port}" for each in servers)
    return f"postgresql://postgres@{places}/postgres"
