"""Whether the upstream takes our key and account. While it does not, nothing is submitted and one
probe at a time asks.

The probe is `GET /v1/credits`, which is free. Where that tells nothing (an upstream without it, a
gateway's page, no answer at all), or said yes although the next submission was refused again, one
task that waits is sent instead. So is, one at a time, what has waited too long: nothing is given up
for its age without a try, as it would be after a long absence.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from service.credits import millionths
from service.db.transaction import Lease
from service.errors import EgressError, StoreUnavailable
from service.net import Response
from service.ops.metrics import Metrics
from service.queue.backoff import wait_before
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.strict_json import JSON, read_object
from service.tasks.held_submissions import Hold, hold_submissions, resume_submissions
from service.upstreams.base import throttled

log = structlog.get_logger()

CREDITS = "/v1/credits"
PLACE_S = 10.0  # so long a probe waits for its place among the calls to the upstream
AT_ONCE = 500  # tasks that are made due in one transaction


class Account:
    """What this process knows of the account; `run` asks while it is refused. Waits between probes
    are those of `schedule`, in seconds.
    """

    def __init__(self, resources: Resources, schedule: Sequence[float]) -> None:
        self._resources = resources
        self._schedule = schedule
        self._outage = asyncio.Event()
        self._since = 0
        self._reason = ""
        self._probes = 0
        self._proved = True  # False: the credits were told, but no submission was taken since
        self._may_try = False
        self._trying = False

    @property
    def refused(self) -> bool:
        return self._outage.is_set()

    @contextmanager
    def sending(self, *, last: bool) -> Iterator[bool]:
        """Around one submission: whether it may be sent. While the account is refused that is one
        at a time: it probes, if that is wanted, or is the `last` try of what is too old to wait.
        """
        if not self.refused or self._trying or not (self._may_try or last):
            yield not self.refused
            return
        self._may_try, self._trying = False, True
        try:
            yield True
        finally:
            self._trying = False

    def refuse(self, reason: str) -> None:
        """A submission was refused because of our key or account."""
        self._resources.metrics.account_refusals.inc()
        if self.refused:
            return
        self._since, self._reason = self._resources.clock(), reason
        self._outage.set()
        log.error("account.refused", reason=reason)

    async def hold(self, lease: Lease, give_up_s: float) -> None:
        """Puts a task off that may not be sent now; the wait is for the case that this process
        dies: else `_restore` ends it.
        """
        wait = self._wait(len(self._schedule))
        await self._resources.store.write(
            hold_submissions, Hold(lease, round(wait * 1000), round(give_up_s * 1000))
        )
        checkpoint("account.held")
        if not self.refused:  # any more
            await self._resources.store.write(resume_submissions, AT_ONCE)

    async def taken(self, *, trial: bool) -> None:
        """A submission was taken, or refused for its own sake: our key was good when it was sent,
        `trial`: after it had been refused.
        """
        if trial and self.refused:
            await self._restore()
        if not self.refused:
            self._probes, self._proved = 0, True

    async def run(self) -> None:
        """Probes until cancelled."""
        while True:
            await self._outage.wait()
            self._probes += 1
            await asyncio.sleep(self._wait(self._probes))
            try:
                if self.refused and not self._trying:
                    await self._probe()
            # the next probe must come whatever became of this one; what waits is due by itself,
            # later
            except Exception as error:
                known = {
                    "stage": "account",
                    "key": None,
                    "attempt": self._probes,
                    "wait_s": None,
                    "exception": repr(error),
                }
                unforeseen = None if isinstance(error, StoreUnavailable) else error
                # a store that is away needs no traceback
                log.error("worker.failed", **known, exc_info=unforeseen)  # noqa: TRY400
                self._resources.metrics.worker_faults.labels("account").inc()

    def _wait(self, attempt: int) -> float:
        wait = wait_before(
            self._schedule, attempt, repeat_last=True, random=self._resources.random(), spread=0.2
        )
        assert wait is not None  # the last wait repeats
        return wait

    async def _probe(self) -> None:
        self._may_try = False  # while the credits are asked for
        answer = await self._credits() if self._proved else None
        if answer is not None and 200 <= answer.status < 300:
            self._proved = False
            await self._restore()
        elif answer is None or not self._same(answer):
            self._may_try = True
            await self._resources.store.write(resume_submissions, 1)

    async def _credits(self) -> Response | None:
        try:
            async with self._resources.limiter.slot("passthrough", PLACE_S) as record:
                answer = await self._resources.upstream.passthrough("GET", CREDITS)
                record(throttled(answer))
        except EgressError:
            return None
        note_credits(self._resources.metrics, answer.status, answer.body)
        return answer

    def _same(self, answer: Response) -> bool:
        """Whether it is the refusal that submissions got."""
        code = _section(_object(answer.body), "error").get("code")
        return answer.status == 401 or (answer.status == 403 and f"403 {code}" == self._reason)

    async def _restore(self) -> None:
        """Submissions are sent again, those that wait at once."""
        self._outage.clear()
        self._may_try = False
        log.warning(
            "account.restored", seconds=round((self._resources.clock() - self._since) / 1000, 1)
        )
        checkpoint("account.restored")
        more = True
        while more and not self._outage.is_set():
            more = await self._resources.store.write(resume_submissions, AT_ONCE) == AT_ONCE


def note_credits(metrics: Metrics, status: int, body: bytes) -> None:
    """Shows what remains, if an answer to `GET /v1/credits` says it."""
    remaining = remaining_credits(body) if 200 <= status < 300 else None
    if remaining is not None:
        metrics.upstream_credits.set(remaining)


def remaining_credits(body: bytes) -> float | None:
    """`data.token.remaining_credits`; None where it is not there or no sensible number."""
    credits = millionths(
        _section(_section(_object(body), "data"), "token").get("remaining_credits")
    )
    return None if credits is None else credits / 1_000_000


def _object(body: bytes) -> JSON:
    try:
        return read_object(body)
    except ValueError:
        return {}


def _section(document: JSON, name: str) -> JSON:
    value = document.get(name)
    return value if isinstance(value, dict) else {}
