"""Reading the outbox: events as readers get them, and waiting for what is not there yet."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from service.db.paging import Row
from service.db.store import Store
from service.db.transaction import Transaction
from service.events import event_queries
from service.events.documents import event_document
from service.ids import sequence_text
from service.links import Links
from service.ops.metrics import Metrics
from service.strict_json import JSON

log = structlog.get_logger()

LOOK_S = 0.5  # what another process wrote is seen within a second, also where its NOTIFY was lost


def render(row: Row, links: Links) -> JSON:
    """An event of contract section 3 from its row; links are made now, so that they follow the
    settings.
    """
    return event_document(
        event_id=row["id"],
        sequence=row["sequence"],
        type=row["type"],
        subject=row["task_id"],
        time=row["time"],
        data=row["data"],
        links=links,
    )


def written(document: JSON) -> str:
    """JSON as readers get it, in as few characters as it takes."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Page:
    events: list[JSON]
    next_after: int
    resync: bool


async def read_events(
    store: Store,
    links: Links,
    owner: str | None,
    after: int | None,
    limit: int,
    types: Sequence[str],
    task_id: str | None,
    wait_s: float,
) -> Page:
    """Events after a place, None: from the oldest; an empty page is held until something is there,
    at most `wait_s` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    with store.signals.listen("events") as written:
        while True:
            written.clear()
            rows, last, forgotten = await store.read(
                event_queries.event_list, owner, after or 0, limit, types, task_id
            )
            resync = after is not None and after < forgotten
            left = deadline - loop.time()
            if rows or resync or left <= 0 or store.signals.stopping:
                return Page([render(row, links) for row in rows], last, resync)
            await store.signals.wait(written, min(left, LOOK_S))


def tell(tx: Transaction, metrics: Metrics) -> None:
    """Logs and measures what a committed transaction's events say."""
    for event in tx.emitted:
        known = {"owner": event.owner, "task_id": event.task_id}
        if event.terminal:
            document = event.data
            log.info(
                "task.settled",
                **known,
                upstream_id=document["upstream_id"],
                state=document["state"],
                code=document["error"]["code"] if document["error"] else None,
                images=len(document["images"]),
                seconds=round(tx.now / 1000 - document["created"], 1),
            )
            if event.called_back_at is not None:
                metrics.callback_to_event.observe(max(0, tx.now - event.called_back_at) / 1000)
        if event.type == "endpoint.disabled":
            log.warning(
                "endpoint.disabled",
                endpoint_id=event.data["endpoint_id"],
                reason=event.data["reason"],
            )
        log.info(
            "event.emitted",
            **known,
            event_id=event.id,
            type=event.type,
            sequence=sequence_text(event.sequence),
            deliveries=event.deliveries,
        )
