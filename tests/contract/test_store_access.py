"""Owners and keys: keys are hashed, scoped and revoked, and every query names an owner.

docs/api.md describes keys and scopes.
"""

import asyncio

import pytest

from service.db.operator_tables import api_keys
from service.db.tables import owners
from service.tasks import owner_keys, task_queries
from service.tasks.owner_keys import NewOwner, StoredKey, insert_keys, insert_owners, revoke_keys
from tests.contract.subject import SECOND, Subject, new_id, upstream_id


async def test_an_owners_first_key_brings_its_callback_secret(subject: Subject) -> None:
    """The secret of a later key is ignored."""
    assert await subject.key("painter", b"first")
    assert not await subject.key("painter", b"second")
    assert await subject.key("other", b"third")
    assert [(row["name"], row["callback_secret"]) for row in await subject.rows(owners)] == [
        ("other", b"third"),
        ("painter", b"first"),
    ]


async def test_an_owner_without_a_key_is_made_once_and_its_first_key_replaces_the_secret(
    subject: Subject,
) -> None:
    """No client has seen the first secret, so the first key brings a secret that is shown. A later
    key does not.
    """
    await subject.write(insert_owners, NewOwner("admin", b"never shown"))
    await subject.write(insert_owners, NewOwner("admin", b"not taken"))
    assert [row["callback_secret"] for row in await subject.rows(owners)] == [b"never shown"]
    assert await subject.key("admin", b"shown")
    assert not await subject.key("admin", b"later")
    assert [row["callback_secret"] for row in await subject.rows(owners)] == [b"shown"]


async def test_only_the_first_of_two_keys_in_one_batch_is_the_owners_first(
    subject: Subject,
) -> None:
    keys = [
        StoredKey(new_id("key"), "painter", f"hash{n}", "dk_hint", ("read",), b"%d" % n)
        for n in range(2)
    ]
    assert await subject.batch(insert_keys, keys) == [True, False]


async def test_two_processes_making_an_owners_first_key_make_one_owner(
    two: tuple[Subject, Subject],
) -> None:
    """Both keys are made. Only one of them is the owner's first key."""
    for number in range(5):
        made = await asyncio.gather(
            *(place.key(f"owner{number}", f"{place.store.process}".encode()) for place in two)
        )
        assert sorted(made) == [False, True]
    assert (len(await two[0].rows(owners)), len(await two[0].rows(api_keys))) == (5, 10)


async def test_a_key_inserted_again_is_the_same_key(subject: Subject) -> None:
    """The client retries after it lost the response to a commit. One key exists, and the second
    call still reports it as the first.
    """
    id = new_id("key")
    assert [await subject.key("painter", b"first", id=id) for _ in range(2)] == [True, True]
    assert len(await subject.rows(api_keys)) == 1


async def test_a_key_is_found_by_its_hash_until_it_is_revoked(subject: Subject) -> None:
    """The row has the owner and the scopes. After the revocation, only the list still shows the
    key.
    """
    await subject.key("painter", id="k1")
    subject.clock.shift(SECOND)
    await subject.key("painter", id="k0")
    row = await subject.store.read(owner_keys.key_row, "k1")
    assert row is not None
    assert (row["owner"], row["scopes"], row["hint"], row["revoked_at"]) == (
        "painter",
        ["submit", "read"],
        "dk_hint",
        None,
    )
    assert await subject.batch(revoke_keys, ["k1", "gone"]) == [True, False]
    assert await subject.store.read(owner_keys.key_row, "k1") is None
    assert await subject.store.read(owner_keys.key_row, "k0") is not None
    assert [
        (row["id"], row["revoked_at"]) for row in await subject.store.read(owner_keys.key_list)
    ] == [("k0", None), ("k1", subject.clock.now)]


async def test_revoking_a_key_again_keeps_the_first_time(subject: Subject) -> None:
    await subject.key("painter", id="k1")
    assert await subject.write(revoke_keys, "k1")
    ended = subject.clock.now
    subject.clock.shift(SECOND)
    assert await subject.write(revoke_keys, "k1")
    assert (await subject.row(api_keys, "k1"))["revoked_at"] == ended


@pytest.mark.parametrize("by", ["our id", "the upstream's id"])
async def test_a_task_is_visible_to_its_owner_and_to_admin(subject: Subject, by: str) -> None:
    """Another owner's query finds nothing. `admin` (no owner) sees every task."""
    task_id = await subject.submitted()
    name = task_id if by == "our id" else upstream_id(task_id)
    for owner, seen in [("painter", True), (None, True), ("other", False)]:
        found = await subject.store.read(task_queries.task, name, owner)
        assert (found is not None) is seen
        assert (await subject.store.read(task_queries.task_row, name, owner) is not None) is seen
    assert await subject.store.read(task_queries.task, "task_gone", None) is None
