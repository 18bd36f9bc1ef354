"""The effects that one write alone may and must have, by its kind, from the rows before and after
it (docs/api.md, docs/callbacks.md).
"""

from service.db.paging import Owned, Row
from service.tasks.account_breaker import SubmissionHold
from service.tasks.callbacks import Callback
from service.tasks.settlements import Settlement
from service.tasks.state import State
from service.tasks.submissions import SubmissionResult, SubmissionStart
from service.upstreams.base import Accepted, NotCreated, Refused, Status, Uncertain, outcome_digest
from tests.property.life_inbox import ENDED, FINAL, key_of, names_another
from tests.property.life_step import Step
from tests.property.life_upstream import error

SUBMITTABLE = (State.QUEUED, State.SUBMITTING, State.UNCERTAIN)


# --- submitting ---


def check_start(step: Step, item: SubmissionStart) -> None:
    was, row = step.task(item.lease.key)
    may = was["state"] in (State.QUEUED, State.SUBMITTING) or (
        was["state"] == State.UNCERTAIN and item.resubmit
    )
    assert (step.result is not None) == (step.held and may), (
        f"{was['state']}: wrong decision to submit"
    )
    if step.result is not None:
        assert (row["state"], step.result) == (State.SUBMITTING, row["body"])
        assert row["submit_lease_until"] >= step.time + item.call_ms, (
            "the lease does not outlast the call"
        )


def check_submission(step: Step, item: SubmissionResult) -> None:
    was, row = step.task(item.lease.key)
    outcome, state = item.outcome, State(was["state"])
    assert row["submit_outcomes"] == was["submit_outcomes"] + 1, "the outcome was not counted"
    open_ = state is State.UNCERTAIN or (step.held and state is State.SUBMITTING)
    due = None if row["submit_due_at"] is None else row["submit_due_at"] - step.time
    got = (row["state"], row["error"] and row["error"]["code"])
    match outcome:
        case Accepted():
            check_accepted(step, item, outcome)
            return
        case Refused() if open_:
            assert (row["state"], row["refusal_status"], row["error"]) == (
                State.FAILED,
                outcome.status,
                outcome.error,
            ), "a refusal was not recorded"
            return
        case NotCreated() if open_ and state is State.SUBMITTING:
            young = step.time - was["created_at"] < item.give_up_ms
            if was["doubted_at"] is not None:
                assert (*got, due, row["resubmit"]) == (
                    State.UNCERTAIN,
                    None,
                    item.wait_ms,
                    was["resubmit"] and young,
                )
            elif young:
                assert (*got, due) == (State.QUEUED, None, item.wait_ms), (
                    "nothing was created, and the task is not queued again in time"
                )
            else:
                assert got == (State.FAILED, "not_submitted"), "retried after the age limit"
            return
        case Uncertain() if open_ and state is State.SUBMITTING:
            again = item.resend and was["doubted_at"] is None
            assert (*got, due, row["resubmit"]) == (State.UNCERTAIN, None, item.decide_ms, again), (
                "an uncertain outcome was not recorded"
            )
            assert row["doubted_at"] is not None, "doubted_at is not set"
            return
        case None if step.held and state is State.UNCERTAIN and not was["resubmit"]:
            assert got == (State.FAILED, "submission_uncertain"), (
                "the time is up, and the task is not decided"
            )
            return
    assert row["state"] == was["state"], (
        f"{type(outcome).__name__} moved a task that is {was['state']}"
    )


def check_accepted(step: Step, item: SubmissionResult, outcome: Accepted) -> None:
    was, row = step.task(item.lease.key)
    id = outcome.report.upstream_id
    holder = next(
        (
            other
            for key, other in step.before.tasks.items()
            if other["upstream_id"] == id and key != item.lease.key
        ),
        None,
    )
    assert len(step.emitted("callback.conflict")) == (holder is not None), (
        "two tasks named one id without an event"
    )
    if holder is None or holder["upstream_id_from"] != "answer":
        assert row["upstream_id"] == (
            was["upstream_id"] if was["upstream_id_from"] == "answer" else id
        ), "an accepted response was not recorded"
    if row["upstream_id"] == id and row["settled_digest"] is None:
        assert row["settle_due_at"] is not None, "the upstream has the task, and no query is due"
    if was["state"] not in SUBMITTABLE and was["estimated_time"] is not None:
        assert row["estimated_time"] == was["estimated_time"], (
            "a late response replaced a newer value"
        )
    if row["state"] == State.SUBMITTED and row["settle_requests"]:
        assert was["upstream_id"] or row["settle_due_at"] <= step.time, (
            "a query was requested before the id was known, and is not due"
        )


