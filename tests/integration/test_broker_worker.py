"""The broker worker with a fake sink: lost leases, expired leases, errors, deleted events."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from structlog.testing import capture_logs

from service.db.tables import counters, sinks
from service.db.transaction import Transaction
from service.errors import MessageRefused, MessageTooLarge, SinkUnavailable, StoreUnavailable
from service.events import broker_worker
from service.events.broker_worker import BrokerWorker, SinkLease, lease_sinks
from service.events.feed import Entry
from tests.api import UNTIL_DONE, submitted
from tests.integration.test_brokers import emit
from tests.waiting import wait_until
from tests.world import World, world

pytestmark = pytest.mark.slow

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Played:
    """A broker in memory. It calls `on` with the number of messages it has before it accepts the
    next.
    """

    def __init__(self, on: Callable[[int], Any] = lambda _count: None) -> None:
        self.name, self.on = "played", on
        self.types: Sequence[str] = ("callback.*",)
        self.ids: list[str] = []
        self.traces: list[dict[str, str]] = []
        self.opened = 0

    async def open(self) -> None:
        self.opened += 1

    async def publish(self, entry: Entry, trace: Mapping[str, str]) -> None:
        done = self.on(len(self.ids))
        if asyncio.iscoroutine(done):
            await done
        self.ids.append(entry.id)
        self.traces.append(dict(trace))

    async def close(self) -> None:
        pass


@asynccontextmanager
async def publishing(here: World, broker: Played) -> AsyncIterator[BrokerWorker]:
    """Runs a worker that has its position in the outbox."""
    await here.context.resources.store.write(lease_sinks, broker.name)
    worker = BrokerWorker(here.context.resources, broker)
    job = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        here.context.resources.store.signals.stop()
        await job


async def all_taken(here: World, broker: Played) -> list[str]:
    ids = [event["id"] for event in await here.events()]
    await wait_until(lambda: set(broker.ids) >= set(ids))
    return ids


def lines(captured: Sequence[Any], event: str) -> list[Any]:
    return [line for line in captured if line["event"] == event]


def steal(tx: Transaction, items: Sequence[None]) -> list[None]:
    tx.connection.execute(update(sinks).values(fence=sinks.c.fence + 1, lease_owner="another"))
    return [None] * len(items)


def give(tx: Transaction, items: Sequence[None]) -> list[None]:
    tx.connection.execute(update(sinks).values(lease_until=None))
    return [None] * len(items)


def forget(tx: Transaction, items: Sequence[int]) -> list[None]:
    tx.connection.execute(
        update(counters).where(counters.c.name == "forgotten").values(value=max(items))
    )
    return [None] * len(items)


async def test_no_message_goes_when_the_lease_may_be_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of a slow broker ends early. The worker records what the broker confirmed and renews
    the lease before the next message.
    """
    monkeypatch.setattr(broker_worker, "RENEW_S", 0.0)
    slow = Played(
        lambda count: monkeypatch.setattr(broker_worker, "SPARE_S", -1.0 if count % 3 == 2 else 5.0)
    )
    plain = slow.open

    async def opened() -> None:
        monkeypatch.setattr(broker_worker, "SPARE_S", 5.0)
        await plain()

    monkeypatch.setattr(slow, "open", opened)
    async with world(tmp_path) as here, publishing(here, slow):
        await emit(here, range(10))
        assert await all_taken(here, slow) == slow.ids
        assert slow.opened >= 4


