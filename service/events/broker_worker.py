"""From the outbox to brokers: one process at a time publishes to each, in sequence, and goes on
where the last one was confirmed.

What a broker has taken and a crash kept from being noted is published again, under the same id.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import structlog

from service.db.paging import Row
from service.errors import MessageTooLarge, SinkUnavailable, StoreUnavailable
from service.events import event_queries
from service.events.broker_positions import Hold, advance_sinks, hold_sinks, release_sinks
from service.events.feed import LOOK_S, render, written
from service.events.sinks import Broker, Message
from service.ids import sequence_text
from service.queue.backoff import broker_wait
from service.queue.leases import RENEW_S
from service.resources import Resources

log = structlog.get_logger()

PAGE = 100  # events
# the last message goes 10 s + 5 s after its lease began, and is confirmed or given up within 5 s:
# 20 of 30
SPARE_S = 5.0
OTHERS_S = 5.0  # so often a process looks whether the one that publishes is still there


class Publisher:
    """A job of every process with workers, one for each sink."""

    def __init__(self, resources: Resources, sink: Broker) -> None:
        self._resources = resources
        self._sink = sink
        self._hold: Hold | None = None
        self._renew_at = 0.0
        self._faults = 0  # since the broker last took what there was
        self._failing_since = 0.0

    @property
    def failing(self) -> bool:
        """Whether the last that this process tried there came to nothing."""
        return self._faults > 0

    async def run(self) -> None:
        """Publishes until cancelled, or until the process stops."""
        signals = self._resources.store.signals
        with signals.listen("events") as emitted, signals.listen("sinks") as nothing:
            try:
                while not signals.stopping:
                    emitted.clear()
                    try:
                        wait_s = await self._turn()
                    except Exception as error:  # noqa: BLE001 - logged once, counted, tried again
                        await signals.wait(nothing, await self._failed(error))
                    else:
                        await signals.wait(emitted if self._hold else nothing, wait_s)
            finally:
                if self._hold is not None:
                    with suppress(StoreUnavailable):  # the lease ends by itself
                        await self._resources.store.write(release_sinks, self._hold)
                await self._sink.close()

    async def _turn(self) -> float:
        """Publishes a page, if this is the process that does; how long to wait for more."""
        store, now = self._resources.store, asyncio.get_running_loop().time()
        if self._hold is None or now >= self._renew_at:
            self._hold = await store.write(hold_sinks, self._sink.name)
            if self._hold is None:
                self._faults = 0
                await self._sink.close()
                return OTHERS_S
            self._renew_at = now + RENEW_S
            await self._sink.open()
        hold = self._hold
        rows, last, forgotten = await store.read(
            event_queries.event_list, None, hold.position, PAGE, self._sink.types
        )
        if hold.position < forgotten:
            log.error(
                "sink.missed",
                sink=hold.name,
                after=sequence_text(hold.position),
                until=sequence_text(forgotten),
            )
        count = await self._publish(hold, rows, last)
        if self._faults:
            log.info(
                "sink.restored",
                sink=hold.name,
                seconds=round(time.monotonic() - self._failing_since, 1),
            )
            self._faults = 0
        return 0 if count else LOOK_S

    async def _publish(self, hold: Hold, rows: Sequence[Row], last: int) -> int:
        """Publishes in sequence while the lease lets it, and notes how far that came, whatever ends
        it; how many.
        """
        clock, started, place, count = (
            asyncio.get_running_loop().time,
            time.perf_counter(),
            hold.position,
            0,
        )
        try:
            for row in rows:
                if clock() >= self._renew_at + SPARE_S:
                    break
                await self._send(row)
                place, count = row["sequence"], count + 1
            else:
                place = last
        finally:
            if place > hold.position:
                moved = replace(hold, position=place)
                self._hold = (
                    moved if await self._resources.store.write(advance_sinks, moved) else None
                )
            if count:
                took = round((time.perf_counter() - started) * 1000)
                log.info(
                    "sink.published",
                    sink=hold.name,
                    events=count,
                    sequence=sequence_text(place),
                    duration_ms=took,
                )
        return count

    async def _send(self, row: Row) -> None:
        """One event that is too large must not hold up all that follow: its task's `request`, which
        alone can be long, stays behind.
        """
        message = Message(
            row["id"],
            row["type"],
            row["task_id"] or row["id"],
            written(document := render(row, self._resources.links)).encode(),
        )
        try:
            await self._sink.publish(message)
        except MessageTooLarge:
            if "request" not in document["data"]:
                raise
            log.warning(
                "sink.shortened", sink=self._sink.name, event_id=message.id, bytes=len(message.body)
            )
            shorter = {**document, "data": {**document["data"], "request": {}}}
            await self._sink.publish(replace(message, body=written(shorter).encode()))

    async def _failed(self, error: Exception) -> float:
        """Says it once, and gives the connection up; how long to wait."""
        self._renew_at = 0.0
        if isinstance(error, StoreUnavailable):  # said by whoever promised something
            return LOOK_S
        if not self._faults:
            self._failing_since = time.monotonic()
        self._faults += 1
        wait_s = broker_wait(self._faults, self._resources.random())
        unforeseen = None if isinstance(error, SinkUnavailable) else error
        if self._faults == 1 or unforeseen:
            words = f"{type(error).__name__}: {error}" if unforeseen else str(error)
            log.error(
                "sink.failed",
                sink=self._sink.name,
                wait_s=round(wait_s, 1),
                exception=words,
                exc_info=unforeseen,
            )
        if unforeseen:
            self._resources.metrics.worker_faults.labels("publish").inc()
        await self._sink.close()
        return wait_s
