"""What an owner does with endpoints and deliveries by hand: other secrets, test sends, one attempt more, replays."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from service.signing import Verified, verify_webhook
from tests.api import UNTIL_DONE, got, refused, submitted
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber, world

JSON = dict[str, Any]


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, delivery_schedule=(0.05,)) as made:
        yield made


@pytest.fixture
async def shop() -> AsyncIterator[Subscriber]:
    async with subscriber() as made:
        yield made


async def subscribed(client: httpx.AsyncClient, shop: Subscriber, **more: Any) -> JSON:
    answer = await client.post("/v1/endpoints", json={"url": f"{shop.url}/hooks", "types": ["image.task.completed"], **more})
    return got(answer, 201)


async def deliveries(client: httpx.AsyncClient, count: int, **query: str) -> list[JSON]:
    async def look() -> list[JSON]:
        found: list[JSON] = got(await client.get("/v1/deliveries", params=query))["data"]
        return found if len(found) == count else []

    found: list[JSON] = await wait_until(look)
    return found


async def received(shop: Subscriber, count: int) -> None:
    async def look() -> bool:
        return len(shop.received) == count

    await wait_until(look)


def signed(shop: Subscriber, number: int, secret: str) -> bool:
    got = shop.received[number]
    return isinstance(verify_webhook([secret], got.headers, got.body, int(got.headers["webhook-timestamp"])), Verified)


async def test_both_secrets_sign_while_they_overlap(here: World, shop: Subscriber) -> None:
    """After `rotate` a receiver with the old secret and one with the new take the same request; after the overlap only the new."""
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        rotated = got(await client.post(f"/v1/endpoints/{endpoint['id']}/rotate"))
        assert rotated.keys() == endpoint.keys()
        assert rotated["secret"] != endpoint["secret"]
        await client.post(f"/v1/endpoints/{endpoint['id']}/test")
        assert signed(shop, 0, endpoint["secret"])
        assert signed(shop, 0, rotated["secret"])
        last = got(await client.post(f"/v1/endpoints/{endpoint['id']}/rotate", json={"overlap_s": 0}))
        await client.post(f"/v1/endpoints/{endpoint['id']}/test")
        assert [signed(shop, 1, secret) for secret in (endpoint["secret"], rotated["secret"], last["secret"])] == [False, False, True]
        refused(await client.post(f"/v1/endpoints/{endpoint['id']}/rotate", json={"overlap_s": -1}), 400, "invalid_request", param="overlap_s")


async def test_a_test_send_answers_the_attempt(here: World, shop: Subscriber) -> None:
    """Signed like a real event, and in nobody's list; what the subscriber said is for admins."""
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        attempt = got(await client.post(f"/v1/endpoints/{endpoint['id']}/test"))
        assert (attempt["status"], attempt["error"], "answer" in attempt) == (204, None, False)
        assert shop.received[0].headers["webhook-id"].startswith("evt_")
        shop.answer = lambda _n, _request: Response("no", status_code=500)
        attempt = got(await here.client.post(f"/v1/endpoints/{endpoint['id']}/test"))
        assert (attempt["status"], attempt["error"], attempt["answer"]) == (500, "answered 500", "no")
        assert got(await client.get("/v1/events"))["data"] == []
        assert got(await client.get("/v1/deliveries"))["data"] == []


async def test_a_retry_by_hand_is_one_attempt_now(here: World, shop: Subscriber) -> None:
    """Of a dead delivery and of a delivered one: with the same id, and answered with what came of it."""
    shop.answer = lambda n, _request: Response(status_code=500 if n < 3 else 204)
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        await submitted(client, UNTIL_DONE)
        [dead] = await deliveries(client, 1, state="dead")
        assert len(dead["attempts"]) == 2
        still = got(await client.post(f"/v1/deliveries/{dead['id']}/retry"))
        assert (still["state"], len(still["attempts"]), still["attempts"][-1]["status"]) == ("dead", 3, 500)
        for count in (4, 5):
            delivered = got(await client.post(f"/v1/deliveries/{dead['id']}/retry"))
            assert (delivered["state"], len(delivered["attempts"]), delivered["attempts"][-1]["error"]) == ("delivered", count, None)
        assert len({request.headers["webhook-id"] for request in shop.received}) == 1
        assert (await client.delete(f"/v1/endpoints/{endpoint['id']}")).status_code == 204
        refused(await client.post(f"/v1/deliveries/{dead['id']}/retry"), 409, "nothing_to_send")


async def test_a_replay_sends_the_dead_again(here: World, shop: Subscriber) -> None:
    """Counted first by `dry_run`; then each of them once more, with its id, and the replay tells how far it is."""
    shop.answer = lambda _n, _request: Response(status_code=500)
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        for _ in range(3):
            await submitted(client, UNTIL_DONE)
        await deliveries(client, 3, state="dead")
        path, sent = f"/v1/endpoints/{endpoint['id']}/replay", [request.headers["webhook-id"] for request in shop.received]
        assert got(await client.post(path, json={"dry_run": True})) == {"id": None, "count": 3}
        shop.received.clear()
        shop.answer = lambda _n, _request: Response(status_code=204)
        replay = got(await client.post(path))
        assert replay["count"] == 3
        await received(shop, 3)
        assert {request.headers["webhook-id"] for request in shop.received} == set(sent)

        async def over() -> JSON | None:
            found: JSON = got(await client.get(f"/v1/replays/{replay['id']}"))
            return found if found["delivered"] == 3 else None

        shown = await wait_until(over)
        assert (shown["state"], shown["made"], shown["pending"], shown["dead"]) == ("done", 3, 0, 0)
        assert got(await client.post(path, json={"dry_run": True}))["count"] == 0
        assert got(await client.post(path, json={"dry_run": True, "only": "all"}))["count"] == 3
        async with here.owner() as stranger:
            refused(await stranger.get(f"/v1/replays/{replay['id']}"), 404, "replay_not_found")
            refused(await stranger.delete(f"/v1/replays/{replay['id']}"), 404, "replay_not_found")
