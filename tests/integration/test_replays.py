"""Replays over real sockets: counts, ids, progress, cancellation and access."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from tests.api import got, reached, refused
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import Subscriber, World

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_replays")]
SETTINGS = {"delivery_schedule": (0.05,)}
STORES = ("sqlite", "postgres")

JSON = dict[str, Any]
FAILED, COMPLETED = "image.task.failed", "image.task.completed"
DONE, BROKEN = Response(status_code=204), Response(status_code=500)


@pytest.fixture
async def client(here: World, request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    async with here.owner(name=name_of(request)) as made:
        yield made


@pytest.fixture
def owner(request: pytest.FixtureRequest) -> str:
    return name_of(request)


def name_of(request: pytest.FixtureRequest) -> str:
    return "".join(char if char.isalnum() else "-" for char in request.node.name)[-60:].strip("-")


async def made(here: World, owner: str, count: int = 1, type: str = FAILED) -> list[str]:
    return await emitted(here.context.resources.store, count, type, owner)


async def subscribed(client: httpx.AsyncClient, shop: Subscriber, **more: Any) -> str:
    endpoint: str = got(
        await client.post("/v1/endpoints", json={"url": f"{shop.url}/", **more}), 201
    )["id"]
    return endpoint


async def deliveries(client: httpx.AsyncClient, count: int, **query: str) -> list[JSON]:
    async def look() -> list[JSON] | None:
        found: list[JSON] = got(await client.get("/v1/deliveries", params=query))["data"]
        return found if len(found) == count else None

    found: list[JSON] = await wait_until(look)
    return found


async def counted(client: httpx.AsyncClient, endpoint: str, **body: Any) -> int:
    answer = got(
        await client.post(f"/v1/endpoints/{endpoint}/replay", json={"dry_run": True, **body})
    )
    assert answer == {"id": None, "count": answer["count"]}
    count: int = answer["count"]
    return count


async def replayed(client: httpx.AsyncClient, endpoint: str, **body: Any) -> str:
    answer = got(await client.post(f"/v1/endpoints/{endpoint}/replay", json=body))
    assert answer.keys() == {"id", "count"}
    id: str = answer["id"]
    return id


def ids(shop: Subscriber) -> list[str]:
    return [request.headers["webhook-id"] for request in shop.received]


async def disabled(
    here: World, client: httpx.AsyncClient, owner: str, endpoint: str, count: int
) -> tuple[JSON, list[str]]:
    """Disables the endpoint and emits `count` events that it misses."""
    off = got(await client.patch(f"/v1/endpoints/{endpoint}", json={"status": "disabled"}))
    return off, await made(here, owner, count)


async def test_the_dead_are_sent_again(
    here: World, client: httpx.AsyncClient, owner: str, shop: Subscriber
) -> None:
    """A replay sends each dead delivery again under its id, with the whole schedule, and leaves out
    delivered events. Then no delivery is dead.
    """
    shop.answer = lambda n, _request: BROKEN if n < 6 else DONE
    endpoint = await subscribed(client, shop)
    dead = await made(here, owner, 3)
    await deliveries(client, 3, state="dead")
    taken = await made(here, owner)
    await deliveries(client, 1, state="delivered")
    assert await counted(client, endpoint) == 3
    shop.received.clear()
    shop.answer = lambda n, _request: BROKEN if n == 0 else DONE
    replay = await replayed(client, endpoint)
    shown = await reached(client, replay, state="done", delivered=3)
    assert shown == {
        "id": replay,
        "endpoint": endpoint,
        "filter": None,
        "state": "done",
        "since": "1970-01-01T00:00:00.000Z",
        "until": shown["until"],
        "types": ["image.task.*"],
        "only": "undelivered",
        "count": 3,
        "made": 3,
        "pending": 0,
        "delivered": 3,
        "dead": 0,
        "created_at": shown["until"],
        "finished_at": shown["finished_at"],
    }
    assert set(ids(shop)) == set(dead)
    assert len(shop.received) == 4
    assert taken[0] not in ids(shop)
    assert await counted(client, endpoint) == 0
    assert await counted(client, endpoint, only="all") == 4


async def test_what_no_replay_can_be_is_refused_by_name(
    client: httpx.AsyncClient, shop: Subscriber
) -> None:
    """An invalid field gets 400 with its name and sends nothing. The earliest and the latest time
    that ISO 8601 can express are valid.
    """
    path = f"/v1/endpoints/{await subscribed(client, shop)}/replay"
    bad = [
        ("since", "yesterday"),
        ("until", "2026-01-01T00:00:00"),
        ("types", []),
        ("types.0", ["image"]),
        ("only", "some"),
    ]
    for param, value in [*bad, ("dry_run", "perhaps"), ("url", "https://x.test/")]:
        refused(
            await client.post(path, json={param.partition(".")[0]: value}),
            400,
            "invalid_request",
            param=param,
        )
    ends = {"since": "0001-01-01T00:00:00+14:00", "until": "9999-12-31T23:59:59-14:00"}
    shown = await reached(client, got(await client.post(path, json=ends))["id"], state="done")
    assert (shown["since"], shown["until"]) == (
        "1970-01-01T00:00:00.000Z",
        "9999-12-31T23:59:59.999Z",
    )
    assert shop.received == []


async def test_a_cancelled_replay_sends_nothing_more(
    here: World, client: httpx.AsyncClient, owner: str, shop: Subscriber
) -> None:
    """Cancelling makes the pending deliveries dead, and they stay listed. A second cancel, or a
    cancel after the end, changes nothing.
    """
    endpoint = await subscribed(client, shop)
    await made(here, owner, 2)
    await deliveries(client, 2, state="delivered")
    await client.patch(f"/v1/endpoints/{endpoint}", json={"status": "paused"})
    replay = await replayed(client, endpoint, only="all")
    await reached(client, replay, pending=2, state="done")
    for _ in range(2):
        answer = await client.delete(f"/v1/replays/{replay}")
        assert (answer.status_code, answer.content) == (204, b"")
    await client.patch(f"/v1/endpoints/{endpoint}", json={"status": "enabled"})
    shown = got(await client.get(f"/v1/replays/{replay}"))
    assert (shown["state"], shown["pending"], shown["dead"]) == ("done", 0, 2)
    (later,) = await made(here, owner)
    await deliveries(client, 3, state="delivered")
    assert ids(shop)[2:] == [later]


async def test_a_paused_endpoint_gets_its_replay_when_it_is_enabled(
    here: World, client: httpx.AsyncClient, owner: str, shop: Subscriber
) -> None:
    """The replay makes its deliveries, and the paused endpoint holds them like other deliveries."""
    endpoint = await subscribed(client, shop)
    (event,) = await made(here, owner)
    await deliveries(client, 1, state="delivered")
    await client.patch(f"/v1/endpoints/{endpoint}", json={"status": "paused"})
    replay = await replayed(client, endpoint, only="all")

    async def held() -> bool:
        found = got(await client.get("/v1/deliveries", params={"state": "pending"}))["data"]
        return [(each["attempts"], each["next_attempt_at"]) for each in found] == [([], None)]

    await wait_until(held)
    assert len(shop.received) == 1
    got(await client.patch(f"/v1/endpoints/{endpoint}", json={"status": "enabled"}))
    await reached(client, replay, delivered=1)
    assert ids(shop) == [event] * 2


async def test_enabling_a_disabled_endpoint_offers_what_it_missed(
    here: World, client: httpx.AsyncClient, owner: str, shop: Subscriber
) -> None:
    """The answer to the enabling request offers a replay since `disabled_at` with a count. That
    replay sends exactly the missed events. Other answers contain no offer.
    """
    endpoint = await subscribed(client, shop)
    path = f"/v1/endpoints/{endpoint}"
    await made(here, owner)
    await deliveries(client, 1, state="delivered")
    off, missed = await disabled(here, client, owner, endpoint, 3)
    assert off["replay"] is None
    assert await deliveries(client, 1) == await deliveries(client, 1, endpoint=endpoint)
    refused(await client.post(f"{path}/replay"), 409, "endpoint_disabled")
    assert await counted(client, endpoint, since=off["disabled_at"]) == 3
    on = got(await client.patch(path, json={"status": "enabled"}))
    assert on["replay"] == {"since": off["disabled_at"], "count": 3}
    for answer in (
        await client.get(path),
        await client.patch(path, json={"status": "enabled"}),
        await client.post(f"{path}/rotate"),
    ):
        assert got(answer)["replay"] is None
    assert [each["replay"] for each in got(await client.get("/v1/endpoints"))["data"]] == [None]
    (since,) = await made(here, owner)
    await deliveries(client, 2, state="delivered")
    shop.received.clear()
    replay = await replayed(client, endpoint, since=on["replay"]["since"])
    await reached(client, replay, delivered=3)
    assert sorted(ids(shop)) == sorted(missed)
    assert since not in ids(shop)


async def test_a_dead_delivery_that_was_retried_by_hand_is_not_replayed(
    here: World, client: httpx.AsyncClient, owner: str, shop: Subscriber
) -> None:
    shop.answer = lambda n, _request: BROKEN if n < 4 else DONE
    endpoint = await subscribed(client, shop)
    await made(here, owner, 2)
    one, other = await deliveries(client, 2, state="dead")
    assert got(await client.post(f"/v1/deliveries/{one['id']}/retry"))["state"] == "delivered"
    assert await counted(client, endpoint) == 1
    await reached(client, await replayed(client, endpoint), delivered=1)
    assert ids(shop)[-1] == other["event"]


async def test_nobody_elses_replays_and_endpoints_are_there(
    here: World, client: httpx.AsyncClient, owner: str, shop: Subscriber
) -> None:
    """Every request of another owner gets 404. An admin may start a replay, and the replay belongs
    to the endpoint's owner.
    """
    endpoint = await subscribed(client, shop)
    await made(here, owner)
    await deliveries(client, 1, state="delivered")
    async with here.owner() as stranger:
        for dry_run in (True, False):
            body = {"dry_run": dry_run, "only": "all"}
            refused(
                await stranger.post(f"/v1/endpoints/{endpoint}/replay", json=body),
                404,
                "endpoint_not_found",
            )
        replay = await replayed(here.client, endpoint, only="all")
        refused(await stranger.get(f"/v1/replays/{replay}"), 404, "replay_not_found")
        refused(await stranger.delete(f"/v1/replays/{replay}"), 404, "replay_not_found")
    await reached(client, replay, delivered=1)
    assert (await client.delete(f"/v1/replays/{replay}")).status_code == 204
    refused(await here.client.get("/v1/replays/rpl_unknown"), 404, "replay_not_found")


async def test_an_endpoint_for_all_owners_is_replayed_by_an_admin(
    here: World, owner: str, shop: Subscriber
) -> None:
    """The replay contains the events of all owners and the operators' events. A key of one owner
    cannot see it.
    """
    endpoint = await subscribed(
        here.client, shop, owner=None, types=["image.task.failed", "task.parked"]
    )
    theirs = await made(here, owner) + await emitted(here.context.resources.store, 1, "task.parked")
    await deliveries(here.client, 2, state="delivered", endpoint=endpoint)
    since = got(await here.client.get(f"/v1/endpoints/{endpoint}"))["created_at"]
    replay = await replayed(here.client, endpoint, only="all", since=since)
    await reached(here.client, replay, delivered=2)
    assert set(theirs) == set(ids(shop)[2:])
    assert {json.loads(request.body)["type"] for request in shop.received} == {
        "image.task.failed",
        "task.parked",
    }
    async with here.owner() as stranger:
        refused(await stranger.get(f"/v1/replays/{replay}"), 404, "replay_not_found")