def check_hold(step: Step, item: SubmissionHold) -> None:
    was, row = step.task(item.lease.key)
    if not step.held or was["state"] not in (State.QUEUED, State.UNCERTAIN):
        assert row["submit_due_at"] == was["submit_due_at"]
        return
    last = was["created_at"] + item.give_up_ms
    due = step.time + item.wait_ms
    assert row["submit_due_at"] == (
        min(due, last) if was["state"] == State.QUEUED and step.time < last else due
    ), "on hold for too long"
    assert (row["submit_attempts"], row["submit_outcomes"]) == (
        was["submit_attempts"] - 1,
        max(1, was["submit_outcomes"]),
    )
    assert row["submit_lease_owner"] is not None, "on hold without a process"


# --- settling ---


def check_settlement(step: Step, item: Settlement) -> None:
    if not step.held:
        return
    was, row = step.task(item.lease.key)
    report, ended = item.report, was["state"] in ENDED
    asked = was["settle_requests"] != item.requests and not (
        row["settled_digest"] and row["state"] in ENDED
    )
    waits = row["settle_due_at"] is not None and row["settle_due_at"] > step.time
    assert not asked or not waits, "a query was requested during a query, and is not due"
    young = (
        item.expires_ms is None
        or step.time - (was["submitted_at"] or was["created_at"]) < item.expires_ms
    )
    expires = was["state"] == State.SUBMITTED and not young
    if report is None:
        assert row["state"] == (State.EXPIRED if expires else was["state"]), (
            "expired at the wrong time"
        )
        assert row["settle_due_at"] is not None or not young or was["settled_digest"], (
            "no response, and no further query"
        )
        return
    for name in ("credits_used", "credits_reserved"):
        assert getattr(report, name) in (None, row[name]), f"{name} is not recorded"
    assert was["upstream_id_from"] != "hand" or row["upstream_id_from"] == "query", (
        "the upstream confirmed the id, and it still counts as given by hand"
    )
    if report.status not in FINAL:
        after = State.EXPIRED if expires else was["state"]
        assert (row["state"], row["settled_digest"]) == (after, was["settled_digest"]), (
            "a report that is not final settled the task"
        )
        over = ended and (row["settled_digest"] or not young)
        assert row["settle_due_at"] is not None or over or expires, (
            "not final, and no further query"
        )
    elif ended:
        check_after_the_end(step, item, was, row)
    elif was["state"] == State.SUBMITTED:
        gone = report.error == error("resource_not_found")
        failed = (
            State.CANCELLED
            if report.status is Status.CANCELLED
            else State.EXPIRED
            if gone
            else State.FAILED
        )
        named = report.status is Status.COMPLETED and step.before.of(item.lease.key)
        stores = report.results or named  # a callback's links count if the query has none
        after = (State.STORING, State.COMPLETED, State.FAILED) if stores else (failed,)
        assert row["state"] in after, (
            f"{report.status} with {len(report.results)} results became {row['state']}"
        )
        assert (row["settled_digest"] is None) == (gone and not stores), (
            "wrong about whether proof may still come"
        )
        assert (
            row["state"] != State.FAILED
            or report.status is not Status.COMPLETED
            or row["error"]["code"] in ("no_results", "results_lost")
        )
    if report.status is Status.COMPLETED and was["state"] in (State.SUBMITTED, State.STORING):
        check_expected(step, item, fresh=not ended)


