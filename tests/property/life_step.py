"""One write alone in its transaction: what its kind must do and may not, whoever it was for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.db.paging import Row
from service.db.transaction import Lease
from service.tasks.submissions import SubmissionResult
from service.upstreams.base import Accepted, Refused
from tests.property.life_checks import Seen
from tests.property.life_heard import Heard
from tests.property.life_work import Write


@dataclass(frozen=True, slots=True)
class Step:
    """A process's write, its result and what it was granted of so many places; all that there was
    and is; what was heard before.
    """

    process: str
    write: Write
    result: Any
    leased: Sequence[Lease]
    places: int
    before: Seen
    now: Seen
    time: int
    heard: Heard

    @property
    def held(self) -> bool:
        return self.write.lease is not None and self.before.holds(self.write.lease)

    def task(self, task_id: str) -> tuple[Row, Row]:
        return self.before.tasks[task_id], self.now.tasks[task_id]

    def told(self, type: str) -> list[Row]:
        return [
            event for event in self.now.events[len(self.before.events) :] if event["type"] == type
        ]

    def is_asked(self, task_id: str) -> None:
        """The upstream is to be asked, and at once if there is an id to ask for."""
        was, row = self.task(task_id)
        assert row["settle_requests"] == was["settle_requests"] + 1, "nobody is asked"
        due = row["settle_due_at"]
        assert row["upstream_id"] is None or (due is not None and due <= self.time), (
            "asked, but later"
        )


def check_late(step: Step) -> None:
    """A write after its lease changes nothing but by a submission's answer in hand."""
    item = step.write.item
    outcome = item.outcome if isinstance(item, SubmissionResult) else None
    if isinstance(outcome, Accepted) or (
        isinstance(outcome, Refused) and step.before.tasks[item.lease.key]["state"] == "uncertain"
    ):
        return
    counted = {"submit_outcomes"} if isinstance(item, SubmissionResult) else set()
    assert len(step.before.events) == len(step.now.events), "an event of nobody's"
    for name in ("tasks", "images", "deliveries", "replays"):
        was, rows = getattr(step.before, name), getattr(step.now, name)
        assert was.keys() == rows.keys(), f"rows of {name} came or went under an ended lease"
        for key, row in rows.items():
            changed = {column for column in row if row[column] != was[key][column]} - counted
            assert not changed, f"{changed} of {key} changed under an ended lease"
