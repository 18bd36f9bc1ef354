"""A store with many finished tasks, and the requests whose cost must not grow with them."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, update

from service.db.operator_tables import ledger
from service.db.tables import (
    attempts,
    callbacks,
    counters,
    deliveries,
    endpoints,
    events,
    images,
    steps,
    tasks,
)
from service.db.transaction import Transaction

Row = dict[str, Any]

BEGAN = 1_700_000_000_000
OWNER, OTHER, ENDPOINT = "painter", "somebody", "ep_00000000000000000000000001"
EVERY = 10  # one of so many tasks failed, and so did its delivery
MODEL = "m"


def name_of(kind: str, number: int) -> str:
    return f"{kind}_{number:026d}"


def fill(tx: Transaction, items: Sequence[tuple[int, int]]) -> list[None]:
    """Inserts finished tasks by number, each with its callback, image, events, delivery, attempt,
    steps and entries of the ledger. The first item also inserts the endpoint.
    """
    for first, last in items:
        if first == 0:
            _insert_endpoint(tx)
        rows: dict[Any, list[dict[str, Any]]] = {}
        for number in range(first, last):
            for table, made in rows_of(number):
                rows.setdefault(table, []).append(made)
        for table, each in rows.items():
            tx.connection.execute(insert(table), each)
        for name, value in (("events", 2 * last), ("ledger", 3 * last)):
            mine = counters.c.name == name
            tx.connection.execute(update(counters).where(mine).values(value=value))
    return [None] * len(items)


def _insert_endpoint(tx: Transaction) -> None:
    row: Row = {"id": ENDPOINT, "owner": OWNER, "url": "https://e.test/", "types": ["*"]}
    more: Row = {"description": "", "status": "enabled", "secret": b"", "created_at": BEGAN}
    tx.connection.execute(insert(endpoints), row | more)


def rows_of(number: int) -> list[tuple[Any, dict[str, Any]]]:
    """The rows of one finished task."""
    at, task_id, bad = BEGAN + 1000 * number, name_of("task", number), number % EVERY == 0
    state = "failed" if bad else "completed"
    mine = {"owner": OWNER, "task_id": task_id}
    error = {"code": "content_policy_violation", "message": "no", "type": "task_error"}
    task = {
        "id": task_id,
        "owner": OWNER,
        "upstream": "evolink",
        "upstream_id": f"task-unified-{number}",
        "state": state,
        "created_at": at,
        "terminal_at": at,
        "settled_digest": "d" * 64,
        "model": MODEL,
        "prompt": "a lighthouse " * 20,
        "request": {"size": "1024x1024"},
        "metadata": {"order": str(number), "shop": "one"},
        "body": b"",
        "error": error if bad else None,
        "credits_reserved": 1_000_000,
    }
    rows: list[tuple[Any, dict[str, Any]]] = [(tasks, task)]
    rows.append((callbacks, callback_of(number, at, mine)))
    picture: Row = {"id": name_of("img", number), **mine, "position": 0, "state": "stored"}
    picture |= {"confirmed": True, "source_url": "", "link_dies_at": at, "stored_at": at}
    rows.append((images, picture | {"blob": f"{number:064d}.jpg"}))
    data: Row = {"state": state, "images": [], "error": None, "request": {"size": "1024x1024"}}
    for count, type in enumerate(("image.task.submitted", f"image.task.{state}")):
        event: Row = {"sequence": 2 * number + count + 1, "id": name_of("evt", 2 * number + count)}
        event |= {**mine, "type": type, "time": at, "data": data, "terminal": count == 1 or None}
        rows.append((events, event))
    delivery: Row = {"id": name_of("dlv", number), **mine, "endpoint_id": ENDPOINT}
    delivery |= {"event_id": name_of("evt", 2 * number + 1), "created_at": at, "finished_at": at}
    delivery |= {"state": "dead" if bad else "delivered", "last_status": 500 if bad else 204}
    failing = {"cause": "answered 500", "failed_since": at, "failed_at": at}
    rows.append((deliveries, delivery | (failing if bad else dict.fromkeys(failing))))
    attempt: Row = {"id": name_of("att", number), "delivery_id": delivery["id"], "time": at}
    rows.append((attempts, attempt | {"duration_ms": 3, "endpoint_id": ENDPOINT}))
    step: Row = {
        "task_id": task_id,
        "time": at,
        "step": "image.stored",
        "detail": {"sha256": "a" * 64},
    }
    rows.extend((steps, step) for _ in range(5))
    for count, kind in enumerate(("estimate", "reserve", "charge")):
        entry: Row = {"sequence": 3 * number + count + 1, "id": name_of("led", 3 * number + count)}
        entry |= {**mine, "time": at, "created_at": at, "model": MODEL, "upstream": "evolink"}
        rows.append((ledger, entry | {"kind": kind, "credits": 1_000_000, "source": "query"}))
    return rows


def callback_of(number: int, at: int, mine: dict[str, Any]) -> dict[str, Any]:
    row: Row = {
        "id": name_of("cb", number),
        **mine,
        "received_at": at,
        "last_seen_at": at,
        "count": 1,
    }
    row |= {"verdict": "accepted", "status": "completed", "digest": "d" * 64, "first": True}
    return row | {"body": b"{}" * 500}


def requests(last: int) -> dict[str, str]:
    """Reads of an admin's key, by what they are. `last`: the number of tasks."""
    middle = f"{BEGAN + 1000 * (last // 2)}.{name_of('task', last // 2)}"
    task, since = name_of("task", last - 1), "2023-11-14T00:00:00Z"
    lists = (
        ("list of all owners' tasks", "/v1/tasks?"),
        ("… from the middle", f"/v1/tasks?cursor={middle}&"),
        ("… of one owner", f"/v1/tasks?owner={OWNER}&"),
        ("… of an owner without tasks", f"/v1/tasks?owner={OTHER}&"),
        ("… by metadata", f"/v1/tasks?metadata.order={last // 2}&"),
        ("… by metadata of every task", "/v1/tasks?metadata.shop=one&"),
        ("… by two pairs", f"/v1/tasks?metadata.order={last // 2}&metadata.shop=one&"),
        (
            "… by two pairs, the other first",
            f"/v1/tasks?metadata.shop=one&metadata.order={last // 2}&",
        ),
        ("… by metadata of none", "/v1/tasks?metadata.shop=two&"),
        ("… by metadata, of one owner", f"/v1/tasks?owner={OWNER}&metadata.order=3&"),
        ("… completed", "/v1/tasks?state=completed&"),
        ("… failed", "/v1/tasks?state=failed&"),
        ("… failed, of one owner", f"/v1/tasks?state=failed&owner={OWNER}&"),
        ("… cancelled", "/v1/tasks?state=cancelled&"),
        ("… queued", "/v1/tasks?state=queued&"),
        ("… submitted, of one owner", f"/v1/tasks?state=submitted&owner={OWNER}&"),
        ("… by error", "/v1/tasks?error=content_policy_violation&"),
        ("… by error, of one owner", f"/v1/tasks?error=content_policy_violation&owner={OWNER}&"),
        ("… by model of none", "/v1/tasks?model=none&"),
        ("… in a time", f"/v1/tasks?since={since}&until=2023-11-14T22:20:00Z&"),
        ("list of all owners' deliveries", "/v1/deliveries?"),
        ("… of one endpoint", f"/v1/deliveries?endpoint={ENDPOINT}&"),
        ("… of one event", f"/v1/deliveries?event={name_of('evt', 2 * last - 1)}&"),
        ("… of one task", f"/v1/deliveries?task={task}&"),
        ("… pending", "/v1/deliveries?state=pending&"),
        ("… pending, of one owner", f"/v1/deliveries?state=pending&owner={OWNER}&"),
        ("… dead", "/v1/deliveries?state=dead&"),
        ("… by error of none", "/v1/deliveries?error=no%20route&"),
        ("… by status of none", "/v1/deliveries?status=404&"),
        ("… of an owner without any", f"/v1/deliveries?owner={OTHER}&"),
        ("list of all owners' events", "/v1/events?"),
        ("… from the middle", f"/v1/events?after={last}&"),
        ("… of a type without hits", "/v1/events?type=image.task.cancelled&"),
        ("… of two rare types", "/v1/events?type=image.task.failed,callback.conflict&"),
        ("… of the beginning of types", "/v1/events?type=endpoint.*&"),
        ("… of a task", f"/v1/events?task={task}&"),
        ("ledger", "/v1/ledger?"),
        ("… of one owner", f"/v1/ledger?owner={OWNER}&"),
        ("… of an owner without entries", f"/v1/ledger?owner={OTHER}&"),
        ("… of a task", f"/v1/ledger?task={task}&"),
        ("list of endpoints", "/v1/endpoints?"),
        ("list of files", "/v1/files?"),
        ("list of budgets", "/v1/budgets?"),
        ("list of keys", "/v1/keys?"),
        ("audit", "/v1/audit?"),
    )
    plain = {
        "task": f"/v1/tasks/{task}",
        "task by the upstream's id": f"/v1/tasks/task-unified-{last - 1}",
        "timeline": f"/v1/tasks/{task}/timeline",
        "callbacks": f"/v1/tasks/{task}/callbacks",
        "delivery": f"/v1/deliveries/{name_of('dlv', last - 1)}",
        "endpoint": f"/v1/endpoints/{ENDPOINT}",
        "health of an endpoint": f"/v1/endpoints/{ENDPOINT}/health",
        "files as the upstream lists them": "/api/v1/files/list",
        "quota of files": "/api/v1/files/quota",
        "readiness": "/readyz",
        "metrics": "/metrics",
    }
    found: dict[str, str] = {}
    heading = ""
    for name, path in lists:
        heading = heading if name.startswith("…") else name
        full = name if name == heading else f"{heading}, {name.removeprefix('… ')}"
        found[full] = path + "limit=10"
    return found | plain