async def test_a_worker_that_lost_its_lease_records_nothing_and_stops_sending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next holder of the lease sends the same messages again, under the same ids."""
    monkeypatch.setattr(broker_worker, "OTHERS_S", 0.05)
    monkeypatch.setattr(broker_worker, "RENEW_S", 0.05)
    async with world(tmp_path) as here:
        store = here.context.resources.store
        broker = Played(lambda count: store.write(steal, None) if count == 2 else None)
        async with publishing(here, broker) as worker:
            gone = asyncio.create_task(emit(here, range(5)))
            await wait_until(lambda: worker._lease is None and len(broker.ids) >= 3)
            await gone
            before = len(broker.ids)
            await store.write(give, None)
            ids = await all_taken(here, broker)
            await wait_until(lambda: broker.ids[before:] and broker.ids[-1] == ids[-1])
            await store.write(steal, None)
            await wait_until(lambda: worker._lease is None)
    assert list(dict.fromkeys(broker.ids)) == ids
    assert set(broker.ids[before:]) & set(broker.ids[:before])


async def test_an_unexpected_error_is_logged_and_does_not_end_the_worker(tmp_path: Path) -> None:
    """An unexpected error is logged with its traceback and counted. A broker's own error is one
    line, and it is logged once however often it repeats.
    """
    faults: list[Exception] = [SinkUnavailable("away"), SinkUnavailable("away"), ValueError("odd")]

    def fail(_count: int) -> None:
        if faults:
            raise faults.pop(0)

    broker = Played(fail)
    with capture_logs() as captured:
        async with world(tmp_path) as here, publishing(here, broker) as worker:
            await emit(here, range(3))
            assert await all_taken(here, broker) == broker.ids
            await wait_until(lambda: not worker.failing)
            counted = here.context.resources.metrics.worker_faults.labels("publish")._value.get()
    told = lines(captured, "sink.failed")
    assert [line["exception"] for line in told] == ["away", "ValueError: odd"]
    assert [bool(line["exc_info"]) for line in told] == [False, True]
    assert (counted, len(lines(captured, "sink.restored"))) == (1, 1)


async def test_a_store_that_is_away_is_no_brokers_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker reports no failure of the sink, and it continues when the store is back."""
    asked: list[str] = []

    def failing(tx: Transaction, names: Sequence[str]) -> list[SinkLease | None]:
        asked.extend(names)
        if len(asked) <= 4:  # a failed batch is retried one operation at a time
            raise StoreUnavailable("away")
        return lease_sinks(tx, names)

    monkeypatch.setattr(broker_worker, "lease_sinks", failing)
    monkeypatch.setattr(broker_worker, "LOOK_S", 0.05)
    broker = Played()
    with capture_logs() as captured:
        async with world(tmp_path) as here, publishing(here, broker) as worker:
            await emit(here, range(3))
            assert await all_taken(here, broker) == broker.ids
            assert not worker.failing
    assert lines(captured, "sink.failed") == []
    assert len(asked) > 4


class Small(Played):
    """It accepts no message that has the client's `request`. While `full`, it accepts no message
    without a task either.
    """

    full = True

    async def publish(self, entry: Entry, trace: Mapping[str, str]) -> None:
        data = json.loads(entry.document)["data"]
        if data.get("request", self.full):
            self.full = len(self.ids) < 2
            raise MessageTooLarge("too large")
        await super().publish(entry, trace)


async def test_a_message_too_large_goes_without_its_request(tmp_path: Path) -> None:
    """An event without a `request` is sent unchanged until the broker accepts it, because its
    schema fixes its fields.
    """
    broker = Small()
    broker.types = ("*",)
    async with world(tmp_path) as here:
        async with publishing(here, broker):
            await submitted(here.client, UNTIL_DONE)
            await wait_until(lambda: len(broker.ids) == 2)
            await emit(here, [1])
            await wait_until(lambda: len(broker.ids) == 3)
        assert broker.ids == [event["id"] for event in await here.events()]


async def test_a_message_passes_on_the_trace_of_its_task(tmp_path: Path) -> None:
    """In its headers, as the event does in its body. An event of no task has no trace."""
    broker = Played()
    broker.types = ("*",)
    async with world(tmp_path) as here:
        async with publishing(here, broker):
            await submitted(here.client, UNTIL_DONE | {"traceparent": PARENT})
            await wait_until(lambda: len(broker.ids) == 2)
            await emit(here, [1])
            await wait_until(lambda: len(broker.ids) == 3)
        assert [event.get("traceparent") for event in await here.events()] == [PARENT] * 2 + [None]
    assert broker.traces == [{"traceparent": PARENT}] * 2 + [{}]


