"""Deliveries when the store fails during recording, when our own resolver fails, and when a name
does not exist.
"""

import asyncio
import socket
import sqlite3
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, update
from sqlalchemy.exc import OperationalError
from starlette.responses import Response
from structlog.testing import capture_logs

from service.db.sqlite import SqliteStore
from service.db.tables import deliveries, events
from service.db.transaction import Lease, Transaction
from service.events import delivery_worker
from service.events.delivery_worker import DeliveryWorker
from service.queue import limiter, worker
from tests.api import got
from tests.outbox import emitted
from tests.upstream import After
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber, world

pytestmark = pytest.mark.slow

JSON = dict[str, Any]
DONE, BROKEN = Response(status_code=204), Response(status_code=500)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOOK_S", 0.05)
    monkeypatch.setattr(delivery_worker, "RECORD_S", 0.05)


@pytest.fixture
async def shop() -> AsyncIterator[Subscriber]:
    async with subscriber() as made:
        yield made


async def subscribed(here: World, url: str) -> JSON:
    return got(await here.client.post("/v1/endpoints", json={"url": url}), 201)


async def only(here: World, **wanted: object) -> JSON:
    """Waits until the only delivery was attempted and has the wanted fields."""

    async def look() -> JSON | None:
        (found,) = got(await here.client.get("/v1/deliveries"))["data"]
        return found if found["attempts"] and wanted.items() <= found.items() else None

    found: JSON = await wait_until(look)
    return found


# --- the store
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 500])
async def test_what_could_not_be_recorded_is_not_sent_again(
    tmp_path: Path, shop: Subscriber, status: int
) -> None:
    """The store is away while the worker records an attempt. The worker logs it, retries until the
    store is back, and sends the request once.
    """
    async with world(tmp_path, delivery_schedule=(600,)) as here:
        store, refused = here.context.resources.store, 0
        assert isinstance(store, SqliteStore)

        def full(_: Connection) -> None:
            nonlocal refused
            refused += 1
            raise OperationalError(
                "COMMIT", {}, sqlite3.OperationalError("database or disk is full")
            )

        async def fill_the_disk() -> None:
            event.listen(store._engine, "commit", full)

        shop.answer = lambda _n, _request: After(fill_the_disk, Response(status_code=status))
        await subscribed(here, shop.url)
        with capture_logs() as lines:
            await emitted(store)
            await wait_until(
                lambda: (
                    len(
                        [
                            line
                            for line in lines
                            if line["event"] == "worker.failed" and line["stage"] == "deliver"
                        ]
                    )
                    > 2
                )
            )
        event.remove(store._engine, "commit", full)
        found = await only(here, state="delivered" if status == 204 else "pending")
        assert refused > 2
        assert [each["status"] for each in found["attempts"]] == [status]
        assert len(shop.received) == 1


def leased(tx: Transaction, claimed: Sequence[Lease]) -> list[None]:
    """A store operation that puts the rows under these leases."""
    for lease in claimed:
        values = {
            "lease_until": tx.now + 60_000,
            "lease_owner": tx.process,
            "fence": lease.fence,
            "attempts": lease.attempts,
        }
        tx.connection.execute(update(deliveries).where(deliveries.c.id == lease.key).values(values))
    return [None] * len(claimed)


async def due(still: World, shop: Subscriber) -> Lease:
    """A new delivery under a lease, without running workers."""
    endpoint = await subscribed(still, shop.url)
    await emitted(still.context.resources.store)
    (found,) = got(await still.client.get("/v1/deliveries", params={"endpoint": endpoint["id"]}))[
        "data"
    ]
    lease = Lease("deliver", found["id"], 1, 1)
    await still.context.resources.store.write(leased, lease)
    return lease


async def state(still: World, lease: Lease) -> tuple[str, int]:
    found = got(await still.client.get(f"/v1/deliveries/{lease.key}"))
    return found["state"], len(found["attempts"])


def forget(tx: Transaction, ids: Sequence[str]) -> list[None]:
    """A store operation that deletes events early."""
    tx.connection.execute(events.delete().where(events.c.id.in_(ids)))
    return [None] * len(ids)


async def test_a_delivery_whose_event_is_gone_is_dead(still: World, shop: Subscriber) -> None:
    """Without its event there is nothing to send, also on a manual retry. A delivery that has ended
    or does not exist is left unchanged.
    """
    worker = DeliveryWorker(still.context.sender, (600.0,), 0)
    lease = await due(still, shop)
    found = got(await still.client.get(f"/v1/deliveries/{lease.key}"))
    await still.context.resources.store.write(forget, found["event"])
    assert (await still.client.post(f"/v1/deliveries/{lease.key}/retry")).json()["error"][
        "code"
    ] == "nothing_to_send"
    for _ in range(2):
        await worker.run(lease)
        assert await state(still, lease) == ("dead", 0)
    await worker.run(Lease("deliver", "dlv_gone", 1, 1))
    assert shop.received == []


