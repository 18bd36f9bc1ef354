"""One write that was alone in its transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.db.paging import Row
from service.db.transaction import Lease
from service.tasks.submissions import SubmissionResult
from service.upstreams.base import Accepted, Refused
from tests.property.life_checks import Snapshot
from tests.property.life_inbox import InboxModel
from tests.property.life_work import Write


@dataclass(frozen=True, slots=True)
class Step:
    """A process's write with its result, its leases and its free places, the snapshots before and
    after it, and the model of the inbox before it.
    """

    process: str
    write: Write
    result: Any
    leased: Sequence[Lease]
    places: int
    before: Snapshot
    now: Snapshot
    time: int
    inbox: InboxModel

    @property
    def held(self) -> bool:
        return self.write.lease is not None and self.before.holds(self.write.lease)

    def task(self, task_id: str) -> tuple[Row, Row]:
        return self.before.tasks[task_id], self.now.tasks[task_id]

    def emitted(self, type: str) -> list[Row]:
        return [
            event for event in self.now.events[len(self.before.events) :] if event["type"] == type
        ]

    def makes_query_due(self, task_id: str) -> None:
        """A query is requested. It is due at once if the task has an upstream id."""
        was, row = self.task(task_id)
        assert row["settle_requests"] == was["settle_requests"] + 1, "no query was requested"
        due = row["settle_due_at"]
        assert row["upstream_id"] is None or (due is not None and due <= self.time), (
            "the query is due later"
        )


def check_late(step: Step) -> None:
    """A write under an expired lease changes nothing. Only an accepted submission, or a refusal of
    an uncertain task, counts.
    """
    item = step.write.item
    outcome = item.outcome if isinstance(item, SubmissionResult) else None
    if isinstance(outcome, Accepted) or (
        isinstance(outcome, Refused) and step.before.tasks[item.lease.key]["state"] == "uncertain"
    ):
        return
    counted = {"submit_outcomes"} if isinstance(item, SubmissionResult) else set()
    assert len(step.before.events) == len(step.now.events), "an event under an expired lease"
    for name in ("tasks", "images", "deliveries", "replays"):
        was, rows = getattr(step.before, name), getattr(step.now, name)
        assert was.keys() == rows.keys(), f"rows of {name} came or went under an expired lease"
        for key, row in rows.items():
            changed = {column for column in row if row[column] != was[key][column]} - counted
            assert not changed, f"{changed} of {key} changed under an expired lease"
