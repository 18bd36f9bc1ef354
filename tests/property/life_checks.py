"""Rules that hold for every task at any moment, checked on the rows and events before and after a
step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Select, Table, bindparam, select

from service.db.paging import Row
from service.db.queues import QUEUES
from service.db.tables import deliveries, events, images, replays, tasks
from service.db.transaction import Lease
from service.queue.leases import LONGEST_LEASE_MS
from service.tasks.results import LIVES
from service.tasks.state import MOVES, TERMINAL, UNPROVED, State
from tests.contract.subject import DAY
from tests.property.life_inbox import InboxModel
from tests.property.life_work import Sent, Write

Rows = Mapping[str, Row]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The rows at one moment, by id, and all events so far."""

    tasks: Rows = field(default_factory=dict)
    images: Rows = field(default_factory=dict)
    deliveries: Rows = field(default_factory=dict)
    replays: Rows = field(default_factory=dict)
    events: Sequence[Row] = ()

    def table(self, table: Table) -> Rows:
        rows: Rows = getattr(self, table.name)
        return rows

    def row(self, lease: Lease) -> Row | None:
        return self.table(QUEUES[lease.stage].table).get(lease.key)

    def of(self, task_id: str) -> list[Row]:
        return sorted(
            (row for row in self.images.values() if row["task_id"] == task_id),
            key=lambda row: row["position"],
        )

    def terminal(self, task_id: str) -> list[Row]:
        return [event for event in self.events if event["task_id"] == task_id and event["terminal"]]

    def types(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.events if event["task_id"] == task_id]

    def holds(self, lease: Lease) -> bool:
        row, prefix = self.row(lease), QUEUES[lease.stage].prefix
        return (
            row is not None
            and row[prefix + "fence"] == lease.fence
            and row[prefix + "lease_until"] is not None
        )


WHOLE = [select(table) for table in (tasks, images, deliveries, replays)]
LATER = select(events).where(events.c.sequence > bindparam("last")).order_by(events.c.sequence)


def take_snapshot(connection: Connection, before: Snapshot) -> Snapshot:
    """Reads all rows, and the events that `before` does not have."""

    def rows(statement: Select[Any]) -> Rows:
        return {row["id"]: row for row in connection.execute(statement).mappings()}

    new = connection.execute(
        LATER, {"last": before.events[-1]["sequence"] if before.events else 0}
    ).mappings()
    found = [rows(statement) for statement in WHOLE]
    return Snapshot(found[0], found[1], found[2], found[3], [*before.events, *new])


def reachable(before: State) -> set[State]:
    """The states that one or several moves of the table lead to. A transaction may make several
    moves.
    """
    found = {before}
    while more := {after for state in found for after in MOVES[state]} - found:
        found |= more
    return found


ENDINGS = {f"image.task.{state}" for state in TERMINAL}


def check(before: Snapshot, now: Snapshot, inbox: InboxModel, *, alone: bool) -> None:
    """Checks one step. `alone` means that it was one write."""
    assert before.tasks.keys() <= now.tasks.keys(), "a task is gone"
    for task_id, row in now.tasks.items():
        if (was := before.tasks.get(task_id)) is not None:
            check_step(was, row)
            check_new_events(
                was,
                row,
                now,
                [
                    event
                    for event in now.events[len(before.events) :]
                    if event["task_id"] == task_id
                ],
                alone=alone,
            )
        check_events(row, now)
        check_due(row, now)
    for image_id, image in now.images.items():
        check_link(image, before.images.get(image_id), now.tasks[image["task_id"]], inbox)
    for image_id, image in before.images.items():
        check_image(
            image,
            now.images.get(image_id),
            now.tasks[image["task_id"]],
            before.tasks[image["task_id"]],
        )
    if len(now.events) > len(before.events):
        assert len({event["id"] for event in now.events}) == len(now.events), (
            "two events have one id"
        )
        delivered = [(row["event_id"], row["endpoint_id"]) for row in now.deliveries.values()]
        assert len(set(delivered)) == len(delivered), "two deliveries of one event to one endpoint"


