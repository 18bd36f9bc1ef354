"""Replaying: a page of events a second becomes deliveries, in the order of the outbox, until the
last that was there at the start.

Replays to one endpoint come one after the other, so that the rate is bounded by endpoint, however
many are asked for.
"""

from dataclasses import dataclass

from service.db.paging import Row
from service.db.transaction import Lease
from service.events.replay_queries import replay_page
from service.events.replays import Page, record_pages
from service.ids import rfc3339
from service.resources import Resources
from service.strict_json import JSON

PAGE, EVERY_MS = 100, 1000


@dataclass(frozen=True, slots=True)
class Replayer:
    """Stage `replay`."""

    resources: Resources

    async def run(self, lease: Lease) -> None:
        store = self.resources.store
        found = await store.read(replay_page, lease.key, PAGE)
        if found is None:
            page = Page(lease, (), None, None)
        elif found.waits:
            page = Page(lease, (), None, EVERY_MS)
        elif len(found.events) == PAGE and found.events[-1]["sequence"] < found.last:
            page = Page(lease, found.events, found.events[-1]["sequence"], EVERY_MS)
        else:
            page = Page(lease, found.events, found.last, None)
        await store.write(record_pages, page)


def replay_document(row: Row, states: dict[str, int]) -> JSON:
    """A replay as clients see it; `made` of `count` deliveries, and what became of those."""
    return {
        "id": row["id"],
        "endpoint": row["endpoint_id"],
        "state": row["state"],
        "since": rfc3339(row["since_at"]),
        "until": rfc3339(row["until_at"]),
        "types": row["types"],
        "only": row["only"],
        "count": row["count"],
        "made": row["made"],
        **{state: states.get(state, 0) for state in ("pending", "delivered", "dead")},
        "created_at": rfc3339(row["created_at"]),
        "finished_at": rfc3339(row["finished_at"]) if row["finished_at"] is not None else None,
    }
