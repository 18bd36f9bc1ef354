"""An owner's manual actions on endpoints and deliveries: secret rotation, test sends, manual
retries.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from structlog.testing import capture_logs

from tests.api import UNTIL_DONE, got, refused, submitted
from tests.outbox import emitted
from tests.upstream import After
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber, world

pytestmark = pytest.mark.slow

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
    answer = await client.post(
        "/v1/endpoints",
        json={"url": f"{shop.url}/hooks", "types": ["image.task.completed"], **more},
    )
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
    return shop.received[number].signed_by(secret)


async def test_both_secrets_sign_while_they_overlap(here: World, shop: Subscriber) -> None:
    """During the overlap the same request verifies with the old and with the new secret. After the
    overlap only the newest secret signs.
    """
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        rotated = got(await client.post(f"/v1/endpoints/{endpoint['id']}/rotate"))
        assert rotated.keys() == endpoint.keys()
        assert rotated["secret"] != endpoint["secret"]
        await client.post(f"/v1/endpoints/{endpoint['id']}/test")
        assert signed(shop, 0, endpoint["secret"])
        assert signed(shop, 0, rotated["secret"])
        last = got(
            await client.post(f"/v1/endpoints/{endpoint['id']}/rotate", json={"overlap_s": 0})
        )
        await client.post(f"/v1/endpoints/{endpoint['id']}/test")
        assert [
            signed(shop, 1, secret)
            for secret in (endpoint["secret"], rotated["secret"], last["secret"])
        ] == [False, False, True]
        refused(
            await client.post(f"/v1/endpoints/{endpoint['id']}/rotate", json={"overlap_s": -1}),
            400,
            "invalid_request",
            param="overlap_s",
        )


async def test_a_test_send_answers_the_attempt(here: World, shop: Subscriber) -> None:
    """A test send is signed like an event and appears in no list. Only an admin sees the
    subscriber's answer.
    """
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        attempt = got(await client.post(f"/v1/endpoints/{endpoint['id']}/test"))
        assert (attempt["status"], attempt["error"], attempt["answer"]) == (204, None, None)
        assert shop.received[0].headers["webhook-id"].startswith("evt_")
        shop.answer = lambda _n, _request: Response("no", status_code=500)
        attempt = got(await here.client.post(f"/v1/endpoints/{endpoint['id']}/test"))
        assert (attempt["status"], attempt["error"], attempt["answer"]) == (
            500,
            "answered 500",
            "no",
        )
        assert got(await client.get("/v1/events"))["data"] == []
        assert got(await client.get("/v1/deliveries"))["data"] == []


async def test_a_retry_by_hand_is_one_attempt_now(here: World, shop: Subscriber) -> None:
    """A manual retry sends a dead or a delivered delivery once more, with the same id, and returns
    the result of that attempt.
    """
    shop.answer = lambda n, _request: Response(status_code=500 if n < 3 else 204)
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        await submitted(client, UNTIL_DONE)
        [dead] = await deliveries(client, 1, state="dead")
        assert len(dead["attempts"]) == 2
        still = got(await client.post(f"/v1/deliveries/{dead['id']}/retry"))
        assert (still["state"], len(still["attempts"]), still["attempts"][-1]["status"]) == (
            "dead",
            3,
            500,
        )
        for count in (4, 5):
            delivered = got(await client.post(f"/v1/deliveries/{dead['id']}/retry"))
            assert (
                delivered["state"],
                len(delivered["attempts"]),
                delivered["attempts"][-1]["error"],
            ) == ("delivered", count, None)
        assert len({request.headers["webhook-id"] for request in shop.received}) == 1
        assert (await client.delete(f"/v1/endpoints/{endpoint['id']}")).status_code == 204
        refused(await client.post(f"/v1/deliveries/{dead['id']}/retry"), 409, "nothing_to_send")


async def test_the_result_of_a_manual_retry_is_logged_counted_and_applied(
    here: World, shop: Subscriber
) -> None:
    """A manual retry has the same effects as a planned attempt. An answer of 410 disables the
    endpoint.
    """
    shop.answer = lambda n, _request: Response(status_code=204 if n == 0 else 410)
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        task = await submitted(client, UNTIL_DONE)
        [done] = await deliveries(client, 1, state="delivered")
        counter = here.context.resources.metrics.deliveries.labels("gone")
        before = counter._value.get()
        with capture_logs() as lines:
            assert (
                len(got(await client.post(f"/v1/deliveries/{done['id']}/retry"))["attempts"]) == 2
            )
        assert counter._value.get() == before + 1
        tried = [line for line in lines if line["event"] == "delivery.attempted"]
        (line,) = [line for line in tried if line["status"] == 410]
        figures = [
            line[name]
            for name in ("task_id", "endpoint_id", "event_id", "status", "result", "attempt")
        ]
        assert figures == [task["id"], endpoint["id"], done["event"], 410, "gone", 0]
        assert got(await client.get(f"/v1/endpoints/{endpoint['id']}"))["status"] == "disabled"
        assert got(await client.get(f"/v1/deliveries/{done['id']}"))["state"] == "delivered"


async def test_each_of_several_concurrent_rotations_answers_a_secret_that_signs(
    here: World, shop: Subscriber
) -> None:
    """Concurrent rotations lose no secret: every secret that an answer showed signs during the
    overlap.
    """
    async with here.owner() as client:
        endpoint = await subscribed(client, shop)
        path = f"/v1/endpoints/{endpoint['id']}"
        answers = await asyncio.gather(*(client.post(f"{path}/rotate") for _ in range(4)))
        shown = [endpoint["secret"], *(got(answer)["secret"] for answer in answers)]
        assert len(set(shown)) == 5
        await client.post(f"{path}/test")
        assert all(signed(shop, 0, secret) for secret in shown)
        assert len(shop.received[0].headers["webhook-signature"].split(" ")) == 6


async def test_secrets_are_encrypted_at_rest(here: World, shop: Subscriber) -> None:
    """The store's files contain no secret of an endpoint or an owner in the clear, old or new."""
    body = {"owner": "secretive", "scopes": ["submit", "subscribe"]}
    key = got(await here.client.post("/v1/keys", json=body), 201)
    async with here.with_key(key["key"]) as client:
        endpoint = await subscribed(client, shop)
        rotated = got(await client.post(f"/v1/endpoints/{endpoint['id']}/rotate"))
        own = got(await client.post("/v1/keys/rotate-secret"))
    stored = b"".join(path.read_bytes() for path in here.settings.data_dir.glob("darkroom.db*"))
    assert endpoint["id"].encode() in stored
    for secret in (
        endpoint["secret"],
        rotated["secret"],
        key["callback_secret"],
        own["callback_secret"],
    ):
        assert secret.removeprefix("whsec_").rstrip("=").encode() not in stored


