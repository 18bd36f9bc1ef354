"""What one write alone may do, and must: by its kind, from the rows before and after it (contract
sections 3 and 4).
"""

from service.db.paging import Row
from service.tasks.account_breaker import SubmissionHold
from service.tasks.callbacks import Callback
from service.tasks.cancel import Cancellation
from service.tasks.confirm_worker import Settlement
from service.tasks.state import State
from service.tasks.submissions import SubmissionResult, SubmissionStart
from service.upstreams.base import Accepted, NotCreated, Refused, Status, Uncertain
from tests.property.life_heard import ENDED, FINAL, key_of, names_another
from tests.property.life_step import Step
from tests.property.life_upstream import error

SUBMITTABLE = (State.QUEUED, State.SUBMITTING, State.UNCERTAIN)


# --- submitting ---


def check_start(step: Step, item: SubmissionStart) -> None:
    was, row = step.task(item.lease.key)
    may = was["state"] in (State.QUEUED, State.SUBMITTING) or (
        was["state"] == State.UNCERTAIN and item.resubmit
    )
    assert (step.result is not None) == (step.held and may), f"{was['state']}: sent, or not"
    if step.result is not None:
        assert (row["state"], step.result) == (State.SUBMITTING, row["body"])
        assert row["submit_lease_until"] >= step.time + item.call_ms, (
            "the lease does not outlast the call"
        )