class Picky(Played):
    """It refuses the events with these keys, as an exchange does that has no queue for their type.
    `refusals` has the key of each refusal.
    """

    def __init__(self, *unwanted: str, error: type[MessageRefused] = MessageRefused) -> None:
        super().__init__()
        self.unwanted, self.error, self.refusals = set(unwanted), error, list[str]()

    async def publish(self, entry: Entry, trace: Mapping[str, str]) -> None:
        key = json.loads(entry.document)["data"]["key"]
        if key in self.unwanted:
            self.refusals.append(key)
            raise self.error("NO_ROUTE")
        await super().publish(entry, trace)


@pytest.mark.parametrize("error", [MessageRefused, MessageTooLarge])
async def test_an_event_that_the_broker_refuses_three_times_is_skipped(
    tmp_path: Path, error: type[MessageRefused], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events before and after it arrive in order. The skipped ones are logged and counted, and
    the connection stays open.
    """
    monkeypatch.setattr(broker_worker, "RENEW_S", 600.0)  # a renewal opens it again
    broker = Picky("n1", "n2", "n4", error=error)
    with capture_logs() as captured:
        async with world(tmp_path) as here, publishing(here, broker) as worker:
            await emit(here, range(6))
            events = await here.events()
            await wait_until(lambda: len(broker.ids) == 3)
            opened, failing = broker.opened, worker.failing
            counter = here.context.resources.metrics.sink_skipped.labels("played")
            assert counter._value.get() == 3
    ids = {event["data"]["key"]: event["id"] for event in events}
    assert broker.ids == [ids["n0"], ids["n3"], ids["n5"]]
    assert Counter(broker.refusals) == {"n1": 3, "n2": 3, "n4": 3}
    told = lines(captured, "sink.skipped")
    assert [(line["event_id"], line["type"], line["exception"]) for line in told] == [
        (ids[key], "callback.conflict", "NO_ROUTE") for key in ("n1", "n2", "n4")
    ]
    assert (opened, failing) == (1, False)


async def test_a_refused_type_waits_for_its_first_event_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue may be made in the meantime, so the first event waits between its tries. Hundreds of
    events of a type without a queue hold the others up no longer.
    """
    waits: list[int] = []

    def no_wait(refusals: int, _random: float) -> float:
        waits.append(refusals)
        return 0

    monkeypatch.setattr(broker_worker, "broker_wait", no_wait)
    broker = Picky(*(f"n{number}" for number in range(50)))
    async with world(tmp_path) as here, publishing(here, broker):
        await emit(here, range(51))
        await wait_until(lambda: broker.ids)
        assert waits == [1, 2]
        await emit(here, [0, 99])
        await wait_until(lambda: len(broker.ids) == 2)
        assert waits == [1, 2, 1, 2], "the type was accepted in between"


async def test_an_event_that_the_broker_accepts_at_last_is_not_skipped(tmp_path: Path) -> None:
    faults = [MessageRefused("NO_ROUTE"), MessageRefused("NO_ROUTE")]

    def fail(_count: int) -> None:
        if faults:
            raise faults.pop(0)

    broker = Played(fail)
    with capture_logs() as captured:
        async with world(tmp_path) as here, publishing(here, broker):
            await emit(here, range(2))
            assert await all_taken(here, broker) == broker.ids
    assert lines(captured, "sink.skipped") == []


async def test_deleted_events_are_logged(tmp_path: Path) -> None:
    """A sink pauses for longer than events are kept. It continues with the oldest event there is,
    and a log line says what it missed.
    """
    broker = Played()
    with capture_logs() as captured:
        async with world(tmp_path) as here:
            store = here.context.resources.store
            await store.write(lease_sinks, broker.name)
            await emit(here, range(2))
            await store.write(forget, 1)
            async with publishing(here, broker):
                await wait_until(lambda: broker.ids)
    (missed,) = lines(captured, "sink.missed")
    assert (missed["sink"], int(missed["after"]), int(missed["until"])) == ("played", 0, 1)
