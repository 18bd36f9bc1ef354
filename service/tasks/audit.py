"""The audit: one entry for each act of an operator, in the transaction of the act."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import structlog
from sqlalchemy import delete, insert, select

from service.db.batching import BatchingStore
from service.db.counters import number
from service.db.operator_tables import audit
from service.db.paging import Row
from service.db.transaction import Transaction, one_by_one
from service.ids import rfc3339
from service.strict_json import JSON

log = structlog.get_logger()

FORGOTTEN = 1000  # entries that one transaction of retention deletes


@dataclass(frozen=True, slots=True)
class ActEntry:
    """Who did what to which target, and why. `key_id` None: a command in the store itself."""

    id: str
    owner: str
    key_id: str | None
    action: str
    target: str | None = None
    reason: str | None = None
    request_id: str | None = None
    outcome: str = "done"  # or why the act changed nothing
    detail: JSON | None = None


# The outcome of an act by the result of its operation, with what is worth keeping of it.
Judge = Callable[[Any], tuple[str, JSON | None]]


def always(_: object) -> tuple[str, None]:
    return "done", None


def unless(word: str) -> Judge:
    """For an operation that returns whether it changed something."""
    return lambda result: ("done" if result else word, None)


def unless_refused(result: str | None) -> tuple[str, None]:
    """For an operation that returns the reason against it."""
    return result or "done", None


@dataclass(frozen=True, slots=True)
class Act:
    entry: ActEntry
    operation: Callable[[Transaction, Sequence[Any]], Sequence[Any]]
    item: Any
    judge: Judge


@one_by_one
def nothing(_: Transaction, __: Any) -> None:
    """The operation of an act that needs no transaction."""


@one_by_one
def perform(tx: Transaction, act: Act) -> tuple[Any, ActEntry]:
    """Runs an act's operation, and appends its entry with the outcome."""
    (result,) = act.operation(tx, [act.item])
    tx.write()
    outcome, detail = act.judge(result)
    details = {**(act.entry.detail or {}), **(detail or {})} or None
    entry = replace(act.entry, outcome=outcome, detail=details)
    tx.defer(append, entry.id, entry)
    return result, entry


def append(tx: Transaction, items: Mapping[str, ActEntry]) -> None:
    """Appends entries. An entry that is there already belongs to a commit without an answer."""
    existing = select(audit.c.id).where(audit.c.id.in_(list(items)))
    there = set(tx.connection.execute(existing).scalars())
    rows = [asdict(entry) | {"time": tx.now} for id, entry in items.items() if id not in there]
    if rows:
        number(tx, "audit", rows)
        tx.connection.execute(insert(audit), rows)


async def acted(
    store: BatchingStore,
    entry: ActEntry,
    operation: Callable[[Transaction, Sequence[Any]], Sequence[Any]] = nothing,
    item: Any = None,
    judge: Judge = always,
) -> Any:
    result, entry = await store.write(perform, Act(entry, operation, item, judge))
    log.info(
        "admin.action",
        action=entry.action,
        subject=entry.target,
        owner=entry.owner,
        key_id=entry.key_id,
        reason=entry.reason,
        outcome=entry.outcome,
        detail=entry.detail,
    )
    return result


def entry_document(row: Row) -> JSON:
    names = ("id", "owner", "key_id", "action", "target", "reason", "outcome", "detail")
    shown = {name: row[name] for name in (*names, "request_id")}
    return {**shown, "time": rfc3339(row["time"])}


@one_by_one
def forget_acts(tx: Transaction, before: int) -> int:
    """Deletes some entries that are older, and returns how many."""
    old = select(audit.c.sequence).where(audit.c.time < before).limit(FORGOTTEN)
    return tx.connection.execute(delete(audit).where(audit.c.sequence.in_(old))).rowcount
