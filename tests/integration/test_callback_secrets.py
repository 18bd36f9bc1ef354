"""An owner's callback secret: it signs the callbacks of the owner's tasks and can be rotated."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from service.db.tables import owners
from service.db.transaction import Transaction
from service.events.secrets import stored_secret
from tests.api import UNTIL_DONE, got, refused, submitted
from tests.waiting import wait_until
from tests.world import Received, Subscriber, World, subscriber

JSON = dict[str, Any]
ROTATE = "/v1/keys/rotate-secret"
QUICK = {"fail": "service_error"}


@pytest.fixture
async def shop() -> AsyncIterator[Subscriber]:
    async with subscriber() as made:
        yield made


async def told(client: httpx.AsyncClient, shop: Subscriber) -> Received:
    """Submits a task with its own callback URL and returns the callback."""
    count = len(shop.received)
    await submitted(client, UNTIL_DONE, callback_url=f"{shop.url}/own", sandbox=QUICK)
    await wait_until(lambda: len(shop.received) > count)
    return shop.received[-1]


async def owner(here: World, name: str) -> JSON:
    return got(
        await here.client.post(
            "/v1/keys", json={"owner": name, "scopes": ["submit", "read", "subscribe"]}
        ),
        201,
    )


async def test_both_secrets_sign_while_they_overlap(here: World, shop: Subscriber) -> None:
    """First the first key's secret signs, then the old and the new one, and after the overlap only
    the new one. The library of Standard Webhooks verifies each.
    """
    key = await owner(here, "rotating")
    async with here.with_key(key["key"]) as client:
        assert (await told(client, shop)).signed_by(key["callback_secret"])
        second = got(await client.post(ROTATE))
        assert second == {"owner": "rotating", "callback_secret": second["callback_secret"]}
        request = await told(client, shop)
        assert [
            request.signed_by(secret)
            for secret in (key["callback_secret"], second["callback_secret"])
        ] == [True, True]
        third = got(await client.post(ROTATE, json={"overlap_s": 0}))
        request = await told(client, shop)
        shown = [key["callback_secret"], second["callback_secret"], third["callback_secret"]]
        assert [request.signed_by(secret) for secret in shown] == [False, False, True]


async def test_an_admin_rotates_anybodys_and_an_owner_its_own(
    here: World, shop: Subscriber
) -> None:
    """Another owner's secret is 403, and the key needs the scope `subscribe`. An unknown owner is
    404.
    """
    key = await owner(here, "ours")
    async with (
        here.with_key(key["key"]) as client,
        here.owner("submit", "read", name="ours") as reader,
    ):
        assert (
            got(await client.post(ROTATE, json={"owner": "ours", "overlap_s": 60}))["owner"]
            == "ours"
        )
        refused(
            await client.post(ROTATE, json={"owner": "rotating"}),
            403,
            "permission_denied",
            param="owner",
        )
        refused(await reader.post(ROTATE), 403, "permission_denied")
        refused(
            await here.client.post(ROTATE, json={"owner": "nobody"}),
            404,
            "owner_not_found",
            param="owner",
        )
        for param, value in (
            ("owner", "NOT AN OWNER"),
            ("overlap_s", -1),
            ("overlap_s", 2592001),
            ("secret", "whsec_mine"),
        ):
            refused(
                await client.post(ROTATE, json={param: value}), 400, "invalid_request", param=param
            )
        made = got(await here.client.post(ROTATE, json={"owner": "ours"}))
        request = await told(client, shop)
        assert request.signed_by(made["callback_secret"])
        assert request.signed_by(key["callback_secret"])


async def test_the_operators_have_one_without_a_key_in_the_store(
    here: World, shop: Subscriber
) -> None:
    """Only `DARKROOM_ADMIN_KEY` exists, so no answer ever showed the first secret. The rotation
    returns a new one.
    """
    made = got(await here.client.post(ROTATE))
    assert made["owner"] == "admin"
    assert (await told(here.client, shop)).signed_by(made["callback_secret"])


async def test_a_rotation_that_loses_to_concurrent_ones_is_a_conflict(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five attempts the answer is 409, and the secret is unchanged."""
    key = await owner(here, "contended")
    store = here.context.resources.store
    read, count = store.read, 0

    async def overtaken(query: Any, *arguments: Any) -> Any:
        nonlocal count
        found = await read(query, *arguments)
        if query is stored_secret:
            count += 1
            await store.write(
                set_secret, here.context.resources.keyring.encrypt(key["callback_secret"])
            )
        return found

    async with here.with_key(key["key"]) as client:
        monkeypatch.setattr(store, "read", overtaken)
        refused(await client.post(ROTATE), 409, "conflict")
        monkeypatch.undo()
        assert count == 5
        assert got(await client.post(ROTATE))["callback_secret"] != key["callback_secret"]


def set_secret(tx: Transaction, secrets: Sequence[bytes]) -> list[None]:
    """A store operation that plays a concurrent rotation."""
    for secret in secrets:
        tx.connection.execute(
            owners.update().where(owners.c.name == "contended").values(callback_secret=secret)
        )
    return [None] * len(secrets)
