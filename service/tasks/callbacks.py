"""Taking callbacks: one commit, then the answer; no query, no download, no delivery here (contract
section 4).
"""

import asyncio
import hashlib
import time

import structlog

from service.errors import StoreUnavailable
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks.inbox import Callback, Verdict, accept_callbacks

log = structlog.get_logger()

COMMIT_S = 8.0  # the upstream gives up after 10 s
UNREADABLE_BYTES = 16 * 1024  # of a body that says nothing, so much is kept


async def receive(
    resources: Resources,
    task_id: str,
    body: bytes,
    result_ttl_s: float,
    came: float,
    *,
    whole: bool = True,
) -> Verdict:
    """Judges a callback whose token was right and commits it; StoreUnavailable: nothing was
    promised.

    A body that is not `whole` says nothing, but its token still proves who calls. It `came`, by the
    monotonic clock, before its turn: what it waited for that is of its time.
    """
    report = resources.upstream.read_callback(body) if whole else None
    callback = Callback(
        id=resources.id("callback"),
        upstream=resources.upstream.name,
        task_id=task_id,
        report=report,
        digest=hashlib.sha256(body).hexdigest(),
        body=body if report else body[:UNREADABLE_BYTES],
        result_ttl_ms=round(result_ttl_s * 1000),
    )
    checkpoint("inbox.received")
    try:
        async with asyncio.timeout_at(came + COMMIT_S):
            verdict = await resources.store.write(accept_callbacks, callback, urgent=True)
    except (TimeoutError, StoreUnavailable) as error:
        refused(resources, "unavailable", task_id, time.monotonic() - came)
        raise StoreUnavailable("the callback could not be committed in time") from error
    checkpoint("inbox.committed")
    seconds = time.monotonic() - came
    resources.metrics.callbacks.labels(verdict.verdict).inc()
    resources.metrics.callback_commit.observe(seconds)
    log.info(
        "callback.received",
        owner=verdict.owner,
        task_id=task_id,
        upstream_id=verdict.upstream_id,
        callback_id=verdict.callback_id,
        verdict=verdict.verdict,
        status=report.status if report else None,
        bytes=len(body),
        duration_ms=round(seconds * 1000, 1),
    )
    return verdict


def refused(resources: Resources, reason: str, task_id: str | None, seconds: float) -> None:
    """A callback that was not kept: counted and logged, its token never; `task_id` only when the
    token proved it.
    """
    resources.metrics.callbacks.labels(reason).inc()
    log.warning(
        "callback.refused", reason=reason, task_id=task_id, duration_ms=round(seconds * 1000, 1)
    )
