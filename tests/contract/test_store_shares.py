"""Owners share the slots of deliveries: a claim passes over owners whose share is used up."""

import asyncio
from collections import Counter

import pytest
from sqlalchemy import Connection, text

from service.db.sqlite import SqliteStore
from service.db.tables import deliveries
from service.fair_slots import has_share
from service.queue import leases
from service.queue.leases import REST
from tests.contract.subject import Subject
from tests.outbox import Made, emit

STAGE, TYPE, SLOTS = "deliver", "image.task.failed", 50


async def waiting(subject: Subject, owner: str, count: int) -> None:
    """Deliveries of an owner that are due."""
    await subject.endpoint(owner, [TYPE])
    await subject.write(emit, Made(count, TYPE, owner))


async def claimed(subject: Subject, used: dict[str, int], free: int) -> Counter[str]:
    """How many rows of each owner one claim leases."""
    subject.places.used = {STAGE: used}
    leases = await subject.claim(STAGE, free)
    subject.places.used = {}
    return Counter(lease.owner for lease in leases)


async def test_one_owner_alone_gets_its_share(subject: Subject) -> None:
    """A fifth of the slots. The rest stays free for owners that come later."""
    await waiting(subject, "greedy", 100)
    assert await claimed(subject, {}, SLOTS) == {"greedy": SLOTS // 5}
    assert "deliver" not in subject.places.transactions[-1].due, "the claim would be in vain"


async def test_an_owner_whose_share_is_used_up_is_passed_over(subject: Subject) -> None:
    """Its rows are due earlier, and there are more of them than free slots."""
    await waiting(subject, "greedy", 100)
    subject.clock.shift(1)
    await waiting(subject, "modest", 2)
    assert await claimed(subject, {"greedy": 10}, 40) == {"modest": 2}
    assert await claimed(subject, {"greedy": 10}, 41) == {"greedy": 1}


async def test_each_owner_gets_a_share_of_what_is_left(subject: Subject) -> None:
    owners = [f"owner-{number}" for number in range(10)]
    for owner in owners:
        await waiting(subject, owner, 50)
        subject.clock.shift(1)
    got = await claimed(subject, {}, SLOTS)
    assert min(got[owner] for owner in owners) >= 1
    assert got["owner-0"] == SLOTS // 5
    assert SLOTS - got.total() >= 1, "an eleventh owner finds a slot"


async def test_the_last_slot_goes_to_an_owner_without_one(subject: Subject) -> None:
    await waiting(subject, "greedy", 5)
    subject.clock.shift(1)
    await waiting(subject, "modest", 5)
    assert await claimed(subject, {"greedy": 1}, 1) == {"modest": 1}


async def test_new_deliveries_take_no_more_than_their_owners_share(subject: Subject) -> None:
    """They are leased in the transaction that writes them. The others are due."""
    subject.places.free, subject.places.used = {STAGE: SLOTS}, {STAGE: {}}
    await waiting(subject, "greedy", 100)
    assert len(subject.places.new_leases()) == SLOTS // 5
    assert STAGE in subject.places.transactions[-1].due
    await waiting(subject, "modest", 1)
    assert [lease.owner for lease in subject.places.new_leases()] == ["modest"]
    assert len(await subject.rows(deliveries, lease_until=None)) == 100 - SLOTS // 5


@pytest.mark.parametrize(("used", "free"), [(0, 1), (1, 5), (10, 41)])
def test_a_share_ends_at_a_quarter_of_the_free_slots(used: int, free: int) -> None:
    assert has_share(used, free, REST)
    assert not has_share(used, free - 1, REST)
    assert not has_share(used + 1, free, REST)


@pytest.mark.parametrize("used", [0, 3, 10, 49])
async def test_a_claim_ends_whatever_the_shares_are(
    subject: Subject, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement leases at least one row or is the last, also without the rule."""
    monkeypatch.setattr(leases, "has_share", lambda *_: True)
    await waiting(subject, "greedy", 100)
    async with asyncio.timeout(60):
        got = await claimed(subject, {"greedy": used}, SLOTS - used)
    assert got == {"greedy": SLOTS - used}


async def test_a_claim_passes_over_an_owner_by_the_index(sqlite_store: SqliteStore) -> None:
    """SQLite reads no row of the owner that is passed over, and sorts none."""
    statement = (
        "SELECT id FROM deliveries WHERE due_at <= 1 AND (lease_until IS NULL OR lease_until <= 1)"
        " AND owner NOT IN ('greedy') AND {} ORDER BY due_at, owner LIMIT 3"
    )

    def plan(connection: Connection, where: str) -> str:
        explained = connection.execute(text(f"EXPLAIN QUERY PLAN {statement.format(where)}"))
        return str(explained.all())

    for stage, where in (
        ("deliver", "attempts = 0 AND replay_id IS NULL"),
        ("redeliver", "(attempts > 0 OR replay_id IS NOT NULL)"),
    ):
        found = await sqlite_store.read(plan, where)
        assert f"ix_deliveries_{stage}_due_at_owner" in found
        assert "TEMP B-TREE" not in found
