"""Replays over real sockets: counts, ids, progress, cancellation and access."""

import json
import re
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from starlette.responses import Response

from service.db.tables import replays
from service.events import replays as pipeline
from service.upkeep.retention_sql import forget_replays
from tests.api import TIME, got, reached, refused
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import Subscriber, World, world

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


async def test_all_are_sent_again_by_time_and_type(
    here: World, client: httpx.AsyncClient, owner: str, shop: Subscriber
) -> None:
    """`since` is inclusive and `until` is exclusive. `types` narrows the types of the endpoint."""
    endpoint = await subscribed(client, shop, types=[FAILED, COMPLETED])
    await made(here, owner, 2)
    completed = await made(here, owner, 1, COMPLETED)
    await made(here, owner, 1, "image.task.submitted")
    await deliveries(client, 3, state="delivered")
    times = {event["id"]: event["time"] for event in got(await client.get("/v1/events"))["data"]}
    first, last = min(times.values()), max(times.values())
    assert await counted(client, endpoint, only="all") == 3
    assert await counted(client, endpoint, only="all", since=first) == 3
    assert await counted(client, endpoint, only="all", until=first) == 0
    beyond = (datetime.fromisoformat(last) + timedelta(milliseconds=1)).isoformat()
    assert await counted(client, endpoint, only="all", until=beyond) == 3
    assert await counted(client, endpoint, only="all", since=beyond) == 0
    assert (
        await counted(client, endpoint, only="all", since=beyond.replace("+00:00", "-05:00")) == 0
    )
    assert await counted(client, endpoint, only="all", types=["image.task.submitted"]) == 0
    shop.received.clear()
    replay = await replayed(
        client, endpoint, only="all", types=[COMPLETED, "image.task.submitted"], since=first
    )
    shown = await reached(client, replay, state="done", delivered=1)
    assert (shown["since"], shown["types"]) == (first, [COMPLETED, "image.task.submitted"])
    assert ids(shop) == completed
    assert {
        delivery["endpoint"] for delivery in await deliveries(client, 2, event=completed[0])
    } == {endpoint}


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


async def test_a_replay_has_a_bounded_rate_and_tells_how_far_it_is(
    here: World,
    client: httpx.AsyncClient,
    owner: str,
    shop: Subscriber,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replay makes one page of deliveries every `EVERY_MS`. A second replay waits for
    the first.
    """
    monkeypatch.setattr(pipeline, "PAGE", 2)
    endpoint = await subscribed(client, shop)
    events = await made(here, owner, 5)
    await deliveries(client, 5, state="delivered")
    monkeypatch.setattr(pipeline, "EVERY_MS", 600_000)
    first = await replayed(client, endpoint, only="all")
    shown = await reached(client, first, made=2, delivered=2)
    assert (shown["state"], shown["count"], shown["finished_at"]) == ("running", 5, None)
    assert sorted(ids(shop)[5:]) == sorted(events[:2])
    second = await replayed(client, endpoint, only="all")

    async def waits() -> bool:
        find = select(replays.c.due_at).where(replays.c.id == second)
        store = here.context.resources.store
        due_at: int = await store.read(lambda connection: connection.execute(find).scalar_one())
        return due_at > store.clock() + pipeline.EVERY_MS / 2

    await wait_until(waits)
    assert got(await client.get(f"/v1/replays/{second}"))["made"] == 0
    assert (await client.delete(f"/v1/replays/{first}")).status_code == 204
    assert (await reached(client, first, state="cancelled"))["made"] == 2
    monkeypatch.setattr(pipeline, "EVERY_MS", 10)
    third = await replayed(client, endpoint, only="all")
    assert (await client.delete(f"/v1/replays/{second}")).status_code == 204
    await reached(client, third, state="done", delivered=5)
    assert sorted(ids(shop)[-5:]) == sorted(events)


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


@pytest.mark.parametrize("how", ["disable", "delete"])
async def test_a_replay_ends_with_its_endpoint(
    here: World,
    client: httpx.AsyncClient,
    owner: str,
    shop: Subscriber,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Disabling or deleting the endpoint cancels its running replay, and no more deliveries are
    made.
    """
    monkeypatch.setattr(pipeline, "PAGE", 1)
    monkeypatch.setattr(pipeline, "EVERY_MS", 400)
    endpoint = await subscribed(client, shop)
    path = f"/v1/endpoints/{endpoint}"
    await made(here, owner, 200)
    await deliveries(client, 100, state="delivered", endpoint=endpoint)
    replay = await replayed(client, endpoint, only="all")
    await reached(client, replay, state="running")
    answer = await (
        client.delete(path) if how == "delete" else client.patch(path, json={"status": "disabled"})
    )
    assert answer.is_success
    shown = await reached(client, replay, state="cancelled")
    assert re.fullmatch(TIME, shown["finished_at"])
    assert shown["pending"] == 0
    assert shown["made"] < 200
    if how == "delete":
        refused(await client.post(f"{path}/replay"), 404, "endpoint_not_found")


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


async def test_a_replay_that_ended_is_kept_like_its_deliveries(
    tmp_path: Path, shop: Subscriber
) -> None:
    """After retention has removed the replay, a request for it gets 404."""
    async with world(tmp_path) as there:
        endpoint = await subscribed(there.client, shop)
        replay = await replayed(there.client, endpoint)
        await reached(there.client, replay, state="done")
        store = there.context.resources.store
        assert await store.write(forget_replays, store.clock()) == 1
        refused(await there.client.get(f"/v1/replays/{replay}"), 404, "replay_not_found")