def check_step(was: Row, row: Row) -> None:
    """A task makes no move outside the table of states, and its settled outcome stands."""
    before, after = State(was["state"]), State(row["state"])
    assert after in reachable(before), f"{before} became {after}"
    assert not (row["doubted_at"] and after is State.QUEUED), "an uncertain task was queued again"
    fixed = [
        "created_at",
        "owner",
        "idempotency_key",
        "submitted_at",
        "terminal_at",
        "doubted_at",
        "erased_at",
    ]
    fixed += ["refusal_status", "settled_digest"] if before in TERMINAL else []
    fixed += ["called_back_at"] if row["erased_at"] is None else []
    fixed += ["error"] if before in TERMINAL and row["erased_at"] is None else []
    fixed += ["upstream_status"] if was["settled_digest"] else []
    fixed += ["upstream_id", "upstream_id_from"] if was["upstream_id_from"] == "answer" else []
    for name in fixed:
        assert was[name] in (None, row[name]), f"{name} was {was[name]} and is {row[name]}"
    sendable = after in UNPROVED and row["erased_at"] is None
    assert row["body"] == (was["body"] if sendable else b""), f"{after} keeps {row['body']!r}"
    renamed = was["upstream_id"] not in (None, row["upstream_id"])
    assert (
        not renamed
        or was["settle_lease_until"] is None
        or row["settle_fence"] > was["settle_fence"]
        or row["settle_lease_until"] is None
    ), "an answer about the replaced id can still be recorded"
    for name in ("settled_digest", "credits_reserved", "credits_used", "estimated_time"):
        assert was[name] is None or row[name] is not None, f"{name} was cleared"
    for name in ("progress", "submit_outcomes", "settle_requests", "submit_fence", "settle_fence"):
        assert was[name] <= row[name], f"{name} went back"


def check_events(row: Row, now: Snapshot) -> None:
    """A task has one terminal event if and only if it has ended. The event lists the images that
    were stored by then.
    """
    ends, types, state = now.terminal(row["id"]), now.types(row["id"]), State(row["state"])
    assert sum(type in ENDINGS for type in types) == len(ends), f"ended more than once: {types}"
    assert len(ends) == (state in TERMINAL), f"{len(ends)} terminal events while {state}"
    assert types.count("image.task.submitted") <= 1, f"an event came twice: {types}"
    assert ("image.task.submitted" in types) == (row["submitted_at"] is not None)
    for event in ends:
        assert (event["type"], event["data"]["state"], event["time"]) == (
            f"image.task.{state}",
            state,
            row["terminal_at"],
        )
        if row["erased_at"] is not None:
            continue
        stored = {
            image["id"]: image
            for image in now.of(row["id"])
            if image["state"] == "stored" and image["confirmed"]
        }
        for image in event["data"]["images"]:
            assert image["id"] in stored, "an event lists an image that is not stored"
            assert image["sha256"] == stored[image["id"]]["sha256"]
        if state is State.COMPLETED:
            named = [image["id"] for image in event["data"]["images"]]
            assert named == [image["id"] for image in now.of(row["id"])] != [], (
                "completed without all its images"
            )


def check_new_events(
    was: Row, row: Row, now: Snapshot, emitted: Sequence[Row], *, alone: bool
) -> None:
    """Each conflicting callback makes one query due. The terminal event lists all images stored by
    then.
    """
    conflicts = [
        event
        for event in emitted
        if event["type"] == "callback.conflict" and event["data"]["callback_id"]
    ]
    assert row["settle_requests"] - was["settle_requests"] >= len(conflicts), (
        "a conflict made no query due"
    )
    for event in emitted if alone else ():
        if event["terminal"]:
            rows = now.of(row["id"])
            over = all(image["confirmed"] and image["state"] != "pending" for image in rows)
            assert over or row["state"] == State.EXPIRED, (
                "ended with a pending image"
            )  # a callback may still prove an expired task
            stored = [
                image["id"] for image in rows if image["state"] == "stored" and image["confirmed"]
            ]
            assert [image["id"] for image in event["data"]["images"]] == stored, (
                "the event does not list the stored images"
            )
            own = [
                delivery
                for delivery in now.deliveries.values()
                if delivery["event_id"] == event["id"] and delivery["endpoint_id"] is None
            ]
            assert len(own) == (was["callback_url"] is not None), (
                "deliveries to the task's own callback_url"
            )
        if event["type"] == "task.parked" and event["data"]["stage"] == "submit":
            assert was["state"] in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN), (
                f"parked at the submit stage while {was['state']}"
            )


