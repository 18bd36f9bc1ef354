"""Tests that need a server: a missing server skips a test at a desk and fails it in CI."""

from types import SimpleNamespace

import pytest

from tests.servers import missing, missing_counted
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


async def test_waiting_ends_with_a_value_or_fails_at_its_limit() -> None:
    """The predicate may be a plain function or a coroutine function."""
    countdown = iter([0, 0, 7])
    assert await wait_until(lambda: next(countdown)) == 7

    async def later() -> str:
        return "done"

    assert await wait_until(later) == "done"
    with pytest.raises(AssertionError, match=r"still 0 after 0\.03 s"):
        await wait_until(lambda: 0, 0.03)
