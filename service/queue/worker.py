"""The workers of a process: leased rows in, one job each, never more than a stage has places for.

Rows are born leased while a place is free (the store asks through `reserve` and `take`); else they
are due, and claimed when a place is freed, when the store hints at work, or at the next look. What
a dead process held is due when its lease ends.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import structlog
from structlog.contextvars import bound_contextvars

from service.db.store import Store
from service.db.transaction import Lease, Transaction
from service.errors import StoreUnavailable
from service.ops.metrics import Metrics
from service.queue import crashes
from service.queue.backoff import fault_wait
from service.queue.crashes import FAULT_LIMIT, DeadLetter, Fault, claim_candidates, record_faults
from service.queue.leases import RENEW_S, claim, give_back, has_candidate, renew, snooze

log = structlog.get_logger()

LOOK_S = 0.5  # how long due work may wait when nobody hinted at it
RETURNED = 10_000  # rows that are remembered as given back
ALONE_S = 15.0  # so long a suspect waits for others to end, and then has the process to itself
KEYS = {
    **dict.fromkeys(("submit", "settle", "reconcile"), "task_id"),
    "download": "image_id",
    **dict.fromkeys(("deliver", "redeliver"), "delivery_id"),
    "replay": "replay_id",
}


@dataclass(slots=True)
class Stage:
    """One kind of work: `run` does it under a lease and records what came of it."""

    name: str
    places: int
    run: Callable[[Lease], Awaitable[None]]
    dead_letter: DeadLetter
    free: int = field(init=False)

    def __post_init__(self) -> None:
        self.free = self.places


class WorkerPool:
    """`Workers` for a store: runs what it grants."""

    def __init__(
        self,
        store: Store,
        stages: Sequence[Stage],
        metrics: Metrics,
        tell: Callable[[Transaction], None],
        turn: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._stages = {stage.name: stage for stage in stages}
        self._metrics = metrics
        self._tell = tell
        self._turn = turn  # waits until a job may start
        self._jobs: dict[Lease, asyncio.Task[None]] = {}
        self._backlog: set[str] = set()
        self._alone = False  # a row that is suspected of bringing processes down runs alone
        self._stopping = False
        self._late: list[Lease] = []  # what a transaction that was under way granted after the stop
        self._wake = asyncio.Event()
        self._away = False  # the store, and that was logged
        self._returned: Counter[str] = (
            Counter()
        )  # how often a row was given back since it was last worked on to an end
        self.alive = False

    # --- what the store asks ---

    def reserve(self) -> dict[str, int]:
        if self._alone:
            return {}
        free = {stage.name: stage.free for stage in self._stages.values() if stage.free}
        for stage in self._stages.values():
            stage.free = 0
        return free

    def take(self, leased: Iterable[Lease], unused: Mapping[str, int]) -> None:
        for name, places in unused.items():
            self._stages[name].free += places
            if places and name in self._backlog:  # they were not free when somebody looked
                self._wake.set()
        if self._stopping:
            self._late += leased
            return
        for lease in leased:
            self._jobs[lease] = self._started(lease)

    def _started(self, lease: Lease) -> "asyncio.Task[None]":
        return asyncio.create_task(
            self._work(self._stages[lease.stage], lease), name=f"{lease.stage}:{lease.key}"
        )

    def committed(self, tx: Transaction) -> None:
        self._tell(tx)
        self.hinted(tx.due)

    def hinted(self, stages: Iterable[str] | None) -> None:
        if known := self._stages.keys() if stages is None else self._stages.keys() & set(stages):
            self._backlog |= known
            self._wake.set()

    # --- work ---

    async def run(self) -> None:
        """Claims work until cancelled."""
        self._store.attach(self)
        self.alive = True
        renewing = asyncio.create_task(self._renew(), name="renew-leases")
        try:
            clock = asyncio.get_running_loop().time
            wanted, look = set(self._stages), clock() + LOOK_S
            while not self._stopping:
                self._wake.clear()
                await self._claim(wanted)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(
                        look
                    ):  # `wait_for` of Python 3.11 loses a cancellation that meets the event
                        await self._wake.wait()
                wanted = set(self._backlog)
                if clock() >= look:  # however busy one stage is, the others' rows come due
                    wanted, look = set(self._stages), clock() + LOOK_S
        finally:
            self.alive = False
            renewing.cancel()

    async def _claim(self, wanted: Collection[str]) -> None:
        names = [
            stage.name for stage in self._stages.values() if stage.free and stage.name in wanted
        ]
        self._backlog -= set(names)  # the claim tells if there is more
        try:
            await asyncio.gather(*(self._store.write(claim, name) for name in names))
            if (
                names
                and len(wanted) == len(self._stages)
                and await self._store.read(crashes.any_candidate)
            ):
                await self._work_on_candidates(names)
            self._away = False
        except (
            Exception
        ) as error:  # the loop must outlive whatever the store does: tried again at the next look
            known = {
                "stage": "claim",
                "key": None,
                "attempt": None,
                "wait_s": LOOK_S,
                "exception": f"{type(error).__name__}: {error}",
            }
            unforeseen = None if isinstance(error, StoreUnavailable) else error
            if unforeseen or not self._away:
                # a store that is away needs no traceback
                log.error("worker.failed", **known, exc_info=unforeseen)  # noqa: TRY400
            self._away = unforeseen is None
            self._metrics.worker_faults.labels("claim").inc()
            await asyncio.sleep(LOOK_S)

    async def _work_on_candidates(self, names: Iterable[str]) -> None:
        """Works alone on rows that outlived deaths of their process, for `ALONE_S` at most each, so
        that the next death has one cause.

        Each is leased when all others have ended, or it would be blamed for a death that came
        before it was begun.
        """
        for name in names:
            if not await self._store.write(has_candidate, name):
                continue
            self._alone = True
            try:
                await self.drained(ALONE_S)
                candidate = (
                    await self._store.write(
                        claim_candidates, (name, self._stages[name].dead_letter)
                    )
                    if self._stages[name].free
                    else None
                )
                if candidate is not None and candidate.dead_lettered:
                    log.error("task.parked", stage=name, cause=f"{candidate.crashes} deaths")
                elif candidate is not None:
                    self._stages[name].free -= 1
                    job = self._jobs[candidate.lease] = self._started(candidate.lease)
                    await asyncio.wait([job], timeout=ALONE_S)
            finally:
                self._alone = False
                self._wake.set()

    async def _work(self, stage: Stage, lease: Lease) -> None:
        try:
            with bound_contextvars(**{KEYS[stage.name]: lease.key}):
                try:
                    await self._turn()
                    if self._stopping:
                        await self._store.write(give_back, lease)
                    else:
                        await stage.run(lease)
                        self._returned.pop(lease.key, None)
                # the one broad except of the workers: logged once, counted, tried again
                except Exception as error:  # noqa: BLE001
                    await self._failed(lease, error)
        finally:
            self._jobs.pop(lease, None)
            stage.free += 1
            if stage.name in self._backlog:
                self._wake.set()

    async def _failed(self, lease: Lease, error: Exception) -> None:
        wait = fault_wait(lease.attempts)
        self._metrics.worker_faults.labels(lease.stage).inc()
        unforeseen = not isinstance(error, StoreUnavailable)
        log.error(
            "worker.failed",
            stage=lease.stage,
            key=lease.key,
            attempt=lease.attempts,
            wait_s=wait,
            exception=f"{type(error).__name__}: {error}",
            exc_info=error if unforeseen else None,
        )
        if not unforeseen:
            await self._give_back(lease)
            return
        dead_letter = self._stages[lease.stage].dead_letter
        try:
            faults = await self._store.write(
                record_faults, Fault(lease, round(wait * 1000), dead_letter)
            )
        except StoreUnavailable:
            await self._give_back(lease)
            return
        if faults >= FAULT_LIMIT:
            log.error("task.parked", stage=lease.stage, cause=f"{faults} faults")

    async def _give_back(self, lease: Lease) -> None:
        """Gives up work that could not be recorded, as soon as the store commits again; from the
        third time on others go first, as it may be this row that the store cannot read or write.
        """
        if len(self._returned) > RETURNED:
            self._returned.clear()
        self._returned[lease.key] += 1
        again = self._returned[lease.key] - 2
        wait_ms = round(fault_wait(again) * 1000) if again > 0 else 0
        given = False
        while not given:
            await asyncio.sleep(LOOK_S)
            given = self._stopping  # then once more, or a death that was none is counted
            with suppress(StoreUnavailable):
                await self._store.write(snooze, (lease, wait_ms))
                given = True

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            renewals = [self._store.write(renew, lease) for lease in self._jobs]
            await asyncio.gather(*renewals, return_exceptions=True)

    def quiesce(self) -> None:
        """Starts nothing new from now on; what is in flight goes on until `stop`."""
        self._store.detach()
        self._stopping = True
        self._wake.set()

    async def drained(self, limit_s: float) -> None:
        """Waits for what is in flight, within the limit."""
        if self._jobs:
            await asyncio.wait(self._jobs.values(), timeout=limit_s)

    async def stop(self, limit_s: float) -> int:
        """Finishes what is in flight within the limit, gives the rest back; how many that were."""
        self.quiesce()
        await self.drained(limit_s)
        left = dict(self._jobs)
        for job in left.values():
            job.cancel()
        await asyncio.gather(*left.values(), return_exceptions=True)
        nothing = Lease(
            "submit", "", 0, 0
        )  # its release changes no row, and comes after the transaction that is under way
        await asyncio.gather(
            *(self._store.write(give_back, lease) for lease in (*left, nothing)),
            return_exceptions=True,
        )
        late, self._late = self._late, []
        await asyncio.gather(
            *(self._store.write(give_back, lease) for lease in late), return_exceptions=True
        )
        return len(left) + len(late)
