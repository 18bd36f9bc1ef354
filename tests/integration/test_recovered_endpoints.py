"""A receiver is back after an outage: what waits for it is sent at once, and nothing twice."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from service.events import replays as pipeline
from service.queue import worker
from tests.api import got, reached
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import Received, Subscriber, World, subscriber, world

pytestmark = pytest.mark.slow

JSON = dict[str, Any]
HOURS = "3600,7200,36000"  # no retry of the schedule comes within a test
DONE = Response(status_code=204)
BROKEN: dict[str, Response] = {
    "500": Response(status_code=500),
    "503 with a wait": Response(status_code=503, headers={"retry-after": "1"}),
    "redirect": Response(status_code=302, headers={"location": "/"}),
    "404": Response("no such app", 404),
    "401": Response(status_code=401),
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(pipeline, "EVERY_MS", 20)
        yield


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("recovered"), delivery_schedule=HOURS) as made:
        yield made


class Shop:
    """An owner with one endpoint, whose server is down until it is up."""

    def __init__(
        self, here: World, client: httpx.AsyncClient, name: str, server: Subscriber
    ) -> None:
        self.client, self.name, self.server = client, name, server
        self._store = here.context.resources.store
        self.endpoint = ""
        server.answer = self._answer
        self.down: Response | None = BROKEN["500"]

    def _answer(self, _: int, _request: Received) -> Response:
        return self.down or DONE

    async def emit(self, count: int = 1) -> list[str]:
        return await emitted(self._store, count, owner=self.name)

    async def deliveries(self, **query: str) -> list[JSON]:
        query = {"limit": "1000", "endpoint": self.endpoint, **query}
        found: list[JSON] = got(await self.client.get("/v1/deliveries", params=query))["data"]
        return found

    async def failed(self, count: int) -> list[str]:
        """Emits events that the server refuses once. They wait for hours, or for the pause that the
        server asked for.
        """
        events = await self.emit(count)
        least = 1 if self.down and "retry-after" in self.down.headers else count
        await self.until(
            lambda found: (
                sum(bool(each["attempts"]) for each in found if each["event"] in events) >= least
            )
        )
        return events

    async def until(self, holds: Callable[[list[JSON]], bool]) -> None:
        async def look() -> bool:
            return holds(await self.deliveries())

        await wait_until(look)

    async def delivered(self, count: int) -> None:
        await self.until(
            lambda found: [each["state"] for each in found].count("delivered") == count
        )

    def accepted(self) -> Counter[str]:
        return Counter(each.headers["webhook-id"] for each in self.server.received)

    async def replay(self, **body: Any) -> JSON:
        return got(await self.client.post(f"/v1/endpoints/{self.endpoint}/replay", json=body))


@pytest.fixture
async def shop(here: World, request: pytest.FixtureRequest) -> AsyncIterator[Shop]:
    name = "".join(char if char.isalnum() else "-" for char in request.node.name.lower())
    name = name[-60:].strip("-")
    async with subscriber() as server, here.owner(name=name) as client:
        made = Shop(here, client, name, server)
        body = {"url": f"{server.url}/"}
        made.endpoint = got(await client.post("/v1/endpoints", json=body), 201)["id"]
        yield made


@pytest.mark.parametrize("broken", BROKEN)
async def test_the_first_success_sends_all_that_waits(shop: Shop, broken: str) -> None:
    """Their retries were planned for hours later. Each event arrives once after the outage."""
    shop.down = BROKEN[broken]
    waiting = await shop.failed(20)
    shop.down = None
    shop.server.received.clear()
    (new,) = await shop.emit()
    await shop.delivered(21)
    assert shop.accepted() == dict.fromkeys([*waiting, new], 1)


async def test_a_success_by_hand_sends_all_that_waits(shop: Shop) -> None:
    waiting = await shop.failed(5)
    shop.down = None
    shop.server.received.clear()
    first = (await shop.deliveries())[0]
    got(await shop.client.post(f"/v1/deliveries/{first['id']}/retry"))
    await shop.delivered(5)
    assert shop.accepted() == dict.fromkeys(waiting, 1)


async def test_a_corrected_address_gets_all_that_waits(shop: Shop) -> None:
    waiting = await shop.failed(5)
    async with subscriber() as other:
        change = {"url": f"{other.url}/new"}
        got(await shop.client.patch(f"/v1/endpoints/{shop.endpoint}", json=change))
        await shop.delivered(5)
        assert Counter(each.headers["webhook-id"] for each in other.received) == dict.fromkeys(
            waiting, 1
        )


async def test_a_server_that_fails_again_gets_the_rest_by_the_schedule(shop: Shop) -> None:
    """An attempt that was brought forward in vain moves no delivery towards its end."""
    await shop.failed(10)
    planned = times(await shop.deliveries())
    shop.server.answer = lambda n, _: DONE if n == 10 else BROKEN["500"]
    await shop.emit()
    await shop.until(
        lambda found: len([each for each in found if len(each["attempts"]) == 2]) == 10
    )
    after = times(await shop.deliveries(state="pending"))
    assert after.keys() == planned.keys()
    assert all(abs(after[id] - planned[id]) < timedelta(seconds=1) for id in planned)


def times(found: list[JSON]) -> dict[str, datetime]:
    return {each["id"]: datetime.fromisoformat(each["next_attempt_at"]) for each in found}


# --- replays of what was not delivered ---


async def test_a_replay_sends_pending_and_dead_deliveries_and_nothing_twice(shop: Shop) -> None:
    """Without `only` it covers what the endpoint has not accepted. No second delivery is made for a
    pending one.
    """
    shop.down = None
    await shop.emit(2)
    await shop.delivered(2)
    path, gone = f"/v1/endpoints/{shop.endpoint}", BROKEN["500"]
    shop.down = gone
    dead = await shop.failed(2)
    await shop.until(lambda found: len(found) == 4)
    for status in ("disabled", "enabled"):
        got(await shop.client.patch(path, json={"status": status}))
    pending = await shop.failed(3)
    assert await shop.replay(dry_run=True) == {"id": None, "count": 5}
    assert (await shop.replay(dry_run=True, only="undelivered"))["count"] == 5
    assert (await shop.replay(dry_run=True, only="dead"))["count"] == 2
    assert (await shop.replay(dry_run=True, only="all"))["count"] == 7
    shop.down = None
    shop.server.received.clear()
    replay = await shop.replay()
    assert replay["count"] == 5

    shown = await reached(shop.client, replay["id"], delivered=5, state="done")
    assert (shown["only"], shown["made"]) == ("undelivered", 5)
    assert shop.accepted() == dict.fromkeys([*dead, *pending], 1)
    assert len(await shop.deliveries()) == 2 + 2 + 2 + 3, "two dead ones have a second delivery"
    assert (await shop.replay(dry_run=True))["count"] == 0


async def test_a_pending_delivery_gets_its_whole_schedule_again(shop: Shop) -> None:
    """The server is still down. After the replay each delivery waits for its first retry."""
    await shop.failed(3)
    replay = await shop.replay()
    await shop.until(lambda found: [len(each["attempts"]) for each in found] == [2, 2, 2])
    shown = got(await shop.client.get(f"/v1/replays/{replay['id']}"))
    assert (shown["made"], shown["pending"], shown["dead"]) == (3, 3, 0)
    assert await shop.deliveries(state="pending") == await shop.deliveries()


async def test_a_cancelled_replay_leaves_pending_deliveries_as_they_were(shop: Shop) -> None:
    """They were there before it. What the replay made is dead."""
    await shop.failed(2)
    replay = await shop.replay()
    await shop.until(lambda found: [len(each["attempts"]) for each in found] == [2, 2])
    assert (await shop.client.delete(f"/v1/replays/{replay['id']}")).status_code == 204
    assert {each["state"] for each in await shop.deliveries()} == {"pending"}
    shop.down = None
    await shop.emit()
    await shop.delivered(3)


async def test_two_replays_at_once_send_nothing_twice(shop: Shop) -> None:
    waiting = await shop.failed(5)
    shop.down = None
    shop.server.received.clear()
    for _ in range(2):
        await shop.replay()
    await shop.delivered(5)
    assert shop.accepted() == dict.fromkeys(waiting, 1)


async def test_a_replay_waits_for_the_pause_that_the_endpoint_asked_for(shop: Shop) -> None:
    shop.down = Response(status_code=429, headers={"retry-after": "600"})
    await shop.failed(1)
    shop.server.received.clear()
    replay = await shop.replay()

    async def made() -> bool:
        return bool(got(await shop.client.get(f"/v1/replays/{replay['id']}"))["made"])

    await wait_until(made)
    (waiting,) = await shop.deliveries()
    assert waiting["next_attempt_at"] > waiting["attempts"][0]["time"]
    assert shop.server.received == []
