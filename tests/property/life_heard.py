"""What the service was told of each task, kept beside it, and from that what contract section 4
answers to a callback.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.db.paging import Row
from service.tasks import callbacks
from service.tasks.callbacks import Callback, Verdict
from service.tasks.confirm_worker import Settlement
from service.upstreams.base import Status

FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
ENDED = ("completed", "failed", "cancelled", "expired")
Key = tuple[Any, ...]


@dataclass(slots=True)
class Heard:
    """By task: the first terminal callback, what was settled, which callbacks are kept and which of
    them contradicted.
    """

    first: dict[str, Key] = field(default_factory=dict)
    settled: dict[str, Key] = field(default_factory=dict)
    kept: dict[str, set[Key]] = field(default_factory=dict)
    conflicts: dict[str, set[Key]] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)  # that an answer of the upstream named
    erased: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)  # their ids
    blurred: set[str] = field(
        default_factory=set
    )  # tasks with a conflict that was not alone: against what is not known

    def answered(self, item: Settlement, before: Row, now: Row) -> None:
        if item.report and before["settled_digest"] is None is not now["settled_digest"]:
            self.settled[item.lease.key] = (item.report.status, item.report.results)

    def called(self, item: Callback, verdict: str, *, foreign: bool, alone: bool) -> None:
        self.calls.add(item.id)
        if verdict == "conflict" and not alone:
            self.blurred.add(item.task_id)
        kept, key = self.kept.setdefault(item.task_id, set()), key_of(item, foreign=foreign)
        first = verdict == "accepted" and item.report is not None and item.report.status in FINAL
        if first or len(kept) < callbacks.KEPT:
            kept.add(key)
        if first:
            self.first[item.task_id] = key
        if verdict == "conflict":
            self.conflicts.setdefault(item.task_id, set()).add(key)

    def stripped(self, task_id: str) -> None:
        """Its callbacks are forgotten."""
        for of_task in (self.first, self.kept, self.conflicts):
            of_task.pop(task_id, None)

    def crowded(self, item: Callback, *, foreign: bool) -> bool:
        """Whether there may be no room for it, so that it is counted on another."""
        kept = self.kept.get(item.task_id, set())
        return item.task_id in self.blurred or (
            len(kept) >= callbacks.KEPT and key_of(item, foreign=foreign) not in kept
        )

    def expected(self, item: Callback, tasks: Mapping[str, Row]) -> str:
        """The verdict on a callback of a task that is known."""
        report, key = item.report, key_of(item, foreign=False)
        if report is None:
            return "unreadable"
        if names_another(item, tasks):
            return "conflict"
        if report.status not in FINAL:
            return "accepted"
        first, settled = self.first.get(item.task_id), self.settled.get(item.task_id)
        if settled is None:
            return "accepted" if first is None else "duplicate" if key == first else "conflict"
        return (
            "duplicate" if key == settled or (key == first and key[0] == settled[0]) else "conflict"
        )


def key_of(item: Callback, *, foreign: bool) -> Key:
    """What makes two callbacks say the same."""
    if item.report is None:
        return (item.body,)
    said = (item.report.status, item.report.results)
    return (*said, item.report.upstream_id) if foreign else said


def names_another(item: Callback, tasks: Mapping[str, Row]) -> bool:
    """Whether it names an id that is not the task's, or that is another task's."""
    named, known = (
        item.report.upstream_id if item.report else None,
        tasks[item.task_id]["upstream_id"],
    )
    taken = any(row["upstream_id"] == named for key, row in tasks.items() if key != item.task_id)
    return named is not None and (taken if known is None else named != known)


def verdicts(results: list[Any]) -> list[Any]:
    """What must be the same when a transaction is run again."""
    return [result.verdict if isinstance(result, Verdict) else None for result in results]