def check_submission(step: Step, item: SubmissionResult) -> None:
    was, row = step.task(item.lease.key)
    outcome, state = item.outcome, State(was["state"])
    assert row["submit_outcomes"] == was["submit_outcomes"] + 1, (
        "whoever waits for an outcome is not told"
    )
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
            ), "a refusal lost"
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
                    "nothing was created, and not sent again in time"
                )
            else:
                assert got == (State.FAILED, "not_submitted"), "tried for ever"
            return
        case Uncertain() if open_ and state is State.SUBMITTING:
            again = item.resend and was["doubted_at"] is None
            assert (*got, due, row["resubmit"]) == (State.UNCERTAIN, None, item.decide_ms, again), (
                "uncertain, and not as it should be"
            )
            assert row["doubted_at"] is not None, "a doubt that nobody knows of"
            return
        case None if step.held and state is State.UNCERTAIN and not was["resubmit"]:
            assert got == (State.FAILED, "submission_uncertain"), (
                "time is up, and nothing is decided"
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
    assert len(step.told("callback.conflict")) == (holder is not None), (
        "two have one id, and nobody is told"
    )
    if holder is None or holder["upstream_id_from"] != "answer":
        assert row["upstream_id"] == (
            was["upstream_id"] if was["upstream_id_from"] == "answer" else id
        ), "an answer in hand is forgotten"
    if row["upstream_id"] == id and row["settled_digest"] is None:
        assert row["settle_due_at"] is not None, "the upstream has it, and nobody will ask"
    if was["state"] not in SUBMITTABLE and was["estimated_time"] is not None:
        assert row["estimated_time"] == was["estimated_time"], "a late answer knows better"
    if row["state"] == State.SUBMITTED and row["settle_requests"]:
        assert was["upstream_id"] or row["settle_due_at"] <= step.time, (
            "somebody asked before there was an id, and waits"
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
    ), "held for too long"
    assert (row["submit_attempts"], row["submit_outcomes"]) == (
        was["submit_attempts"] - 1,
        max(1, was["submit_outcomes"]),
    )
    assert row["submit_lease_owner"] is not None, "held by nobody"


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
    assert not asked or not waits, "somebody asked while the upstream was asked, and waits"
    if report is None:
        young = (
            item.expires_ms is None
            or step.time - (was["submitted_at"] or was["created_at"]) < item.expires_ms
        )
        expires = was["state"] == State.SUBMITTED and not young
        assert row["state"] == (State.EXPIRED if expires else was["state"]), (
            "expired, or not, before its time"
        )
        assert row["settle_due_at"] is not None or not young or was["settled_digest"], (
            "no answer, and never asked again"
        )
        return
    for name in ("credits_used", "credits_reserved"):
        assert getattr(report, name) in (None, row[name]), f"{name} is not recorded"
    assert was["upstream_id_from"] != "hand" or row["upstream_id_from"] == "query", (
        "the upstream knows it, and it may be given anew"
    )
    if report.status not in FINAL:
        assert (row["state"], row["settled_digest"]) == (was["state"], was["settled_digest"]), (
            "settled by what is not final"
        )
        assert row["settle_due_at"] is not None or (ended and row["settled_digest"]), (
            "not final, and never asked again"
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
        after = (State.STORING, State.COMPLETED, State.FAILED) if report.results else (failed,)
        assert row["state"] in after, (
            f"{report.status} with {len(report.results)} results became {row['state']}"
        )
        assert (row["settled_digest"] is None) == (gone and not report.results), (
            "settled, or open to proof"
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
    told = step.told("task.late_result")
    late = (
        was["settled_digest"] is None
        and was["state"] != State.CANCELLED
        and was["erased_at"] is None
    )
    gone = report.error == error("resource_not_found") and was["state"] == State.EXPIRED
    if not late:
        assert row["settled_digest"] == was["settled_digest"], "settled twice, or after a cancel"
        if report.status is Status.COMPLETED and was["settled_digest"] and was["erased_at"] is None:
            check_expected(step, item, fresh=False)
        return
    assert (row["settled_digest"] is None) == gone, (
        "a late result is not kept, or what was said before is"
    )
    awaited = [image for image in step.now.of(row["id"]) if image["state"] == "pending"]
    assert len(told) == (not gone and not awaited), (
        "a late result, and nobody is told, or too early"
    )
    if report.status is Status.COMPLETED and report.results:
        check_expected(step, item, fresh=True)


def check_expected(step: Step, item: Settlement, *, fresh: bool) -> None:
    """Each result has its row, and what is still awaited the link that was just given."""
    assert item.report is not None
    rows = step.now.of(item.lease.key)
    settled = step.before.tasks[item.lease.key]["settled_digest"]
    if fresh and not settled:
        assert [row["position"] for row in rows] == list(range(len(item.report.results))), (
            "not a row a result"
        )
    links = dict(enumerate(item.report.results))
    assert all(
        row["source_url"] == links.get(row["position"], row["source_url"])
        for row in rows
        if row["state"] == "pending"
    ), "an old link"


# --- the inbox ---


def check_accept(step: Step, item: Callback) -> None:
    was, row = step.task(item.task_id)
    verdict, report, heard = step.result.verdict, item.report, step.heard
    foreign = names_another(item, step.before.tasks)
    crowded = heard.crowded(item, foreign=foreign)
    told = step.told("callback.conflict")
    if item.id in heard.calls:
        return  # this very call, run again: see `verdicts`
    assert verdict == heard.expected(item, step.before.tasks), (
        f"{verdict}, and should be {heard.expected(item, step.before.tasks)}"
    )
    if report and report.upstream_id and not foreign:
        assert row["upstream_id"] == report.upstream_id, (
            "a callback came first, and its id is not bound"
        )
    bound = row["upstream_id"] != was["upstream_id"]
    first = verdict == "accepted" and report is not None and report.status in FINAL
    if first or (
        verdict == "unreadable"
        and not crowded
        and (item.body,) not in heard.kept.get(item.task_id, ())
    ):
        step.is_asked(item.task_id)
    if verdict == "conflict":
        known = key_of(item, foreign=foreign) in heard.conflicts.get(item.task_id, ())
        assert crowded or len(told) == (not known), "a conflict is told once"
        assert bound or row["state"] == was["state"], "a conflict moved a task"
    else:
        assert not told
    if verdict == "duplicate" and not bound:
        assert (was, step.before.images) == (row, step.now.images), "a duplicate changed something"
        assert len(step.before.events) == len(step.now.events), "a duplicate is told of"
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
    assert named == said, "fetched what should not be, or not what should"
    assert not first or row["called_back_at"] is not None


def check_cancellation(step: Step, item: Cancellation) -> None:
    was, row = step.task(item.task_id)
    mine = item.owner in (None, was["owner"])
    assert step.result == (
        "missing" if not mine else was["state"] if was["state"] in ENDED else None
    )
    if step.result is None:
        assert (row["state"], step.now.of(item.task_id)) == (State.CANCELLED, []), (
            "cancelled, and goes on"
        )
        assert row["settle_due_at"] or not (was["upstream_id"] and was["settle_due_at"]), (
            "what it cost is not asked"
        )
