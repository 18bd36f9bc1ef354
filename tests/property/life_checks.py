"""What holds of any task at any moment of its life, seen from outside: rows and events before and after a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Select, Table, bindparam, select

from service.model import MOVES, TERMINAL, State
from service.store import Grant
from service.store.operations import leases
from service.store.operations.settling import Settlement
from service.store.operations.submissions import Accepted, Refused, Submission
from service.store.records import Row
from service.store.tables import QUEUES, deliveries, events, images, tasks
from tests.contract.subject import SECOND
from tests.property.life_upstream import error
from tests.property.life_work import Sent, Workshop, Write

Rows = Mapping[str, Row]


@dataclass(frozen=True, slots=True)
class Seen:
    """The rows at one moment, by id, and all events so far."""

    tasks: Rows = field(default_factory=dict)
    images: Rows = field(default_factory=dict)
    deliveries: Rows = field(default_factory=dict)
    events: Sequence[Row] = ()

    def table(self, table: Table) -> Rows:
        return {"tasks": self.tasks, "images": self.images, "deliveries": self.deliveries}[table.name]

    def of(self, task_id: str) -> list[Row]:
        return sorted((row for row in self.images.values() if row["task_id"] == task_id), key=lambda row: row["position"])

    def terminal(self, task_id: str) -> list[Row]:
        return [event for event in self.events if event["task_id"] == task_id and event["terminal"]]

    def types(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.events if event["task_id"] == task_id]

    def holds(self, grant: Grant) -> bool:
        row = self.table(QUEUES[grant.stage].table).get(grant.key)
        return row is not None and leases.holds(grant, row)


WHOLE = [select(table) for table in (tasks, images, deliveries)]
LATER = select(events).where(events.c.sequence > bindparam("last")).order_by(events.c.sequence)


def look(connection: Connection, before: Seen) -> Seen:
    """The store as it is; events that were seen already are not read again."""

    def rows(statement: Select[Any]) -> Rows:
        return {row["id"]: row for row in connection.execute(statement).mappings()}

    new = connection.execute(LATER, {"last": before.events[-1]["sequence"] if before.events else 0}).mappings()
    found = [rows(statement) for statement in WHOLE]
    return Seen(found[0], found[1], found[2], [*before.events, *new])


def reachable(before: State) -> set[State]:
    """Where moves of the contract's table lead, one or many: a transaction may make several."""
    found = {before}
    while more := {after for state in found for after in MOVES[state]} - found:
        found |= more
    return found


ENDINGS = {f"image.task.{state}" for state in TERMINAL}
ONCE = ("image.task.submitted", "task.late_result")


def check(before: Seen, now: Seen) -> None:
    """Everything that one step may not have done."""
    assert before.tasks.keys() <= now.tasks.keys(), "a task is gone"
    for task_id, row in now.tasks.items():
        if (was := before.tasks.get(task_id)) is not None:
            check_step(was, row)
            check_asked(was, row, [event for event in now.events[len(before.events) :] if event["task_id"] == task_id])
        check_events(row, now)
        check_way_on(row, now)
    for image_id, image in before.images.items():
        check_image(image, now.images.get(image_id), now.tasks[image["task_id"]], before.tasks[image["task_id"]])
    if len(now.events) > len(before.events):
        assert len({event["id"] for event in now.events}) == len(now.events), "an event twice"
        delivered = [(row["event_id"], row["endpoint_id"]) for row in now.deliveries.values()]
        assert len(set(delivered)) == len(delivered), "two deliveries of one event to one endpoint"


def check_step(was: Row, row: Row) -> None:
    """One task: no move outside the table, and what is settled stands."""
    before, after = State(was["state"]), State(row["state"])
    assert after in reachable(before), f"{before} became {after}"
    assert not (row["doubted_at"] and after is State.QUEUED), "doubted, and yet as if nothing were created"
    fixed = ["created_at", "owner", "idempotency_key", "submitted_at", "called_back_at", "terminal_at", "doubted_at", "erased_at"]
    fixed += ["refusal_status", "settled_digest"] if before in TERMINAL else []
    fixed += ["body"] if row["erased_at"] is None else []
    fixed += ["error"] if before in TERMINAL and row["erased_at"] is None else []
    fixed += ["upstream_status"] if before in TERMINAL and was["settled_digest"] else []
    fixed += ["upstream_id", "upstream_id_from"] if was["upstream_id_from"] == "answer" else []
    for name in fixed:
        assert was[name] in (None, row[name]), f"{name} was {was[name]} and is {row[name]}"
    for name in ("settled_digest", "credits_reserved", "credits_used", "estimated_time"):
        assert was[name] is None or row[name] is not None, f"{name} is forgotten"
    for name in ("progress", "submit_outcomes", "settle_requests", "submit_fence", "settle_fence"):
        assert was[name] <= row[name], f"{name} went back"