async def test_an_endpoint_that_is_paused_while_a_delivery_waits_gets_nothing(
    still: World, shop: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delivery waits in its process for a free slot, and is read again when it has one. If it
    is not sent, it frees the slot.
    """
    monkeypatch.setattr(limiter, "PATIENCE_S", 60)
    worker = DeliveryWorker(still.context.sender, (600.0,), 0)
    lease = await due(still, shop)
    endpoint: str = got(await still.client.get(f"/v1/deliveries/{lease.key}"))["endpoint"]
    while worker.limiter.acquire(endpoint, first=True) is None:
        pass
    running = asyncio.create_task(worker.run(lease))
    await wait_until(lambda: worker.limiter._loads[endpoint].first.waiting)
    got(await still.client.patch(f"/v1/endpoints/{endpoint}", json={"status": "paused"}))
    worker.limiter.record(endpoint, 0.01, first=True, healthy=None)
    await running
    assert shop.received == []
    assert await state(still, lease) == ("pending", 0)
    assert worker.limiter.acquire(endpoint, first=True) is None


# --- names
# --------------------------------------------------------------------------------------------------


def failing(here: World, *errors: int) -> list[str]:
    """Makes lookups of endpoint names fail with these errors in turn. Returns the list of names
    that were looked up.
    """
    asked = list[str]()

    async def resolve(host: str) -> Sequence[str]:
        asked.append(host)
        if len(asked) <= len(errors):
            raise socket.gaierror(errors[len(asked) - 1], "no answer")
        return ["127.0.0.1"]

    here.context.resources.endpoints._resolve = resolve
    return asked


async def test_our_own_resolver_is_not_the_endpoints_fault(
    tmp_path: Path, shop: Subscriber
) -> None:
    """No name server answered. The delivery is retried by its schedule, no failure time runs
    against the endpoint, and it keeps its slots.
    """
    async with world(
        tmp_path, endpoint_disable_after_s=0.01, delivery_schedule=(0.02,) * 6
    ) as here:
        url = shop.url.replace("127.0.0.1", "shop.test")
        endpoint = await subscribed(here, f"{url}/")
        failing(here, *[socket.EAI_AGAIN] * 5)
        await emitted(here.context.resources.store)
        found = await only(here, state="delivered")
        assert [each["status"] for each in found["attempts"]] == [None] * 5 + [204]
        assert {each["error"].partition(":")[0] for each in found["attempts"][:5]} == {"NoRoute"}
        shown = got(await here.client.get(f"/v1/endpoints/{endpoint['id']}"))
        assert (shown["status"], shown["disabled_at"]) == ("enabled", None)


async def test_a_name_that_nobody_has_is_the_endpoints_fault(tmp_path: Path) -> None:
    """A name server answered that the name does not exist. The endpoint has failed, and it is
    disabled in time.
    """
    async with world(
        tmp_path, endpoint_disable_after_s=0.01, delivery_schedule=(0.02,) * 6
    ) as here:
        endpoint = await subscribed(here, "http://gone.test/")
        asked = failing(here, *[socket.EAI_NONAME] * 100)
        await emitted(here.context.resources.store)
        found = await only(here, state="dead")
        assert {each["error"].partition(":")[0] for each in found["attempts"]} == {"NotConnected"}
        assert 1 < len(found["attempts"]) == len(asked) < 7
        shown = got(await here.client.get(f"/v1/endpoints/{endpoint['id']}"))
        assert (shown["status"], shown["disabled_reason"][:26]) == (
            "disabled",
            "every attempt failed since",
        )


# --- what an answer means
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 226, 299])
async def test_any_2xx_is_success(here: World, shop: Subscriber, status: int) -> None:
    shop.answer = lambda _n, _request: Response(status_code=status)
    endpoint = await subscribed(here, shop.url)
    await emitted(here.context.resources.store)

    async def look() -> Any:
        found = got(
            await here.client.get(
                "/v1/deliveries", params={"endpoint": endpoint["id"], "state": "delivered"}
            )
        )["data"]
        return found and found[0]

    assert [each["status"] for each in (await wait_until(look))["attempts"]] == [status]
    await here.client.delete(f"/v1/endpoints/{endpoint['id']}")


@pytest.mark.parametrize(
    ("status", "header", "least", "most"),
    [
        (503, "1000000", 3600, 3601),
        (429, "Fri, 31 Dec 9999 23:59:59 GMT", 3600, 3601),
        (429, "1", 600, 721),
        (503, "0", 600, 721),
        (429, "soon", 600, 721),
        (503, "-5", 600, 721),
        (500, "3000", 600, 721),
        (301, "3000", 600, 721),
    ],
)
async def test_retry_after_waits_at_most_an_hour_and_never_less_than_the_schedule(
    tmp_path: Path, shop: Subscriber, status: int, header: str, least: float, most: float
) -> None:
    """Only 429 and 503 count. An unreadable header is ignored."""
    shop.answer = lambda _n, _request: Response(status_code=status, headers={"retry-after": header})
    async with world(tmp_path, delivery_schedule=(600,)) as here:
        await subscribed(here, shop.url)
        with capture_logs() as lines:
            await emitted(here.context.resources.store)
            (line,) = await wait_until(
                lambda: [line for line in lines if line["event"] == "delivery.attempted"]
            )
        assert least <= line["wait_s"] <= most


async def test_types_have_wildcards(here: World, shop: Subscriber) -> None:
    """`*` matches every type, and a prefix with `.*` matches all types below it. Each endpoint gets
    one delivery per event.
    """
    wanted = {
        "*": 3,
        "image.*": 2,
        "image.task.*": 1,
        "image.task.failed": 1,
        "image.at_risk": 1,
        "endpoint.*": 1,
        "delivery.*": 0,
    }
    made = {}
    for types in [[pattern] for pattern in wanted] + [["*", "image.*", "image.task.failed"]]:
        answer = got(
            await here.client.post("/v1/endpoints", json={"url": f"{shop.url}/", "types": types}),
            201,
        )
        made[answer["id"]] = wanted.get(types[0], 0) if len(types) == 1 else 3
    for type in ("image.task.failed", "image.at_risk", "endpoint.recovered"):
        await emitted(here.context.resources.store, 1, type)
    await wait_until(lambda: len(shop.received) == sum(made.values()))
    for id, count in made.items():
        assert (
            len(got(await here.client.get("/v1/deliveries", params={"endpoint": id}))["data"])
            == count
        )
        await here.client.delete(f"/v1/endpoints/{id}")