def check_after_the_end(step: Step, item: Settlement, was: Row, row: Row) -> None:
    report = item.report
    assert report is not None
    emitted = step.emitted("task.late_result")
    empty = was["error"] is not None and was["error"]["code"] == "no_results"
    named = report.status is Status.COMPLETED and report.results
    nothing = outcome_digest(Status.COMPLETED, ())
    found = empty and named and was["settled_digest"] == nothing
    late = (
        (was["settled_digest"] is None or found)
        and was["state"] != State.CANCELLED
        and was["erased_at"] is None
    )
    gone = report.error == error("resource_not_found") and was["state"] == State.EXPIRED
    if not late:
        assert row["settled_digest"] == was["settled_digest"], (
            "settled twice, or after a cancel or an erasure"
        )
        if report.status is Status.COMPLETED and was["settled_digest"] and was["erased_at"] is None:
            check_expected(step, item, fresh=False)
        return
    assert (row["settled_digest"] is None) == gone, (
        "a late result was not settled, or a repeated report was"
    )
    awaited = [image for image in step.now.of(row["id"]) if image["state"] == "pending"]
    assert len(emitted) == (not gone and not awaited), "task.late_result is missing or too early"
    if report.status is Status.COMPLETED and report.results:
        check_expected(step, item, fresh=True)


def check_expected(step: Step, item: Settlement, *, fresh: bool) -> None:
    """Each result has its row, and each pending image has the newest link."""
    assert item.report is not None
    rows = step.now.of(item.lease.key)
    settled = step.before.tasks[item.lease.key]["settled_digest"]
    if fresh and not settled and item.report.results:
        assert [row["position"] for row in rows] == list(range(len(item.report.results))), (
            "not one row per result"
        )
    links = dict(enumerate(item.report.results))
    assert all(
        row["source_url"] == links.get(row["position"], row["source_url"])
        for row in rows
        if row["state"] == "pending"
    ), "a pending image has an old link"


# --- the inbox ---


def check_accept(step: Step, item: Callback) -> None:
    was, row = step.task(item.task_id)
    verdict, report, inbox = step.result.verdict, item.report, step.inbox
    foreign = names_another(item, step.before.tasks)
    crowded = inbox.crowded(item, foreign=foreign)
    emitted = step.emitted("callback.conflict")
    if item.id in inbox.calls:
        return  # the same call runs again, see `verdicts`
    assert verdict == inbox.expected(item, step.before.tasks), (
        f"{verdict}, and should be {inbox.expected(item, step.before.tasks)}"
    )
    if report and report.upstream_id and not foreign:
        assert row["upstream_id"] == report.upstream_id, "the callback's id was not bound"
    bound = row["upstream_id"] != was["upstream_id"]
    first = verdict == "accepted" and report is not None and report.status in FINAL
    if first or (
        verdict == "unreadable"
        and not crowded
        and (item.body,) not in inbox.kept.get(item.task_id, ())
    ):
        step.makes_query_due(item.task_id)
    if verdict == "conflict":
        known = key_of(item, foreign=foreign) in inbox.conflicts.get(item.task_id, ())
        assert crowded or len(emitted) == (not known), "each conflict emits one event"
        assert bound or row["state"] == was["state"], "a conflict moved a task"
    else:
        assert not emitted
    if verdict == "duplicate" and not bound:
        assert (was, step.before.images) == (row, step.now.images), "a duplicate changed something"
        assert len(step.before.events) == len(step.now.events), "a duplicate emitted an event"
    wanted = (
        row["state"] in (State.SUBMITTED, State.FAILED, State.EXPIRED) and row["erased_at"] is None
    )
    named = [
        image["source_url"]
        for image in step.now.of(item.task_id)
        if image["id"] not in step.before.images
    ]
    said = (
        list(report.results)
        if first and wanted and report and report.status is Status.COMPLETED
        else []
    )
    assert named == said, "the wrong images were added"
    assert not first or row["called_back_at"] is not None


def check_cancellation(step: Step, item: Owned) -> None:
    was, row = step.task(item.id)
    mine = item.owner in (None, was["owner"])
    assert step.result == (
        "missing" if not mine else was["state"] if was["state"] in ENDED else None
    )
    if step.result is None:
        assert (row["state"], step.now.of(item.id)) == (State.CANCELLED, []), (
            "the cancel did not end the task"
        )
        assert row["settle_due_at"] or not (was["upstream_id"] and was["settle_due_at"]), (
            "no query for the charge is due"
        )
