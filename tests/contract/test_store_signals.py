"""Signals: hints that wake waiting requests and workers, within a process and between processes. A
hint is never a promise.
"""

import asyncio
from collections.abc import Sequence

import pytest
from sqlalchemy import text

from service.db import postgres
from service.db.signals import Signals
from service.db.transaction import Transaction
from tests.contract.subject import Subject, completed, new_id
from tests.contract.test_store_committer import outage_of
from tests.waiting import wait_until


async def test_every_listener_of_a_key_is_woken() -> None:
    """Listeners of other keys sleep on. The signals forget a listener that left."""
    signals = Signals()
    with signals.listen("task_1") as one, signals.listen("task_2") as other:
        with signals.listen("task_1") as two:
            signals.notify(["task_1", "task_3"])
            assert await signals.wait(one, 10)
            assert await signals.wait(two, 10)
        assert not other.is_set()
        assert set(signals._waiting) == {"task_1", "task_2"}
    assert signals._waiting == {}


async def test_a_wait_ends_at_its_timeout() -> None:
    """It returns False when no hint came. A timeout of 0 does not wait."""
    signals = Signals()
    with signals.listen("events") as hint:
        assert not await signals.wait(hint, 0.001)
        signals.notify(["events"])
        assert not await signals.wait(hint, 0)
        assert await signals.wait(hint, 10)


async def test_a_stop_ends_every_wait() -> None:
    """The waits end at once and no new one begins, so that each request answers with the current
    state.
    """
    signals = Signals()
    with signals.listen("events") as hint, signals.listen("task_1") as changed:
        waiting = [asyncio.ensure_future(signals.wait(event, 60)) for event in (hint, changed)]
        await asyncio.sleep(0)
        signals.stop()
        assert await asyncio.gather(*waiting) == [False, False]
        assert not await signals.wait(hint, 60)
    assert signals.stopping


async def hinted(one: Subject, other: Subject) -> bool:
    """Whether the other process gets a hint of work that this process commits."""
    await one.queued()
    return {"submit"} in other.places.hints


async def test_a_process_notifies_other_processes_of_its_commits(
    two: tuple[Subject, Subject],
) -> None:
    """NOTIFY on PostgreSQL carries stages with work, changed tasks and new events. A process does
    not hear its own notifications.
    """
    one, other = two
    await wait_until(lambda: hinted(one, other))
    assert {"submit"} not in one.places.hints
    task_id = await one.uncertain()
    with (
        other.store.signals.listen(task_id) as changed,
        other.store.signals.listen("events") as written,
    ):
        await one.callback(task_id, completed(task_id, "https://r.test/0"))
        assert await other.store.signals.wait(changed, 30)
        assert await other.store.signals.wait(written, 30)


async def test_hints_resume_after_an_outage_of_the_server(
    two: tuple[Subject, Subject],
    migrated_database: str,
    postgres_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The listener connects again and assumes that anything may have changed meanwhile."""
    monkeypatch.setattr(postgres, "WATCH_AGAIN_S", 0.05)
    one, other = two
    await wait_until(lambda: hinted(one, other))
    async with outage_of(postgres_server, migrated_database):
        other.places.hints.clear()
    await wait_until(lambda: None in other.places.hints)
    await wait_until(lambda: hinted(one, other))


async def test_a_hint_that_would_be_too_long_names_no_key(two: tuple[Subject, Subject]) -> None:
    """The process that receives it looks at everything."""
    one, other = two
    await wait_until(lambda: hinted(one, other))
    tasks = [new_id("task") for _ in range(250)]
    other.places.hints.clear()

    def touch(tx: Transaction, lists: Sequence[Sequence[str]]) -> list[None]:
        tx.connection.execute(text("SELECT 1"))  # a transaction begins with its first statement
        for ids in lists:
            tx.touched |= dict.fromkeys(ids)
        return [None] * len(lists)

    await one.write(touch, tasks)
    await wait_until(lambda: None in other.places.hints)