@pytest.mark.parametrize("status", ["paused", "disabled"])
async def test_a_retry_by_hand_is_sent_whatever_the_endpoints_status(
    here: World, shop: Subscriber, status: str
) -> None:
    """A manual retry sends and delivers a delivery that a paused endpoint holds, and a delivery
    that is dead because its endpoint was disabled.
    """
    async with here.owner(name=f"hand-{status}") as client:
        path = f"/v1/endpoints/{(await subscribed(client, shop))['id']}"
        got(await client.patch(path, json={"status": "paused"}))
        await emitted(here.context.resources.store, 1, "image.task.completed", f"hand-{status}")
        [held] = await deliveries(client, 1)
        got(await client.patch(path, json={"status": status}))
        assert (
            got(await client.get(f"/v1/deliveries/{held['id']}"))["state"]
            == {"paused": "pending", "disabled": "dead"}[status]
        )
        got(await client.post(f"{path}/test"))
        done = got(await client.post(f"/v1/deliveries/{held['id']}/retry"))
        assert (
            done["state"],
            done["next_attempt_at"],
            [each["status"] for each in done["attempts"]],
        ) == ("delivered", None, [204])
        assert [request.headers["webhook-id"] for request in shop.received][1:] == [held["event"]]
        assert got(await client.get(path))["status"] == status
        got(await client.patch(path, json={"status": "enabled"}))
        await deliveries(client, 1, state="delivered")
        assert len(shop.received) == 2