def check_events(row: Row, now: Seen) -> None:
    """One terminal event if and only if the task has ended, with the pictures that were stored by then."""
    ends, types, state = now.terminal(row["id"]), now.types(row["id"]), State(row["state"])
    assert sum(type in ENDINGS for type in types) == len(ends), f"ended more than once: {types}"
    assert len(ends) == (state in TERMINAL), f"{len(ends)} terminal events while {state}"
    assert all(types.count(type) <= 1 for type in ONCE), f"told twice: {types}"
    assert ("image.task.submitted" in types) == (row["submitted_at"] is not None)
    for event in ends:
        assert (event["type"], event["data"]["state"], event["time"]) == (f"image.task.{state}", state, row["terminal_at"])
        if row["erased_at"] is not None:
            continue
        stored = {image["id"]: image for image in now.of(row["id"]) if image["state"] == "stored" and image["confirmed"]}
        for image in event["data"]["images"]:
            assert image["id"] in stored, "an event names a picture that is not stored"
            assert image["sha256"] == stored[image["id"]]["sha256"]
        if state is State.COMPLETED:
            named = [image["id"] for image in event["data"]["images"]]
            assert named == [image["id"] for image in now.of(row["id"])] != [], "completed without a picture"


def check_asked(was: Row, row: Row, told: Sequence[Row]) -> None:
    """Each callback that contradicts gets the upstream asked, once."""
    conflicts = [event for event in told if event["type"] == "callback.conflict" and event["data"]["callback_id"]]
    assert row["settle_requests"] - was["settle_requests"] >= len(conflicts), "a conflict, and nobody is asked"


def check_way_on(row: Row, now: Seen) -> None:
    """What has not ended is due to somebody, and so is every picture that is awaited."""
    state = State(row["state"])
    if state in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN):
        assert row["submit_due_at"] is not None, f"{state}, and nobody will go on"
    elif state is State.SUBMITTED:
        assert row["settle_due_at"] is not None, "submitted, and nobody will ask"
    for image in now.of(row["id"]):
        assert image["state"] != "stored" or image["sha256"] == sha256(image["source_url"].encode()).hexdigest(), "another link's picture"
    awaited = [image for image in now.of(row["id"]) if image["state"] == "pending"]
    assert state is not State.STORING or awaited, "storing, and nothing is awaited"
    assert all(image["due_at"] is not None for image in awaited), "a picture is awaited that nobody will fetch"
    undue = row["submit_due_at"] is None or row["submit_faults"]  # a fault under a lease is looked at again, whatever came of the task
    assert state in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN) or undue, f"{state}, and due to be submitted"


def check_image(was: Row, row: Row | None, task: Row, before: Row) -> None:
    """What is stored and counts, or is lost for good, stays so; only a local cancel takes pictures away, and erasure."""
    if not was["confirmed"] or was["state"] == "pending" or task["erased_at"] is not None:
        return
    if row is None:
        assert task["state"] == State.CANCELLED != before["state"], "a confirmed picture is gone"
        return
    for name in ("state", "blob", "sha256", "source_url", "confirmed", "position"):
        assert was[name] == row[name], f"a {was['state']} picture's {name} was {was[name]} and is {row[name]}"


