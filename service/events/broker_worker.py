"""Publishes the outbox to brokers. One process at a time publishes to each broker, in sequence,
under a lease with a fence.

After a crash the next process continues after the last recorded position. A message that the broker
took before the crash may be published again, under the same id.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog
from sqlalchemy import Connection, insert, select, update

from service.db.tables import counters, events, sinks
from service.db.transaction import Transaction, one_by_one
from service.errors import MessageRefused, MessageTooLarge, SinkUnavailable, StoreUnavailable
from service.events.feed import LOOK_S, Entry, event_list, outbox_end, type_conditions
from service.ids import sequence_text
from service.ops import tracing
from service.queue.backoff import broker_wait
from service.queue.leases import TOLERANCE_MS
from service.resources import Resources
from service.strict_json import compact_json

log = structlog.get_logger()

PAGE = 100  # events
LEASE_MS, RENEW_S = 30_000, 10.0
# The last message is sent at most 10 s + 5 s after the lease began, and is confirmed or given up
# within 5 s. That is 20 s of the lease's 30 s.
SPARE_S = 5.0
REFUSALS = 3  # of one message, before it is skipped
RELEASED = {"lease_until": None, "lease_owner": None}  # another process can lease the sink at once
OTHERS_S = 5.0  # between looks whether the process that publishes is still there


class Broker(Protocol):
    """After a failure, a SinkUnavailable, the broker may or may not have the message."""

    name: str
    types: Sequence[str]  # of the events it gets, none: all

    async def open(self) -> None:
        """Connects, or checks the connection."""

    async def publish(self, entry: Entry, trace: Mapping[str, str]) -> None:
        """Returns once the broker has confirmed the message, under the event's id. `trace`: headers
        of the message.
        """

    async def close(self) -> None:
        """Ends the connection in any state."""


@dataclass(frozen=True, slots=True)
class SinkLease:
    """The right to publish events after `position` until the lease ends."""

    name: str
    fence: int
    position: int


@one_by_one
def lease_sinks(tx: Transaction, name: str) -> SinkLease | None:
    """Leases a sink to this process, or renews its lease. None: another process has the lease. A
    new sink begins at the end of the outbox.
    """
    locked = select(sinks).where(sinks.c.name == name).with_for_update()
    row = tx.connection.execute(locked).first()
    if row is None:  # of two processes that start together, one inserts the row
        tx.connection.execute(select(counters).where(counters.c.name == "clock").with_for_update())
        row = tx.connection.execute(locked).first()
    lease: dict[str, Any] = {
        "lease_until": tx.now + LEASE_MS,
        "lease_owner": tx.process,
        "seen_at": tx.now,
    }
    if row is None:
        position = outbox_end(tx.connection)
        tx.connection.execute(insert(sinks).values(name=name, position=position, fence=1, **lease))
        return SinkLease(name, 1, position)
    # A lease that ends later than any lease can was set before the clock went back.
    latest = tx.now + LEASE_MS + TOLERANCE_MS
    leased = row.lease_until is not None and tx.now < row.lease_until <= latest
    if leased and row.lease_owner != tx.process:
        return None
    fence = row.fence if leased else row.fence + 1
    tx.connection.execute(update(sinks).where(sinks.c.name == name).values(fence=fence, **lease))
    return SinkLease(name, fence, row.position)


@one_by_one
def change_sinks(tx: Transaction, item: tuple[SinkLease, Mapping[str, Any]]) -> bool:
    """Changes columns under a lease: the `position` up to which the broker has all events, or those
    of `RELEASED`. False: another process has the lease.
    """
    lease, values = item
    mine = (sinks.c.name == lease.name, sinks.c.fence == lease.fence)
    statement = update(sinks).where(*mine, sinks.c.lease_until.is_not(None))
    return tx.connection.execute(statement.values(values)).rowcount == 1


def sinks_behind(
    connection: Connection, wanted: Mapping[str, Sequence[str]]
) -> dict[str, int | None]:
    """The time of each sink's oldest unpublished event, or None. `wanted`: the sinks' event types,
    by name.
    """
    behind: dict[str, int | None] = dict.fromkeys(wanted)
    positions = select(sinks.c.name, sinks.c.position).where(sinks.c.name.in_(wanted))
    for row in connection.execute(positions) if wanted else ():
        statement = select(events.c.time).where(events.c.sequence > row.position)
        if wanted[row.name]:
            statement = statement.where(type_conditions(wanted[row.name]))
        oldest = statement.order_by(events.c.sequence).limit(1)
        behind[row.name] = connection.execute(oldest).scalar()
    return behind


class BrokerWorker:
    """A job of every process with workers, one for each sink."""

    def __init__(self, resources: Resources, sink: Broker) -> None:
        self._resources = resources
        self._sink = sink
        self._lease: SinkLease | None = None
        self._renew_at = 0.0
        self._faults = 0  # since the last success
        self._failing_since = 0.0
        self._refused: set[str] = set()  # event types that were skipped last

    @property
    def failing(self) -> bool:
        """Whether this process's last try failed."""
        return self._faults > 0

    async def run(self) -> None:
        """Publishes until cancelled, or until the process stops."""
        signals = self._resources.store.signals
        with signals.listen("events") as emitted, signals.listen("sinks") as nothing:
            try:
                while not signals.stopping:
                    emitted.clear()
                    try:
                        wait_s = await self._step()
                    except Exception as error:  # noqa: BLE001 - logged once, counted, tried again
                        await signals.wait(nothing, await self._failed(error))
                    else:
                        await signals.wait(emitted if self._lease else nothing, wait_s)
            finally:
                if self._lease is not None:
                    with suppress(StoreUnavailable):  # the lease ends by itself
                        await self._resources.store.write(change_sinks, (self._lease, RELEASED))
                await self._sink.close()

    async def _step(self) -> float:
        """Publishes a page if this process has the lease. Returns how long to wait for more."""
        store, now = self._resources.store, asyncio.get_running_loop().time()
        if self._lease is None or now >= self._renew_at:
            self._lease = await store.write(lease_sinks, self._sink.name)
            if self._lease is None:
                self._faults = 0
                await self._sink.close()
                return OTHERS_S
            self._renew_at = now + RENEW_S
            await self._sink.open()
        lease = self._lease
        links, types = self._resources.links, self._sink.types
        page = await store.read(event_list, links, None, lease.position, PAGE, types)
        if lease.position < page.forgotten:
            after, until = sequence_text(lease.position), sequence_text(page.forgotten)
            log.error("sink.missed", sink=lease.name, after=after, until=until)
        count = await self._publish(lease, page.entries, page.last)
        if self._faults:
            seconds = round(time.monotonic() - self._failing_since, 1)
            log.info("sink.restored", sink=lease.name, seconds=seconds)
            self._faults = 0
        return 0 if count else LOOK_S

    async def _publish(self, lease: SinkLease, entries: Sequence[Entry], last: int) -> int:
        """Publishes in sequence while the lease lasts, and records the position, also after a
        failure. Returns how many events were published.
        """
        clock, started = asyncio.get_running_loop().time, time.perf_counter()
        position, count = lease.position, 0
        try:
            for entry in entries:
                if clock() >= self._renew_at + SPARE_S:
                    break
                await self._send(entry)
                position, count = entry.sequence, count + 1
            else:
                position = last
        finally:
            if position > lease.position:
                moved = lease, {"position": position}
                advanced = await self._resources.store.write(change_sinks, moved)
                self._lease = replace(lease, position=position) if advanced else None
            if count:
                log.info(
                    "sink.published",
                    sink=lease.name,
                    events=count,
                    sequence=sequence_text(position),
                    duration_ms=round((time.perf_counter() - started) * 1000),
                )
        return count

    async def _send(self, entry: Entry) -> None:
        """Publishes one event. After `REFUSALS` refusals it is skipped, so that it does not hold up
        the events after it. Only the first event of a refused type waits between its tries.
        """
        clock, exception = asyncio.get_running_loop().time, ""
        for refusals in range(1, REFUSALS + 1):
            try:
                with self._span(entry):
                    await self._send_fitting(entry)
            except MessageRefused as error:
                exception = str(error)
                if refusals < REFUSALS and clock() >= self._renew_at + SPARE_S:
                    raise
                if entry.type not in self._refused and refusals < REFUSALS:
                    await asyncio.sleep(broker_wait(refusals, self._resources.random()))
            else:
                self._refused.discard(entry.type)
                return
        self._refused.add(entry.type)
        self._resources.metrics.sink_skipped.labels(self._sink.name).inc()
        log.error(
            "sink.skipped",
            sink=self._sink.name,
            event_id=entry.id,
            type=entry.type,
            sequence=sequence_text(entry.sequence),
            exception=exception,
        )

    def _span(self, entry: Entry) -> AbstractContextManager[object]:
        name, late = self._sink.name, self._resources.clock() - entry.time > tracing.FRESH_MS
        kind = type(self._sink).__name__.lower()
        about = tracing.message_attributes(kind, name, entry.id, entry.type, entry.task_id)
        return tracing.span(
            f"send {name}", "producer", entry.traceparent, linked=late, attributes=about
        )

    async def _send_fitting(self, entry: Entry) -> None:
        """If the message is too large, it goes without its task's `request`, the only part that can
        be long.
        """
        trace = {"traceparent": parent} if (parent := tracing.current()) else {}
        try:
            await self._sink.publish(entry, trace)
        except MessageTooLarge:
            document = json.loads(entry.document)
            if "request" not in document["data"]:
                raise
            fields = {"event_id": entry.id, "bytes": len(entry.document)}
            log.warning("sink.shortened", sink=self._sink.name, **fields)
            document["data"]["request"] = {}
            shorter = replace(entry, document=compact_json(document).encode())
            await self._sink.publish(shorter, trace)

    async def _failed(self, error: Exception) -> float:
        """Logs the first failure and closes the connection. Returns how long to wait."""
        self._renew_at = 0.0
        if isinstance(error, StoreUnavailable):  # logged by the workers
            return LOOK_S
        if not self._faults:
            self._failing_since = time.monotonic()
        self._faults += 1
        wait_s = broker_wait(self._faults, self._resources.random())
        unforeseen = None if isinstance(error, SinkUnavailable) else error
        if self._faults == 1 or unforeseen:
            text = f"{type(error).__name__}: {error}" if unforeseen else str(error)
            fields = {"sink": self._sink.name, "wait_s": round(wait_s, 1), "exception": text}
            log.error("sink.failed", **fields, exc_info=unforeseen)
        if unforeseen:
            self._resources.metrics.worker_faults.labels("publish").inc()
        await self._sink.close()
        return wait_s
