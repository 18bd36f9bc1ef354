"""What the tests use to run servers: a missing server skips a test at a desk and fails it in CI,
and a reserved port is given to one test alone.
"""

import contextlib
import socket
from types import SimpleNamespace

import pytest

from tests.servers import free_port, kept_port, missing, missing_counted
from tests.waiting import wait_until


def test_a_missing_server_skips_at_a_desk_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The skips are counted per server. Other skips are not counted."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception) as caught:
        missing("PostgreSQL", "DARKROOM_TEST_POSTGRES_URL")
    reports = [
        SimpleNamespace(longrepr=("file", 1, f"Skipped: {reason}"))
        for reason in (caught.value, caught.value, "no such thing")
    ]
    assert missing_counted([*reports, SimpleNamespace(longrepr=None)]) == {"PostgreSQL": 2}


def test_a_missing_server_fails_when_ci_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no server: PostgreSQL"):
        missing("PostgreSQL", "DARKROOM_TEST_POSTGRES_URL")


def test_a_kept_port_is_given_once_and_can_be_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        kept, other = kept_port(stack), free_port()
        drawn = iter([kept, other, kept, other])
        source = SimpleNamespace(randrange=lambda *_: next(drawn))
        monkeypatch.setattr("random.SystemRandom", lambda: source)
        assert (free_port(), kept_port(stack)) == (other, other)
        socket.create_server(("127.0.0.1", kept)).close()


async def test_waiting_ends_with_a_value_or_fails_at_its_limit() -> None:
    """The predicate may be a plain function or a coroutine function."""
    countdown = iter([0, 0, 7])
    assert await wait_until(lambda: next(countdown)) == 7

    async def later() -> str:
        return "done"

    assert await wait_until(later) == "done"
    with pytest.raises(AssertionError, match=r"still 0 after 0\.03 s"):
        await wait_until(lambda: 0, 0.03)
