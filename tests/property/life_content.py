"""The effects of one write on images and content: downloads, an operator's interventions, and
erasure.
"""

from service.db.paging import Owned, Row
from service.images import downloads
from service.images.downloads import (
    AT_RISK_MS,
    AT_RISK_STALE,
    WRONG_LIMIT,
    WRONG_MS,
    Download,
    Lost,
    Retry,
)
from service.tasks.admin import REVIVED_MS, TaskResolution
from service.upkeep.retention_sql import TASKS
from tests.contract.subject import MINUTE
from tests.property.life_inbox import ENDED
from tests.property.life_step import Step


def check_download(step: Step, item: Download) -> None:
    was = step.before.images.get(item.lease.key)
    row = step.now.images.get(item.lease.key)
    if (
        not step.held
        or was is None
        or row is None
        or was["state"] != "pending"
        or was["source_url"] != item.source_url
    ):
        assert step.result is None
        return
    outcome = item.outcome
    state = "lost" if isinstance(outcome, Lost) else "stored"
    if isinstance(outcome, Retry):
        state = "lost" if is_final(was, outcome, step.time) else "pending"
        asks = (
            state == "pending"
            and outcome.stale
            and step.before.tasks[item.task_id]["settled_digest"] is not None
        )
        if asks:
            step.makes_query_due(item.task_id)
        else:
            assert (
                step.now.tasks[item.task_id]["settle_requests"]
                == step.before.tasks[item.task_id]["settle_requests"]
            )
        dying = step.time >= row["link_dies_at"] - AT_RISK_MS or row["stale_count"] >= AT_RISK_STALE
        risky = dying or row["wrong_count"] >= WRONG_LIMIT or outcome.refused is not None
        risks = state == "pending" and risky and was["at_risk_at"] is None
        refused_host = outcome.refused and outcome.refused.host
        assert row["refused_host"] == refused_host, "the refused host is not kept"
        assert len(step.emitted("image.at_risk")) == risks, "image.at_risk, too often or not at all"
    assert (step.result, row["state"]) == (state, state), f"{outcome} left it {row['state']}"


def is_final(was: Row, retry: Retry, time: int) -> bool:
    """The link has expired, or it was stale ten times over half an hour, or the same wrong bytes
    came three times over ten minutes.
    """
    since = time if was["stale_since"] is None else was["stale_since"]
    limit = downloads.STALE_LIMIT  # test_life.py lowers it
    stale = retry.stale and was["stale_count"] + 1 >= limit and time - since >= 30 * MINUTE
    same = retry.wrong_sha256 is not None and retry.wrong_sha256 == was["wrong_sha256"]
    lasting = was["wrong_since"] is not None and time - was["wrong_since"] >= WRONG_MS
    wrong = same and was["wrong_count"] + 1 >= WRONG_LIMIT and lasting
    return stale or wrong or (not retry.stale and time >= was["link_dies_at"])


# --- an operator's interventions ---


def check_resolution(step: Step, item: TaskResolution) -> None:
    was, row = step.task(item.task_id)
    if step.result is not None:
        assert was == row, "refused, and the row changed"
    elif item.upstream_id is not None:
        assert row["upstream_id"] == item.upstream_id
        step.makes_query_due(item.task_id)
    else:
        assert was["state"] == "uncertain", f"resolved by hand while {was['state']}"
        due, until = row["submit_due_at"], row["submit_lease_until"]
        wanted = row["state"] == "uncertain" and row["resubmit"] and due <= step.time
        assert (
            (wanted or until) if item.resubmit else row["error"]["code"] == "submission_uncertain"
        ), "the operator's decision had no effect"


def check_reconciled(step: Step, task_id: str) -> None:
    if step.result is None:
        step.makes_query_due(task_id)
        awaited = [image for image in step.now.of(task_id) if image["state"] == "pending"]
        assert all(
            image["due_at"] is not None
            and image["due_at"] <= step.time + REVIVED_MS * (image["attempts"] == 0)
            for image in awaited
        ), "a pending image is not due now"
        row = step.now.tasks[task_id]
        assert (
            row["state"] == "cancelled"
            or row["erased_at"] is not None
            or not any(
                image["state"] == "lost" and image["confirmed"] for image in step.now.of(task_id)
            )
        ), "a lost image is not fetched again"


def check_erased(step: Step, item: Owned) -> None:
    was, row = step.task(item.id)
    assert step.result.refused == (was["state"] if was["state"] not in ENDED else None)
    if step.result.refused is None:
        blobs = {image["blob"] for image in step.before.of(item.id) if image["blob"]}
        assert set(step.result.blobs) == blobs, "a blob is left"
        assert all(
            image["blob"] is None and image["state"] == "erased" for image in step.now.of(item.id)
        ), "an image is left"
        check_bare(row)


def check_bare(row: Row) -> None:
    assert (row["prompt"], row["body"], row["request"], row["callback_url"]) == (
        None,
        b"",
        {},
        None,
    ), "content is left after erasure"
    assert row["erased_at"] is not None


def check_stripped(step: Step, before: int) -> None:
    """A task that ended by then loses its content, unless some work for it is left."""
    old = {
        id
        for id, row in step.before.tasks.items()
        if row["terminal_at"] is not None
        and row["terminal_at"] <= before
        and row["erased_at"] is None
        and row["settle_due_at"] is None
        and all(image["state"] != "pending" for image in step.before.of(id))
    }
    for delivery in step.before.deliveries.values():
        if delivery["endpoint_id"] is None and delivery["state"] == "pending":
            old.discard(delivery["task_id"])
    stripped = {id for id, row in step.now.tasks.items() if row != step.before.tasks[id]}
    assert stripped <= old
    assert step.result.tasks == len(stripped) == min(len(old), TASKS)
    for id in stripped:
        check_bare(step.now.tasks[id])
        assert all(image["confirmed"] for image in step.now.of(id)), (
            "an image is left that no query will confirm"
        )