async def test_a_retry_by_hand_while_an_attempt_is_under_way_is_sent_too(
    here: World, shop: Subscriber
) -> None:
    """A manual retry during a running attempt sends its own request. The delivery becomes
    delivered, and the result of the running attempt no longer changes its state.
    """
    released = asyncio.Event()
    shop.answer = lambda n, _request: (
        After(released.wait, Response(status_code=500)) if n == 0 else Response(status_code=204)
    )
    async with here.owner(name="impatient") as client:
        await subscribed(client, shop)
        await emitted(here.context.resources.store, 1, "image.task.completed", "impatient")
        await received(shop, 1)
        [pending] = await deliveries(client, 1, state="pending")
        assert (
            got(await client.post(f"/v1/deliveries/{pending['id']}/retry"))["state"] == "delivered"
        )
        released.set()

        async def both() -> JSON | None:
            found = got(await client.get(f"/v1/deliveries/{pending['id']}"))
            return found if len(found["attempts"]) == 2 else None

        found = await wait_until(both)
        assert (found["state"], sorted(each["status"] for each in found["attempts"])) == (
            "delivered",
            [204, 500],
        )
        assert len({request.headers["webhook-id"] for request in shop.received}) == 1


async def test_attempts_by_hand_are_bounded(
    here: World, shop: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner whose subscriber hangs gets 429 with `Retry-After`. The test sends of another owner
    continue up to the limit of the process, which is 503.
    """
    monkeypatch.setattr(here.context.shedder.manual, "total", 3)
    released = asyncio.Event()
    shop.answer = lambda _n, _request: After(released.wait, Response(status_code=204))
    async with here.owner() as client, here.owner() as other:
        path, others = [
            f"/v1/endpoints/{(await subscribed(each, shop))['id']}/test" for each in (client, other)
        ]
        hanging = [asyncio.create_task(client.post(path)) for _ in range(2)]
        await received(shop, 2)
        refused(await client.post(path), 429, "rate_limit_exceeded")
        hanging.append(asyncio.create_task(other.post(others)))
        await received(shop, 3)
        refused(await other.post(others), 503, "overloaded")
        released.set()
        assert [got(await each)["status"] for each in hanging] == [204] * 3
        assert got(await client.post(path))["status"] == 204


async def test_another_owners_endpoints_and_deliveries_are_not_found(
    here: World, shop: Subscriber
) -> None:
    """Every request for another owner's endpoint or delivery is answered 404, and sends or changes
    nothing. Without the scope `subscribe` the answer is 403. An admin sees the objects of all
    owners.
    """
    async with (
        here.owner(name="mine") as client,
        here.owner() as stranger,
        here.owner("read", "submit", name="mine") as reader,
    ):
        endpoint = await subscribed(client, shop)
        await emitted(here.context.resources.store, 1, "image.task.completed", "mine")
        [delivery] = await deliveries(client, 1, state="delivered")
        path, one = f"/v1/endpoints/{endpoint['id']}", f"/v1/deliveries/{delivery['id']}"
        asked = [
            ("GET", path),
            ("PATCH", path),
            ("DELETE", path),
            ("POST", f"{path}/rotate"),
            ("POST", f"{path}/test"),
        ]
        asked += [("POST", f"{path}/replay"), ("GET", one), ("POST", f"{one}/retry")]
        for method, where in asked:
            code = "endpoint_not_found" if where.startswith(path) else "delivery_not_found"
            refused(await stranger.request(method, where, json={}), 404, code)
            refused(await reader.request(method, where, json={}), 403, "permission_denied")
        assert (
            got(await stranger.get("/v1/endpoints"))["data"]
            == got(await stranger.get("/v1/deliveries"))["data"]
            == []
        )
        assert len(shop.received) == 1
        assert got(await here.client.get(path))["id"] == endpoint["id"]
        assert got(await here.client.get(one))["id"] == delivery["id"]