def check_due(row: Row, now: Snapshot) -> None:
    """A task that has not ended is due at a stage, and so is every pending image."""
    state = State(row["state"])
    if state in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN):
        assert row["submit_due_at"] is not None, f"{state}, and not due at the submit stage"
    elif state is State.SUBMITTED:
        assert row["settle_due_at"] is not None, "submitted, and no query is due"
    for image in now.of(row["id"]):
        assert (
            image["state"] != "stored"
            or image["sha256"] == sha256(image["source_url"].encode()).hexdigest()
        ), "an image of another link"
    awaited = [image for image in now.of(row["id"]) if image["state"] == "pending"]
    assert state is not State.STORING or awaited, "storing without a pending image"
    assert all(image["due_at"] is not None for image in awaited), "a pending image is not due"
    assert (
        state in (State.QUEUED, State.SUBMITTING, State.UNCERTAIN) or row["submit_due_at"] is None
    ), f"{state}, and due at the submit stage"
    assert state is not State.CANCELLED or not now.of(row["id"]), "a cancelled task has an image"
    if row["erased_at"] is not None:
        assert state in TERMINAL, f"erased while {state}"


def check_link(image: Row, was: Row | None, task: Row, inbox: InboxModel) -> None:
    """An image counts once an answer of the upstream named its link. A link lives for a day, and
    ends at most two days after the submission.
    """
    assert (
        not image["confirmed"] or image["source_url"] in inbox.links or image["state"] == "erased"
    ), "no answer of the upstream named the link"
    assert task["id"] not in inbox.erased or image["state"] == "erased", (
        "an erased task has an image"
    )
    if was and was["source_url"] != image["source_url"]:
        assert was["confirmed"] or image["stale_count"] == image["wrong_count"] == 0, (
            "counts of the replaced link are kept"
        )
    lives_on = was and was["confirmed"] and was["state"] != "lost"  # an operator may revive it
    if was and lives_on and was["link_dies_at"] != image["link_dies_at"]:
        assert (
            image["link_dies_at"] <= (task["submitted_at"] or task["created_at"]) + LIVES * DAY
        ), "the link lives longer than two days"


def check_image(was: Row, row: Row | None, task: Row, before: Row) -> None:
    """A confirmed image that is stored or lost stays so. Only a local cancel and an erasure remove
    it, and only an operator revives it.
    """
    if not was["confirmed"] or was["state"] == "pending" or task["erased_at"] is not None:
        return
    if row is None:
        assert task["state"] == State.CANCELLED != before["state"], "a confirmed image is gone"
        return
    revived = was["state"] == "lost" and row["state"] == "pending"
    names = ("confirmed", "position")
    for name in names if revived else ("state", "blob", "sha256", "source_url", *names):
        assert was[name] == row[name], (
            f"a {was['state']} image's {name} was {was[name]} and is {row[name]}"
        )


def check_new_lease(
    lease: Lease, writes: Sequence[Write], before: Snapshot, after: Snapshot, now: int
) -> None:
    """Only one worker has a lease for a row. The previous lease has expired, or its worker finishes
    in this step, or it asks about a replaced upstream id.
    """
    queue = QUEUES[lease.stage]
    row = before.table(queue.table).get(lease.key)
    if row is not None:
        until = row[queue.prefix + "lease_until"]
        held = (write.lease for write in writes if write.lease and before.holds(write.lease))
        finished = any(
            (QUEUES[old.stage].prefix, old.key) == (queue.prefix, lease.key) for old in held
        )
        finished |= queue.prefix == "settle_" and row["upstream_id"] not in (
            None,
            after.tasks[lease.key]["upstream_id"],
        )
        free = until is None or until <= now or until > now + LONGEST_LEASE_MS
        assert free or finished, f"{lease} while another lease stands"
        assert lease.fence > row[queue.prefix + "fence"], (
            f"{lease} does not fence off the previous lease"
        )


def check_submitted_once(task: Row, earlier: Sequence[Sent], *, permitted: bool) -> None:
    """A task is submitted again only if each earlier call proved that nothing was created, or if a
    setting or an operator permitted it while the task was uncertain.
    """
    proved = all(sent.nothing for sent in earlier)
    assert proved or (permitted and task["state"] == State.UNCERTAIN), (
        f"{task['id']} was submitted twice"
    )
