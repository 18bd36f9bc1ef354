"""Replaying: a page of events a second becomes deliveries, in the order of the outbox, until the last that was there at the start."""

from dataclasses import dataclass

from service import model
from service.resources import Resources
from service.store import Grant
from service.store.operations import leases
from service.store.operations.replays import Page, record_pages
from service.store.records import Row
from service.store.replays import replay_page

PAGE, EVERY_MS = 100, 1000


@dataclass(frozen=True, slots=True)
class Replayer:
    """Stage `replay`."""

    resources: Resources

    async def run(self, grant: Grant) -> None:
        store = self.resources.store
        found = await store.read(replay_page, grant.key, PAGE)
        if found is None:
            await store.write(leases.done, grant)
            return
        replay, events = found
        whole = len(events) == PAGE and events[-1]["sequence"] < replay["last"]
        position = events[-1]["sequence"] if whole else replay["last"]
        await store.write(record_pages, Page(grant, events, position, EVERY_MS if whole else None))


def replay_document(row: Row, states: dict[str, int]) -> model.JSON:
    """A replay as clients see it; `made` of `count` deliveries, and what became of those."""
    return {
        "id": row["id"],
        "endpoint": row["endpoint_id"],
        "state": row["state"],
        "since": model.rfc3339(row["since_at"]),
        "until": model.rfc3339(row["until_at"]),
        "types": row["types"],
        "only": row["only"],
        "count": row["count"],
        "made": row["made"],
        **{state: states.get(state, 0) for state in ("pending", "delivered", "dead")},
        "created_at": model.rfc3339(row["created_at"]),
        "finished_at": model.rfc3339(row["finished_at"]) if row["finished_at"] is not None else None,
    }
