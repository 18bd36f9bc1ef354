"""Inserts accepted submissions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, tuple_

from service.db.tables import tasks
from service.db.transaction import Transaction
from service.queue import leases
from service.strict_json import JSON
from service.tasks.fair_queue import Turns
from service.tasks.state import State


@dataclass(frozen=True, slots=True)
class NewTask:
    """A submission as a client asked for it; `body` is what the upstream will be sent."""

    id: str
    owner: str
    upstream: str
    model: str
    prompt: str | None
    request: JSON
    metadata: Mapping[str, str]
    body: bytes
    callback_url: str | None = None
    idempotency_key: str | None = None
    idempotency_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Inserted:
    """`created` False: an earlier task has this owner and idempotency key, with the body of that
    hash.
    """

    task_id: str
    created: bool
    idempotency_hash: str | None


def insert_tasks(tx: Transaction, items: Sequence[NewTask]) -> list[Inserted]:
    """Accepts submissions as `queued`. Run again after a lost commit, or with a key that exists, it
    finds the first row.
    """
    known = _known(tx, items)
    turns = Turns(tx)
    results = []
    for item in items:
        name = (item.owner, item.idempotency_key)
        earlier = known.get(item.id) or (known.get(name) if item.idempotency_key else None)
        if earlier is None:
            inserted = Inserted(item.id, True, item.idempotency_hash)
            known[item.id] = inserted
            known[name] = Inserted(item.id, False, item.idempotency_hash)
            tx.insert(tasks, _new_row(tx, item, turns))
            tx.step(item.id, "task.queued", model=item.model)
            earlier = inserted
        results.append(earlier)
    return results


def _known(tx: Transaction, items: Sequence[NewTask]) -> dict[Any, Inserted]:
    columns = (tasks.c.id, tasks.c.owner, tasks.c.idempotency_key, tasks.c.idempotency_hash)
    names = [(item.owner, item.idempotency_key) for item in items if item.idempotency_key]
    known: dict[Any, Inserted] = {}
    for row in tx.connection.execute(
        select(*columns).where(tasks.c.id.in_([item.id for item in items]))
    ):
        known[row.id] = Inserted(row.id, True, row.idempotency_hash)
    if names:
        statement = select(*columns).where(
            tuple_(tasks.c.owner, tasks.c.idempotency_key).in_(names)
        )
        for row in tx.connection.execute(statement):
            known[row.owner, row.idempotency_key] = Inserted(row.id, False, row.idempotency_hash)
    return known


def _new_row(tx: Transaction, item: NewTask, turns: Turns) -> dict[str, Any]:
    return {
        "id": item.id,
        "owner": item.owner,
        "upstream": item.upstream,
        "state": State.QUEUED.value,
        "created_at": tx.now,
        "model": item.model,
        "prompt": item.prompt,
        "request": item.request,
        "metadata": dict(item.metadata),
        "body": item.body,
        "callback_url": item.callback_url,
        "idempotency_key": item.idempotency_key,
        "idempotency_hash": item.idempotency_hash,
        "submit_turn": turns.next(item.owner),
        **leases.enqueue(tx, "submit", item.id, behind=turns.behind),
    }
