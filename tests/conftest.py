"""Fixtures for every test."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.servers import missing, missing_counted, postgres_binaries, postgres_database, postgres_running

hypothesis.settings.register_profile("darkroom", deadline=None)  # a slow machine is no defect
hypothesis.settings.load_profile("darkroom")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """asyncio's own loop: the guard against foreign hosts sits in Python's sockets, which uvloop goes round."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server's URL, with the right to create databases."""
    if url := os.environ.get("DARKROOM_TEST_POSTGRES_URL"):
        yield url
    elif binaries := postgres_binaries():
        with postgres_running(binaries) as url:
            yield url
    else:
        missing("PostgreSQL", "DARKROOM_TEST_POSTGRES_URL")


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database of this test's own."""
    with postgres_database(postgres_server) as url:
        yield url


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for server, count in sorted(missing_counted(terminalreporter.stats.get("skipped", [])).items()):
        terminalreporter.write_line(f"{count} tests skipped for want of a server: {server}")
