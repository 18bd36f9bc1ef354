"""A model of the inbox: what callbacks and queries have said about each task, and the verdict that
the next callback must get (docs/callbacks.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.db.paging import Row
from service.tasks import callbacks
from service.tasks.callbacks import Callback, Verdict
from service.tasks.settlements import Settlement
from service.upstreams.base import Status

FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
ENDED = ("completed", "failed", "cancelled", "expired")
Key = tuple[Any, ...]


@dataclass(slots=True)
class InboxModel:
    """By task: the first terminal callback, the settled outcome, the kept callbacks and the
    conflicts.
    """

    first: dict[str, Key] = field(default_factory=dict)
    settled: dict[str, Key] = field(default_factory=dict)
    kept: dict[str, set[Key]] = field(default_factory=dict)
    conflicts: dict[str, set[Key]] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)  # the links that an answer of the upstream named
    erased: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)  # the ids of all callbacks
    blurred: set[str] = field(
        default_factory=set
    )  # tasks with a conflict that shared its transaction, so its cause is unknown

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
        """Forgets the callbacks of a task whose content was removed."""
        for of_task in (self.first, self.kept, self.conflicts):
            of_task.pop(task_id, None)

    def crowded(self, item: Callback, *, foreign: bool) -> bool:
        """Whether the inbox may be full, so that it counts the callback on another row."""
        kept = self.kept.get(item.task_id, set())
        return item.task_id in self.blurred or (
            len(kept) >= callbacks.KEPT and key_of(item, foreign=foreign) not in kept
        )

    def expected(self, item: Callback, tasks: Mapping[str, Row]) -> str:
        """The verdict that a callback of an existing task must get."""
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
    """Two callbacks with the same key say the same."""
    if item.report is None:
        return (item.body,)
    said = (item.report.status, item.report.results)
    return (*said, item.report.upstream_id) if foreign else said


def names_another(item: Callback, tasks: Mapping[str, Row]) -> bool:
    """Whether the callback names an id that is not the task's, or that another task has."""
    named, known = (
        item.report.upstream_id if item.report else None,
        tasks[item.task_id]["upstream_id"],
    )
    taken = any(row["upstream_id"] == named for key, row in tasks.items() if key != item.task_id)
    return named is not None and (taken if known is None else named != known)


def verdicts(results: list[Any]) -> list[Any]:
    """The part of the results that must be the same when a transaction runs again."""
    return [result.verdict if isinstance(result, Verdict) else None for result in results]
