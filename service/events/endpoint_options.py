"""The options of an endpoint: which events it wants, in which order, and how fast.

The column `options` has `ordered`, `ordered_by`, `metadata` and `rate_per_s`. NULL: none is set.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, select

from service.db.tables import events
from service.db.transaction import Transaction
from service.strict_json import JSON

OPTIONS: Mapping[str, Any] = {
    "ordered": False,
    "ordered_by": None,
    "metadata": {},
    "rate_per_s": None,
}


def all_options(options: JSON | None) -> JSON:
    return {**OPTIONS, **(options or {})}


def wants(options: JSON | None, data: JSON) -> bool:
    """Whether an event's metadata has every pair of the filter. An event without metadata, such as
    an operators' event, passes only an endpoint without a filter.
    """
    pairs = (options or {}).get("metadata") or {}
    has = data.get("metadata") or {}
    return all(has.get(name) == value for name, value in pairs.items())


def filter_conditions(options: JSON | None) -> list[ColumnElement[bool]]:
    """`wants`, as conditions on the rows of events."""
    pairs = (options or {}).get("metadata") or {}
    return [events.c.data[("metadata", key)].as_string() == pairs[key] for key in pairs]


def paced(options: JSON | None) -> bool:
    """Whether a delivery needs a look at the store before it is sent."""
    return bool(options and (options.get("ordered") or options.get("rate_per_s")))


def order_key(options: JSON | None, task_id: str | None, data: JSON) -> str | None:
    """Deliveries with one key go one after another. None: the endpoint is not ordered, or the event
    is about no task. The value of the metadata is hashed, and erasure removes the hash.
    """
    if not options or not options.get("ordered") or task_id is None:
        return None
    value = (data.get("metadata") or {}).get(options.get("ordered_by"))
    text = f"task {task_id}" if value is None else f"metadata {value}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def order_keys(tx: Transaction, options: JSON | None, event_ids: Sequence[str]) -> dict[str, str]:
    if not (options or {}).get("ordered"):
        return {}
    columns = events.c.id, events.c.task_id, events.c.data
    rows = tx.connection.execute(select(*columns).where(events.c.id.in_(event_ids)))
    keys = {row.id: order_key(options, row.task_id, row.data) for row in rows}
    return {id: key for id, key in keys.items() if key is not None}
