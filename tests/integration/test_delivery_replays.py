"""Failures by endpoint and cause, and replays of the deliveries that match a filter."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from tests.api import got, reached, refused
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import JSON, Subscriber, World

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_replays")]
SETTINGS = {"delivery_schedule": (0.05,)}
STORES = ("sqlite", "postgres")
FAILED = "image.task.failed"
DONE, BROKEN = Response(status_code=204), Response(status_code=503)


@pytest.fixture
def shop(shop: Subscriber) -> Subscriber:
    shop.answer = lambda _n, _request: BROKEN
    return shop


@pytest.fixture
async def client(here: World) -> AsyncIterator[httpx.AsyncClient]:
    async with here.owner() as made:
        yield made


async def owner_of(client: httpx.AsyncClient) -> str:
    listed = got(await client.get("/v1/endpoints"))["data"]
    owner: str = listed[0]["owner"]
    return owner


async def endpoint_for(client: httpx.AsyncClient, shop: Subscriber, **more: Any) -> str:
    body = {"url": f"{shop.url}/", "types": ["*"], **more}
    id: str = got(await client.post("/v1/endpoints", json=body), 201)["id"]
    return id


async def dead(
    here: World, client: httpx.AsyncClient, count: int, type: str = FAILED
) -> list[JSON]:
    """Dead deliveries of new events of this owner."""
    ids = await emitted(here.context.resources.store, count, type, await owner_of(client))

    async def look() -> list[JSON] | None:
        found = got(await client.get("/v1/deliveries", params={"state": "dead"}))["data"]
        mine = [each for each in found if each["event"] in ids]
        return mine if len(mine) == count else None

    found: list[JSON] = await wait_until(look)
    return found


async def count_of(client: httpx.AsyncClient, **chosen: Any) -> int:
    body = {"filter": chosen, "dry_run": True}
    answer = got(await client.post("/v1/replays", json=body))
    assert answer == {"id": None, "count": answer["count"]}
    count: int = answer["count"]
    return count


async def replayed(client: httpx.AsyncClient, count: int, **chosen: Any) -> str:
    answer = got(await client.post("/v1/replays", json={"filter": chosen}))
    assert answer["count"] == count
    id: str = answer["id"]
    return id


async def test_failures_are_grouped_by_endpoint_and_cause_until_they_arrive(
    here: World, client: httpx.AsyncClient, shop: Subscriber
) -> None:
    """A group has a count and the first and the last time. A replay of the group empties it, and
    the same replay again finds nothing.
    """
    endpoint = await endpoint_for(client, shop)
    made = await dead(here, client, 2)
    shop.answer = lambda _n, _request: Response(status_code=500)
    made += await dead(here, client, 1)
    groups = got(await client.get("/v1/deliveries/groups"))["data"]
    assert [(each["endpoint"], each["cause"], each["count"]) for each in groups] == [
        (endpoint, "answered 500", 1),
        (endpoint, "answered 503", 2),
    ]
    times = [each["attempts"][0]["time"] for each in made[:2]]
    assert groups[1]["first_seen"] == min(times)
    assert groups[1]["last_seen"] == max(each["attempts"][-1]["time"] for each in made[:2])
    assert {each["cause"] for each in made[:2]} == {"answered 503"}
    found = got(await client.get("/v1/deliveries", params={"error": "answered 500"}))["data"]
    assert [each["event"] for each in found] == [made[2]["event"]]
    found = got(await client.get("/v1/deliveries", params={"status": "503"}))["data"]
    assert {each["event"] for each in found} == {each["event"] for each in made[:2]}
    shop.answer = lambda _n, _request: DONE
    shop.received.clear()
    replay = await replayed(client, 2, endpoint=endpoint, error="answered 503")
    shown = await reached(client, replay, delivered=2, state="done", made=2)
    assert (shown["endpoint"], shown["filter"]["error"]) == (endpoint, "answered 503")
    assert {each.headers["webhook-id"] for each in shop.received} == {
        each["event"] for each in made[:2]
    }
    groups = got(await client.get("/v1/deliveries/groups"))["data"]
    assert [(each["cause"], each["count"]) for each in groups] == [("answered 500", 1)]
    assert await count_of(client, endpoint=endpoint, error="answered 503") == 0
    await reached(client, await replayed(client, 1), delivered=1)
    assert got(await client.get("/v1/deliveries/groups")) == {"data": []}


async def test_each_field_of_the_filter_narrows_it(
    here: World, client: httpx.AsyncClient, shop: Subscriber
) -> None:
    endpoint = await endpoint_for(client, shop)
    (old,) = await dead(here, client, 1)
    (new,) = await dead(here, client, 1, "image.task.completed")
    other = await endpoint_for(client, shop, types=["image.task.expired"])
    assert await count_of(client) == 2
    assert await count_of(client, endpoint=endpoint) == 2
    assert await count_of(client, endpoint=other) == 0
    assert await count_of(client, type=FAILED) == 1
    assert await count_of(client, type="image.task.expired") == 0
    assert await count_of(client, type="image.task.*") == 2
    assert await count_of(client, type="task.*") == 0
    assert await count_of(client, status=503) == 2
    assert await count_of(client, status=500) == 0
    assert await count_of(client, error="timed out") == 0
    assert await count_of(client, state="pending") == 0
    assert await count_of(client, state="dead") == 2
    assert await count_of(client, since=new["created_at"]) == 1
    assert await count_of(client, until=new["created_at"]) == 1
    assert await count_of(client, until=old["created_at"]) == 0


async def test_a_pending_delivery_is_sent_now_and_a_delivered_one_again(
    here: World, client: httpx.AsyncClient, shop: Subscriber
) -> None:
    endpoint = await endpoint_for(client, shop)
    shop.answer = lambda _n, _request: DONE
    ids = await emitted(here.context.resources.store, 2, FAILED, await owner_of(client))
    delivered = {"state": "delivered"}

    async def arrived() -> bool:
        return len(got(await client.get("/v1/deliveries", params=delivered))["data"]) == 2

    await wait_until(arrived)
    chosen = {"endpoint": endpoint, "type": "image.task.*", **delivered}
    replay = await replayed(client, 2, **chosen)
    await reached(client, replay, delivered=2, made=2)
    sent = [each.headers["webhook-id"] for each in shop.received]
    assert sorted(sent) == sorted(ids * 2)


@pytest.mark.parametrize(
    ("param", "chosen"),
    [
        ("filter.state", {"state": "lost"}),
        ("filter.status", {"status": 99}),
        ("filter.type", {"type": "images.*"}),
        ("filter.since", {"since": "yesterday"}),
        ("filter.owner", {"owner": "other"}),
        ("filter.error", {"error": "x" * 65}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_wrong_filter_is_refused_by_name(
    client: httpx.AsyncClient, param: str, chosen: JSON
) -> None:
    answer = await client.post("/v1/replays", json={"filter": chosen})
    error = refused(answer, 400, "invalid_request", param=param)
    assert "it has filter" not in error["message"], "these are the fields around the filter"


async def test_another_owner_sees_and_replays_nothing(
    here: World, client: httpx.AsyncClient, shop: Subscriber
) -> None:
    endpoint = await endpoint_for(client, shop)
    (failed,) = await dead(here, client, 1)
    async with here.owner() as stranger:
        assert got(await stranger.get("/v1/deliveries/groups")) == {"data": []}
        assert await count_of(stranger) == 0
        body = {"filter": {"endpoint": endpoint}}
        answer = await stranger.post("/v1/replays", json=body)
        refused(answer, 404, "endpoint_not_found")
        path = f"/v1/deliveries/{failed['id']}/request"
        refused(await stranger.get(path), 404, "delivery_not_found")
        path = f"/v1/endpoints/{endpoint}/health"
        refused(await stranger.get(path), 404, "endpoint_not_found")
        replay = await replayed(client, 1)
        refused(await stranger.get(f"/v1/replays/{replay}"), 404, "replay_not_found")
        refused(await stranger.delete(f"/v1/replays/{replay}"), 404, "replay_not_found")
    owner = await owner_of(client)
    groups = got(await here.client.get("/v1/deliveries/groups", params={"owner": owner}))
    assert isinstance(groups["data"], list)


async def test_a_cancelled_replay_names_its_deliveries_as_failures(
    here: World, client: httpx.AsyncClient, shop: Subscriber
) -> None:
    endpoint = await endpoint_for(client, shop)
    await dead(here, client, 1)
    paused = {"status": "paused"}
    got(await client.patch(f"/v1/endpoints/{endpoint}", json=paused))
    replay = await replayed(client, 1)
    await reached(client, replay, pending=1, state="done")
    assert (await client.delete(f"/v1/replays/{replay}")).status_code == 204
    (group,) = got(await client.get("/v1/deliveries/groups"))["data"]
    assert (group["cause"], group["count"]) == ("replay cancelled", 1)
    got(await client.patch(f"/v1/endpoints/{endpoint}", json={"status": "enabled"}))
    shop.answer = lambda _n, _request: DONE
    await reached(client, await replayed(client, 1), delivered=1)


async def test_a_disabled_endpoint_gets_no_replay(
    here: World, client: httpx.AsyncClient, shop: Subscriber
) -> None:
    endpoint = await endpoint_for(client, shop)
    await dead(here, client, 1)
    got(await client.patch(f"/v1/endpoints/{endpoint}", json={"status": "disabled"}))
    answer = await client.post("/v1/replays", json={"filter": {"endpoint": endpoint}})
    refused(answer, 409, "endpoint_disabled")
    assert (await reached(client, await replayed(client, 1), state="done"))["made"] == 0


async def test_the_request_of_a_delivery_is_signed_as_it_would_be_sent(
    here: World, client: httpx.AsyncClient, shop: Subscriber
) -> None:
    """Sent by hand, it is what the worker sends."""
    endpoint = got(await client.post("/v1/endpoints", json={"url": f"{shop.url}/"}), 201)
    (failed,) = await dead(here, client, 1)
    shown = got(await client.get(f"/v1/deliveries/{failed['id']}/request"))
    assert (shown["method"], shown["url"]) == ("POST", f"{shop.url}/")
    async with httpx.AsyncClient() as curl:
        await curl.post(shown["url"], headers=shown["headers"], content=shown["body"])
    assert shop.received[-1].signed_by(endpoint["secret"])
    assert shop.received[-1].body == shop.received[0].body


async def test_a_test_may_have_an_edited_event_and_health_counts_attempts(
    here: World, client: httpx.AsyncClient, shop: Subscriber
) -> None:
    endpoint = await endpoint_for(client, shop)
    await dead(here, client, 1)
    shop.answer = lambda _n, _request: DONE
    await reached(client, await replayed(client, 1), delivered=1)
    sample = {"type": FAILED, "data": {"id": "task_sample", "owner": "me"}}
    sent = got(await client.post(f"/v1/endpoints/{endpoint}/test", json=sample))
    assert sent["status"] == 204
    body = httpx.Response(200, content=shop.received[-1].body).json()
    assert (body["type"], body["subject"], body["data"]) == (FAILED, "task_sample", sample["data"])
    health = got(await client.get(f"/v1/endpoints/{endpoint}/health"))
    assert (health["attempts"], health["success_rate"]) == (3, 0.3333)
    assert health["p50_ms"] <= health["p95_ms"]
    assert sum(hour["ok"] + hour["failed"] for hour in health["hours"]) == 3
    assert len(health["hours"]) == 24
