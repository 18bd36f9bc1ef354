"""The worker pool of a process: it claims due rows and runs one job for each lease.

A new row is leased in the transaction that writes it while its stage has a free slot: the store
takes slots with `reserve` and returns the leases with `take`. All other rows become due. The pool
claims them when a slot becomes free and when the store hints at work.

The pool also looks for due rows, with one statement that changes nothing: when the next row is due,
`LOOK_S` after each commit of this process, and after `QUIET` times that in any case. That last look
finds the rows of a dead process when their leases have ended, and work whose hint was lost.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from structlog.contextvars import bound_contextvars

from service.db.batching import BatchingStore
from service.db.transaction import Lease, Transaction
from service.errors import StoreUnavailable
from service.fair_slots import HOLDER
from service.ops.metrics import Metrics
from service.queue.backoff import fault_wait
from service.queue.crashes import FAULT_LIMIT, Fault, claim_candidates, record_faults
from service.queue.leases import RENEW_S, claim, claim_with_rows, give_back, renew, snooze
from service.queue.outlook import outlook
from service.queue.stage import KEYS, Stage, log_failure, log_parked

LOOK_S = 0.5  # how long work of this process may wait without a hint
QUIET = 4  # looks that a pool leaves out while nothing is due
RETURNED = 10_000  # rows whose returns the pool remembers
ALONE_S = 15.0  # a poison candidate waits so long for other jobs, and then runs alone for so long


class WorkerPool:
    """`Workers` for a store.

    `after_commit` gets each committed transaction. `turn` waits until a job may start.
    """

    def __init__(
        self,
        store: BatchingStore,
        stages: Sequence[Stage],
        metrics: Metrics,
        after_commit: Callable[[Transaction], None],
        turn: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._stages = {stage.name: stage for stage in stages}
        self._metrics = metrics
        self._after_commit = after_commit
        self._turn = turn
        self._jobs: dict[Lease, asyncio.Task[None]] = {}
        self._backlog: set[str] = set()  # stages with due work
        self._alone = False  # a poison candidate runs alone
        self._stopping = False
        self._late: list[Lease] = []  # leases of transactions that were under way at the stop
        self._wake = asyncio.Event()
        self._look_at = 0.0  # by the loop's clock
        self._away = False  # the store is unavailable, and the log says so
        # Stages whose next claim reads no rows, as the first does: a row whose reading kills the
        # process is a crash only under a lease.
        self._bare = {stage.name for stage in stages if stage.rows}
        self._returned: Counter[str] = Counter()  # by row, since its last finished run
        self.alive = False

    # --- Workers ---

    def reserve(self) -> dict[str, int]:
        if self._alone:
            return {}
        free = {stage.name: stage.free for stage in self._stages.values() if stage.free}
        for stage in self._stages.values():
            stage.free = 0
        return free

    def shares(self) -> dict[str, dict[str, int]]:
        return {stage.name: dict(stage.used) for stage in self._stages.values() if stage.shared}

    def take(self, leased: Iterable[Lease], unused: Mapping[str, int]) -> None:
        for name, slots in unused.items():
            self._stages[name].free += slots
            if slots and name in self._backlog:  # the last claim did not have these slots
                self._wake.set()
        if self._stopping:
            self._late += leased
        else:
            for lease in leased:
                self._jobs[lease] = self._start(lease)

    def committed(self, tx: Transaction) -> None:
        """Tells of the transaction after its callers have run on, and before waiting requests do:
        the log lines of its cause come first, and those of responses last.
        """
        loop = asyncio.get_running_loop()
        loop.call_soon(self._after_commit, tx)
        self.hinted(tx.due)
        if self._look_at > (soon := loop.time() + LOOK_S):  # it may have made a row due later
            self._look_at = soon
            self._wake.set()

    def hinted(self, stages: Iterable[str] | None) -> None:
        if names := self._stages.keys() if stages is None else self._stages.keys() & set(stages):
            self._backlog |= names
            self._wake.set()

    # --- claims ---

    async def run(self) -> None:
        """Claims work until cancelled."""
        self._store.attach(self)
        self.alive = True
        renewing = asyncio.create_task(self._renew(), name="renew-leases")
        try:
            while not self._stopping:
                self._wake.clear()
                await self._claim()
                # `wait_for` of Python 3.11 loses a cancellation that meets the event.
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._look_at):
                        await self._wake.wait()
        finally:
            self.alive = False
            renewing.cancel()

    async def _claim(self) -> None:
        try:
            clock = asyncio.get_running_loop().time
            names = [name for name in self._backlog if self._stages[name].free]
            self._backlog -= set(names)  # the claim adds a stage again if it has more
            await asyncio.gather(*(self._claim_stage(self._stages[name]) for name in names))
            candidates = await self._look() if clock() >= self._look_at else frozenset()
            for name, stage in self._stages.items():
                if name in candidates and stage.free:
                    await self._run_candidate(stage)
            self._away = False
        except Exception as error:  # noqa: BLE001 - logged, and tried again at the next look
            outage = isinstance(error, StoreUnavailable)
            if not outage or not self._away:
                log_failure("claim", None, None, LOOK_S, error)
            self._away = outage
            self._metrics.worker_faults.labels("claim").inc()
            await asyncio.sleep(LOOK_S)
            self._look_at = 0.0

    async def _claim_stage(self, stage: Stage) -> None:
        """Reads no rows after a failure, so that only the job of an unreadable row fails."""
        if stage.rows is None or stage.name in self._bare:
            await self._store.write(claim, stage.name)
        else:
            self._bare.add(stage.name)
            await self._store.write(claim_with_rows, (stage.name, stage.rows))
        self._bare.discard(stage.name)

    async def _look(self) -> frozenset[str]:
        """Adds the stages with due rows to the backlog, and plans the next look. Returns the stages
        with poison candidates.
        """
        clock, quiet_s = asyncio.get_running_loop().time, QUIET * LOOK_S
        self._look_at = clock() + quiet_s  # a commit from now on makes it earlier
        if not self._stages:  # a process without workers
            return frozenset()
        now = self._store.clock()
        view = await self._store.read(outlook, now)
        if ready := view.ready & self._stages.keys():
            self._backlog |= ready
            self._wake.set()
        wait_s = quiet_s if view.next_due is None else (view.next_due - now) / 1000
        self._look_at = min(self._look_at, clock() + max(LOOK_S, wait_s))
        return view.candidates

    async def _run_candidate(self, stage: Stage) -> None:
        """Runs a poison candidate of the stage alone, for at most `ALONE_S`.

        The lease begins after all other jobs have ended. Otherwise a crash during the wait would
        count against this row.
        """
        self._alone = True
        try:
            await self.drained(ALONE_S)
            if not stage.free:
                return
            candidate = await self._store.write(claim_candidates, (stage.name, stage.dead_letter))
            if candidate is None:
                return
            if candidate.dead_lettered:
                key, cause = candidate.lease.key, f"{candidate.crashes} deaths"
                ids = {**candidate.task_ids(), KEYS[stage.name]: key}
                with bound_contextvars(**ids, owner=candidate.lease.owner):
                    log_parked(stage.name, key, cause)
                return
            stage.free -= 1
            job = self._jobs[candidate.lease] = self._start(candidate.lease)
            await asyncio.wait([job], timeout=ALONE_S)
        finally:
            self._alone = False
            self._wake.set()

    # --- jobs ---

    def _start(self, lease: Lease) -> "asyncio.Task[None]":
        stage = self._stages[lease.stage]
        stage.used[lease.owner] += 1
        work = self._work(stage, lease)
        return asyncio.create_task(work, name=f"{lease.stage}:{lease.key}")

    async def _work(self, stage: Stage, lease: Lease) -> None:
        HOLDER.set(lease.owner)
        try:
            with bound_contextvars(**{KEYS[stage.name]: lease.key}):
                try:
                    await self._turn()
                    if self._stopping:
                        await self._store.write(give_back, lease)
                    else:
                        await stage.run(lease)
                        self._returned.pop(lease.key, None)
                except Exception as error:  # noqa: BLE001 - logged, counted, tried again
                    await self._fail(stage, lease, error)
        finally:
            self._jobs.pop(lease, None)
            if stage.release(lease.owner):
                self._backlog.add(stage.name)
            if stage.name in self._backlog:
                self._wake.set()

    async def _fail(self, stage: Stage, lease: Lease, error: Exception) -> None:
        wait = fault_wait(lease.attempts)
        self._metrics.worker_faults.labels(lease.stage).inc()
        log_failure(lease.stage, lease.key, lease.attempts, wait, error)
        try:
            if isinstance(error, StoreUnavailable):
                raise error
            fault = Fault(lease, round(wait * 1000), stage.dead_letter)
            faults = await self._store.write(record_faults, fault)
        except StoreUnavailable:
            await self._give_back(lease)
        else:
            if faults >= FAULT_LIMIT:
                log_parked(lease.stage, lease.key, f"{faults} faults", error)

    async def _give_back(self, lease: Lease) -> None:
        """Returns a row that could not be recorded, as soon as the store commits again.

        From the third return on other rows go first, because it may be this row that the store
        cannot read or write.
        """
        if len(self._returned) > RETURNED:
            self._returned.clear()
        self._returned[lease.key] += 1
        again = self._returned[lease.key] - 2
        wait_ms = round(fault_wait(again) * 1000) if again > 0 else 0
        done = False
        while not done:
            await asyncio.sleep(LOOK_S)
            done = self._stopping  # one last try, or the end of the lease counts as a crash
            with suppress(StoreUnavailable):
                await self._store.write(snooze, (lease, wait_ms))
                done = True

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            # In the order in which other transactions lock rows, so that none wait for each other.
            await self._write_all(renew, sorted(self._jobs, key=lambda lease: lease.key))

    async def _write_all(
        self, operation: Callable[[Transaction, Sequence[Lease]], list[bool]], of: Iterable[Lease]
    ) -> None:
        writes = [self._store.write(operation, lease) for lease in of]
        await asyncio.gather(*writes, return_exceptions=True)

    # --- the stop ---

    def quiesce(self) -> None:
        """Starts no more jobs. Running jobs go on until `stop`."""
        self._store.detach()
        self._stopping = True
        self._wake.set()

    async def drained(self, limit_s: float) -> None:
        """Waits for running jobs, within the limit."""
        if self._jobs:
            await asyncio.wait(self._jobs.values(), timeout=limit_s)

    async def stop(self, limit_s: float) -> int:
        """Finishes running jobs within the limit and gives the rest back. Returns their number."""
        self.quiesce()
        await self.drained(limit_s)
        left = dict(self._jobs)
        for job in left.values():
            job.cancel()
        await asyncio.gather(*left.values(), return_exceptions=True)
        # The write of no row comes after the transaction under way, which may add late leases.
        await self._write_all(give_back, (*left, Lease("submit", "", 0, 0)))
        late, self._late = self._late, []
        await self._write_all(give_back, late)
        return len(left) + len(late)
