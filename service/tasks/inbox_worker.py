"""The inbox of callbacks: a request commits one row, and a worker judges it (docs/callbacks.md).

The worker judges a task's rows in the order of arrival. The transaction that keeps the verdicts
deletes the rows. A crash before its commit leaves them to the next worker.
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter

import structlog
from sqlalchemy import Connection, bindparam, delete, select
from structlog.contextvars import bind_contextvars

from service.db.prepared import run, run_mappings
from service.db.tables import inbox
from service.db.transaction import Transaction
from service.errors import StoreUnavailable, cause_of
from service.ops import tracing
from service.queue.backoff import fault_wait
from service.queue.checkpoints import checkpoint
from service.queue.stage import log_failure
from service.resources import Resources
from service.strict_json import JSON
from service.tasks.callbacks import UNREADABLE_BYTES, Callback, Verdict, give_verdicts
from service.tasks.transitions import lock
from service.upstreams.base import Upstream

log = structlog.get_logger()

COMMIT_S = 8.0  # the upstream gives up after 10 s
MAX_BODY = 256 * 1024
SIGNAL = "inbox"  # of a commit that added rows
ROWS = 50  # that one look finds, and one transaction judges
LOOK_S, AGAIN_S = 5.0, 0.5  # waits for a signal, and after a failure


@dataclass(frozen=True, slots=True)
class Waiting:
    """A task with rows in the inbox, and what is needed to judge them."""

    task_id: str
    upstreams: Mapping[str, Upstream]
    result_ttl_ms: int


Judged = tuple[Callback, Verdict]


def insert_callbacks(tx: Transaction, items: Sequence[JSON]) -> list[None]:
    """Adds rows to the inbox. It reads nothing, not even whether the task is known."""
    tx.touched[SIGNAL] = None  # for the workers of every process
    for item in items:
        tx.insert(inbox, {**item, "received_at": tx.now})
    return [None] * len(items)


_WAITING = select(inbox.c.task_id).order_by(inbox.c.sequence).limit(ROWS)
_NOT_HELD = _WAITING.where(inbox.c.task_id.not_in(bindparam("held", expanding=True)))


def waiting_tasks(connection: Connection, held: Sequence[str]) -> list[str]:
    """The task of each of the oldest rows, without the tasks that are `held` back."""
    rows = run(connection, _NOT_HELD, {"held": [*held]}) if held else run(connection, _WAITING)
    return [task_id for (task_id,) in rows]


_OLDEST = (
    select(inbox.c.sequence)
    .where(inbox.c.task_id.in_(bindparam("tasks", expanding=True)))
    .order_by(inbox.c.sequence)
    .limit(ROWS)
)
_TAKING = delete(inbox).where(inbox.c.sequence.in_(_OLDEST)).returning(*inbox.c)


def judge_callbacks(tx: Transaction, items: Sequence[Waiting]) -> list[list[Judged]]:
    """Judges the oldest rows of these tasks and deletes them.

    The tasks are locked first. So if two processes judge the same task, the second one finds only
    rows that came after those of the first.
    """
    asked = {item.task_id: item for item in items}
    tasks = lock(tx, asked)
    deleted = run_mappings(tx.connection, _TAKING, {"tasks": list(asked)})
    # An insert whose commit was in doubt ran again: the row is there twice.
    rows = {row["id"]: row for row in sorted(deleted, key=itemgetter("sequence"))}
    callbacks = []
    for row in rows.values():
        body, item = row["body"], asked[row["task_id"]]
        upstream, waited_ms = item.upstreams[row["upstream"]], max(0, tx.now - row["received_at"])
        report = upstream.read_callback(body) if row["size"] <= MAX_BODY else None
        same = ("id", "upstream", "task_id", "digest", "received_at", "size")
        callback = Callback(
            **{name: row[name] for name in same},
            report=report,
            body=body if report else body[:UNREADABLE_BYTES],
            result_ttl_ms=item.result_ttl_ms - waited_ms,
            waited_ms=waited_ms,
        )
        callbacks.append(callback)
    judged: dict[str, list[Judged]] = {task_id: [] for task_id in asked}
    for callback, verdict in zip(callbacks, give_verdicts(tx, tasks, callbacks), strict=True):
        judged[callback.task_id].append((callback, verdict))
    return [judged.pop(item.task_id, []) for item in items]  # a task may be there twice


@dataclass(slots=True)
class InboxWorker:
    """Accepts callbacks in a process that serves, and judges them in a process with workers."""

    resources: Resources
    result_ttl_s: float
    # Tasks whose rows could not be judged: the failures, and when the next try is due.
    _failures: dict[str, tuple[int, float]] = field(default_factory=dict)

    async def receive(self, upstream: str, task_id: str, body: bytes, arrived: float) -> None:
        """Commits a callback with the right token. StoreUnavailable: nothing was promised.

        A body over the limit is unreadable. `arrived` is the monotonic time of the request.
        """
        resources = self.resources
        callback_id = resources.id("callback")
        bind_contextvars(task_id=task_id, callback_id=callback_id)
        row = {
            "id": callback_id,
            "task_id": task_id,
            "upstream": upstream,
            "size": len(body),
            "digest": hashlib.sha256(body).hexdigest(),
            "body": body if len(body) <= MAX_BODY else body[:UNREADABLE_BYTES],
        }
        checkpoint("inbox.received")
        try:
            async with asyncio.timeout_at(arrived + COMMIT_S):
                await resources.store.write(insert_callbacks, row, urgent=True)
        except (TimeoutError, StoreUnavailable) as error:
            cause = repr(error) if isinstance(error, TimeoutError) else cause_of(error)
            seconds = time.monotonic() - arrived
            refused(resources, "unavailable", task_id, seconds, exception=cause)
            raise StoreUnavailable("the callback could not be committed in time") from error
        checkpoint("inbox.committed")
        resources.metrics.callback_commit_seconds.observe(time.monotonic() - arrived)

    async def run(self) -> None:
        with self.resources.store.signals.listen(SIGNAL) as arrived:
            while True:
                arrived.clear()
                drained = False
                try:
                    drained = await self.drain()
                except Exception as error:  # noqa: BLE001 - without this job, callbacks would wait
                    self.resources.metrics.worker_faults.labels("inbox").inc()
                    log_failure("inbox", None, None, AGAIN_S, error)
                wait_s = LOOK_S if drained and not self._failures else AGAIN_S
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await arrived.wait()

    async def drain(self) -> bool:
        """Judges all rows, except those of tasks that are held back. False: the store failed."""
        clock = asyncio.get_running_loop().time
        while True:
            delayed = [task_id for task_id, (_, until) in self._failures.items() if until > clock()]
            try:
                ids = await self.resources.store.look_up(waiting_tasks, delayed)
            except StoreUnavailable:
                return False
            if ids:
                checkpoint("inbox.waiting")
            judging = [self.judge(task_id) for task_id in dict.fromkeys(ids)]
            # A stop leaves a transaction under way to its end, with the lines of its verdicts.
            done = await asyncio.shield(asyncio.gather(*judging))
            if ids and not any(done):
                return False
            for task_id, written in zip(dict.fromkeys(ids), done, strict=True):
                if not written:  # it may be these rows that the store cannot write
                    self._delay(task_id)
            if len(ids) < ROWS:  # a later row gives a signal
                for task_id in self._failures.keys() - {*delayed, *ids}:
                    del self._failures[task_id]  # another process has judged its rows
                return True

    async def judge(self, task_id: str) -> bool:
        """Judges the rows of a task. After a failure the task is held back for a while, so that
        other tasks have their turn.
        """
        resources = self.resources
        item = Waiting(task_id, resources.upstreams, round(self.result_ttl_s * 1000))
        try:
            judged = await resources.store.write(judge_callbacks, item)
        except StoreUnavailable:
            return False
        except Exception as error:  # noqa: BLE001 - logged, counted, tried again
            attempt, wait_s = self._delay(task_id)
            resources.metrics.worker_faults.labels("inbox").inc()
            log_failure("inbox", task_id, attempt, wait_s, error)
            return True
        self._failures.pop(task_id, None)
        for each in judged:
            self._report(*each)
        return True

    def _delay(self, task_id: str) -> tuple[int, float]:
        """Holds a task back. Returns its failures, and the seconds until the next try."""
        attempt = self._failures.get(task_id, (0, 0.0))[0] + 1
        wait_s = fault_wait(attempt)
        self._failures[task_id] = attempt, asyncio.get_running_loop().time() + wait_s
        return attempt, wait_s

    def _report(self, callback: Callback, verdict: Verdict) -> None:
        self.resources.metrics.callbacks.labels(verdict.verdict).inc()
        tracing.record("callback", "server", verdict.origin, callback.waited_ms / 1000)
        log.info(
            "callback.received",
            owner=verdict.owner,
            task_id=callback.task_id,
            **verdict.origin.ids,
            callback_id=verdict.callback_id,
            verdict=verdict.verdict,
            status=callback.report.status if callback.report else None,
            bytes=callback.size,
            duration_ms=callback.waited_ms,
        )


def refused(
    resources: Resources, reason: str, task_id: str | None, seconds: float, **more: object
) -> None:
    """Counts and logs a callback that was not kept, without its token. `task_id` is None unless the
    token proved it.
    """
    resources.metrics.callbacks.labels(reason).inc()
    duration_ms = round(seconds * 1000, 1)
    log.warning("callback.refused", reason=reason, task_id=task_id, duration_ms=duration_ms, **more)
