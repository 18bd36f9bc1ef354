"""Fixtures for every test."""

import asyncio
import gc
import logging
import os
import ssl
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TextIO, cast

import httpx
import hypothesis
import pytest
from PIL import Image

from service.net.service_client import usual_trust
from service.ops.logging import configure
from service.signing import Keyring
from tests.bytecode import compile_share
from tests.checked_lines import LATE, CheckedOutput, check_text, finish, found
from tests.disks import use_memory
from tests.known_secrets import know
from tests.s3 import s3_running, with_bucket
from tests.servers import (
    missing,
    missing_counted,
    postgres_binaries,
    postgres_database,
    postgres_running,
)
from tests.stores import migrated_database

HEAVY = {
    "crash",
    "e2e",
    "bench",
    "durability",
    "consumers",
    "attack",
    "browser",
}  # folders with tests that start processes
RUNNING = {*HEAVY, "integration"}  # folders with tests that run a service
LONG = {*HEAVY, "property"}  # folders with few and long tests
SERVERS = ("postgres", "s3", "brokers")  # prefixes of fixtures and parameters
STARTERS = (
    "subprocess",
    "tests.brokers",
    "tests.crash",
    "tests.disks",
    "tests.launcher",
    "tests.processes",
    "tests.terminals",
)

EXAMPLES = int(os.environ.get("DARKROOM_TEST_EXAMPLES", "50"))  # of each property
hypothesis.settings.register_profile(
    "darkroom", deadline=None, max_examples=EXAMPLES
)  # a slow machine must not fail a test
hypothesis.settings.load_profile("darkroom")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """asyncio's own loop, because the guard against foreign hosts hooks Python's sockets and uvloop
    bypasses them.
    """
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="session", autouse=True)
def _log_lines() -> None:
    """Services of this process write JSON lines, which are checked on their way."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure("json", "info", cast(TextIO, CheckedOutput()))
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _checked_lines() -> Iterator[None]:
    """A line that the schema does not allow, or with a secret, fails the test that caused it."""
    yield
    wrong = found()
    assert not wrong, wrong


@pytest.fixture(scope="session", autouse=True)
def _known_secrets() -> Iterator[None]:
    """No line may have what the services of this process encrypt, or a callback's token."""
    encrypt, token = Keyring.encrypt, Keyring.callback_token

    def encrypted(self: Keyring, text: str) -> bytes:
        know(text)
        return encrypt(self, text)

    def made(self: Keyring, upstream: str, task_id: str) -> str:
        know(text := token(self, upstream, task_id))
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keyring, "encrypt", encrypted)
        patch.setattr(Keyring, "callback_token", made)
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server, with the right to create databases."""
    if url := os.environ.get("DARKROOM_TEST_POSTGRES_URL"):
        yield url
    elif binaries := postgres_binaries():
        with postgres_running(binaries) as url:
            yield url
    else:
        missing("PostgreSQL", "DARKROOM_TEST_POSTGRES_URL")


@pytest.fixture(scope="session")
def postgres_template(postgres_server: str) -> Iterator[str]:
    """The name of a database with the schema, to copy."""
    with migrated_database(postgres_server) as name:
        yield name


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database for one test."""
    with postgres_database(postgres_server) as url:
        yield url


@pytest.fixture(autouse=True)
def _pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores Pillow's pixel limit. The limit is global, and the next test's sandbox needs it to
    draw.
    """
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture(scope="session", autouse=True)
def _certificates() -> Iterator[None]:
    """Reads the usual certificates once and not for each client of a test, which takes 45 ms."""

    def once(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
        if verify is True and cert is None:
            return usual_trust()
        return httpx.create_ssl_context(verify, cert, trust_env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httpx._transports.default.create_ssl_context", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_stops() -> Iterator[None]:
    """A server of this process stops within 0.02 s. uvicorn looks every 0.1 s whether it should,
    and waits 0.1 s more, and most tests stop two servers.
    """

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvicorn.server.asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
        yield


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """A client of a test waits longer than the usual 5 s for a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        for part in ("connect", "read", "write", "pool"):
            patch.setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, part, 30.0)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server for the whole run."""
    with s3_running() as address:
        yield address


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket for one test. The environment names its server."""
    return with_bucket(s3_server, monkeypatch)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr == "quick" and collection_path.name in RUNNING else None


def pytest_configure(config: pytest.Config) -> None:
    use_memory()
    compile_share(config)


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.parent.name in HEAVY and not item.get_closest_marker("timeout"):
        item.add_marker(pytest.mark.timeout(300))  # processes start slowly on a busy machine
    if item.config.option.markexpr and isinstance(item, pytest.Function) and is_quick(item):
        item.add_marker("quick")


def is_quick(test: pytest.Function) -> bool:
    """Whether `make quick` runs a test: it runs no service, needs no server, starts no process and
    is not slow.
    """
    parameters = test.callspec.params.values() if hasattr(test, "callspec") else ()
    names = [*test.fixturenames, *(value for value in parameters if isinstance(value, str))]
    return (
        test.path.parent.name not in RUNNING
        and not test.get_closest_marker("slow")
        and not any(name.startswith(SERVERS) for name in names)
        and not starts_processes(test.module)
    )


@cache
def starts_processes(module: ModuleType) -> bool:
    """Whether a test module imports a function that starts processes."""
    imported = (
        str(getattr(value, "__module__", None) or getattr(value, "__name__", ""))
        for value in vars(module).values()
        if callable(value) or isinstance(value, ModuleType)
    )
    return any(name.startswith(STARTERS) for name in imported)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with few and long tests first, so that no worker gets one of them
    at the end. A test with a time limit of its own is long too.
    """
    items.sort(
        key=lambda item: (
            item.path.parent.name not in LONG and not item.get_closest_marker("timeout")
        )
    )


def pytest_collection_finish() -> None:
    """The collected tests and modules live to the end of the run. Without this the collector walks
    them again and again while a test makes large documents, for up to half of a test's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Checks what processes wrote to the standard error that they have of the tests."""
    report = yield
    if call.when == "teardown":
        for name, text in report.sections:
            if "stderr" in name:
                check_text(text)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    finish(session.config, session)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    LATE.extend(getattr(node, "workeroutput", {}).get("late", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for wrong in LATE:
        terminalreporter.write_line(f"after the last test: {wrong}", red=True)
    for server, count in sorted(missing_counted(terminalreporter.stats.get("skipped", [])).items()):
        terminalreporter.write_line(f"{count} tests skipped for want of a server: {server}")