def check_write(write: Write, before: Seen, now: Seen, time: int) -> None:
    """What was asked since the question is due at once. A write after its lease changes nothing but by a submission's answer in hand."""
    grant = write.grant
    if grant is None:
        return
    if before.holds(grant):
        row = now.tasks.get(grant.key)
        waits = row is not None and (row["settle_due_at"] or time + 1) > time
        if isinstance(write.item, Settlement) and row and row["settle_requests"] != write.item.requests and not row["settled_digest"]:
            assert not waits, "somebody asked while the upstream was asked, and waits"
        if isinstance(write.item, Submission) and row and row["state"] == State.SUBMITTED and row["settle_requests"]:
            assert not waits or before.tasks[grant.key]["upstream_id"], "somebody asked before there was an id, and waits"
        return
    outcome = write.item.outcome if isinstance(write.item, Submission) else None
    if isinstance(outcome, Accepted):
        names = [row["upstream_id"] for row in now.tasks.values()]
        known = outcome.report.upstream_id in names or now.tasks[grant.key]["upstream_id_from"] == "answer"
        assert known, "an answer in hand is forgotten"
        return
    if isinstance(outcome, Refused) and before.tasks[grant.key]["state"] == State.UNCERTAIN:
        return
    counted = {"submit_outcomes"} if outcome is not None else set()
    assert len(before.events) == len(now.events), "an event of nobody's"
    for table in (tasks, images, deliveries):
        was, rows = before.table(table), now.table(table)
        assert was.keys() == rows.keys(), f"rows of {table.name} came or went under an ended lease"
        for key, row in rows.items():
            changed = {name for name in row if row[name] != was[key][name]} - counted
            assert not changed, f"{changed} of {key} changed under an ended lease"


def check_grant(grant: Grant, writes: Sequence[Write], before: Seen, after: Seen, now: int) -> None:
    """Whoever is granted a row is alone with it: nobody held it, or who did finishes, or asks by an id of before."""
    queue = QUEUES[grant.stage]
    row = before.table(queue.table).get(grant.key)
    if row is not None:
        until = row[queue.prefix + "lease_until"]
        held = (write.grant for write in writes if write.grant and before.holds(write.grant))
        finished = any((QUEUES[old.stage].prefix, old.key) == (queue.prefix, grant.key) for old in held)
        finished |= queue.prefix == "settle_" and row["upstream_id"] not in (None, after.tasks[grant.key]["upstream_id"])
        assert until is None or until <= now or finished, f"{grant} while somebody else holds it"
        assert grant.fence > row[queue.prefix + "fence"], f"{grant} does not fence off the one before"


def check_sent(task: Row, earlier: Sequence[Sent], *, permitted: bool) -> None:
    """Sent again only when all before created nothing, or when somebody said so while it was uncertain."""
    proved = all(sent.nothing for sent in earlier)
    assert proved or (permitted and task["state"] == State.UNCERTAIN), f"{task['id']} was submitted twice"


def next_due(seen: Seen) -> int | None:
    """When the next row may be claimed."""
    times = []
    for queue in QUEUES.values():
        for row in seen.table(queue.table).values():
            due, until = row[queue.prefix + "due_at"], row[queue.prefix + "lease_until"]
            times += [] if due is None else [max(due, until or 0)]
    return min(times, default=None)


def check_end(seen: Seen, shop: Workshop, latest: int) -> None:
    """When nothing is due any more: everything is decided, and what was said and charged is known."""
    assert all(image["state"] != "pending" for image in seen.images.values()), "a picture is awaited for ever"
    assert all(row["state"] != "pending" for row in seen.deliveries.values()), "a delivery is pending for ever"
    for queue in QUEUES.values():
        untils = [row[queue.prefix + "lease_until"] or 0 for row in seen.table(queue.table).values()]
        assert all(until <= latest + 70 * SECOND for until in untils), "leased for ever"
    for task_id, row in seen.tasks.items():
        state = State(row["state"])
        assert state in TERMINAL, f"{task_id} is {state} for ever"
        assert not row["settled_digest"] or all(image["confirmed"] for image in seen.of(task_id)), (
            f"{task_id}: a picture that only a callback named is kept"
        )
        real = shop.upstream.reals.get(row["upstream_id"] or "")
        if real is None or not real.known or task_id in shop.upstream.lied_about or "task.parked" in seen.types(task_id):
            continue
        gone = state is State.EXPIRED and real.truth.error == error("resource_not_found")  # which leaves it open to proof
        if task_id in shop.proved_late and state is not State.CANCELLED and row["erased_at"] is None and not gone:
            assert row["settled_digest"] is not None, f"{task_id}: what was called back after its end was never settled"
        one = shop.confirms or len(shop.upstream.of(task_id)) == 1  # what is believed without an id may tell of either of two
        if one and row["settled_digest"] and real.truth.results and state is not State.CANCELLED and row["erased_at"] is None:
            named = [image["position"] for image in seen.of(task_id)]
            assert named == list(range(len(real.truth.results))), f"{task_id}: {named} are not all of its pictures"
        if shop.confirms and state is not State.EXPIRED:
            assert row["credits_used"] == real.truth.credits_used, f"{task_id}: {row['credits_used']} is not what it cost"
