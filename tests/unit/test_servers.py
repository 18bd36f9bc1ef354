"""A server that is not there is never passed over in silence."""

from types import SimpleNamespace

import pytest

from tests.servers import missing, missing_counted
from tests.waiting import wait_until


def test_a_missing_server_skips_at_a_desk_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips for want of a server are counted by server, other skips are not."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception) as caught:
        missing("PostgreSQL", "DARKROOM_TEST_POSTGRES_URL")
    reports = [
        SimpleNamespace(longrepr=("file", 1, f"Skipped: {reason}"))
        for reason in (caught.value, caught.value, "no such thing")
    ]
    assert missing_counted([*reports, SimpleNamespace(longrepr=None)]) == {"PostgreSQL": 2}


def test_a_missing_server_fails_where_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CI set nothing that was asked for is left out."""
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no server: PostgreSQL"):
        missing("PostgreSQL", "DARKROOM_TEST_POSTGRES_URL")


async def test_waiting_ends_with_the_answer_or_with_a_failure() -> None:
    """A predicate may be plain or awaited; what never comes fails within its limit."""
    countdown = iter([0, 0, 7])
    assert await wait_until(lambda: next(countdown)) == 7

    async def later() -> str:
        return "done"

    assert await wait_until(later) == "done"
    with pytest.raises(AssertionError, match=r"still 0 after 0\.03 s"):
        await wait_until(lambda: 0, 0.03)
