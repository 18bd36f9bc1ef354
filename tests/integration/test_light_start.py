"""A start imports only what the process needs. The tests look at modules and not at the time, which
the machine decides.
"""

import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.environment import ROOT
from tests.processes import LOOPBACK, UPSTREAM_KEY, Running
from tests.waiting import wait_until

# By what would need them.
NEEDLESS = {
    "PostgreSQL": ("asyncpg", "sqlalchemy.dialects.postgresql", "sqlalchemy.ext.asyncio"),
    "an ORM": ("sqlalchemy.orm",),
    "a migration": ("alembic", "mako"),
    "brokers": ("faststream", "aiokafka", "nats", "aio_pika", "redis"),
    "S3": ("obstore",),
    "the console": ("jinja2", "service.web.console.console_table"),
    "a reload": ("watchfiles.main",),
    "a terminal": ("rich.text", "pygments.token"),
    "images": ("PIL",),
    "traces": ("opentelemetry",),
}


def got(url: str) -> httpx.Response:
    return httpx.get(url, timeout=60)


class Started:
    """A `serve` on SQLite that lists its imports on standard error."""

    def __init__(self, process: Running) -> None:
        self.url, self._process = process.address, process
        assert got(f"{self.url}/readyz").status_code == 200
        self.at_start = self.imported()

    def imported(self) -> set[str]:
        listed = re.compile(r"import time:.*\|\s*(\S+)$")
        return {found[1] for line in list(self._process.lines) if (found := listed.search(line))}


@contextmanager
def started(folder: Path) -> Iterator[Started]:
    process = Running(
        "serve",
        "--port=0",
        folder=folder,
        PYTHONPATH=str(ROOT),
        PYTHONPROFILEIMPORTTIME="1",
        DARKROOM_EVOLINK_API_KEY=UPSTREAM_KEY,
        DARKROOM_EVOLINK_BASE_URL="http://127.0.0.1:9",
        DARKROOM_UPSTREAM_NETWORKS=LOOPBACK,
    )
    try:
        yield Started(process)
    finally:
        process.signal(signal.SIGTERM)
        process.ended()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """On a store that the start before has migrated."""
    folder = tmp_path_factory.mktemp("light")
    with started(folder) as first:
        assert "alembic" in first.at_start
    with started(folder) as second:
        yield second


@pytest.mark.parametrize("purpose", list(NEEDLESS))
def test_a_start_on_sqlite_imports_nothing_for_what_it_does_not_use(
    service: Started, purpose: str
) -> None:
    """A start on an up-to-date store takes one look at its version, and no migration tool."""
    assert service.at_start & set(NEEDLESS[purpose]) == set()
    assert {"sqlalchemy", "service.backends"} <= service.at_start


async def test_the_first_page_of_the_console_imports_what_it_needs(service: Started) -> None:
    """The console is there although the start did not import it."""
    page = await asyncio.to_thread(got, f"{service.url}/console/sign-in")
    assert (page.status_code, page.headers["x-frame-options"]) == (200, "DENY")
    await wait_until(lambda: "jinja2" in service.imported())  # a thread reads the lines
    missing = await asyncio.to_thread(got, f"{service.url}/console/nothing/")
    assert missing.status_code == 303
    assert (await asyncio.to_thread(got, f"{service.url}/assets/1/none")).status_code == 404


def test_the_published_documents_are_built_at_the_first_request(service: Started) -> None:
    """The answers to later requests are the same bytes."""
    first, again = (got(f"{service.url}/openapi.json") for _ in range(2))
    assert (first.status_code, first.content) == (200, again.content)
    assert got(f"{service.url}/asyncapi.json").json()["asyncapi"].startswith("3")
