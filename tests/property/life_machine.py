"""The base of the state machine: how rules use the store, the checks after each write, and the end
of every life.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis.stateful import RuleBasedStateMachine, invariant

from service.db.paging import Row
from service.db.queues import QUEUES
from service.db.transaction import Lease
from service.events.endpoints import EndpointChange, change_endpoints
from service.queue import leases
from service.queue.crashes import claim_candidates
from service.tasks.callbacks import Callback
from service.tasks.settlements import Settlement
from service.tasks.state import TERMINAL, State
from service.tasks.submissions import SubmissionResult, SubmissionStart
from service.upkeep.retention_sql import erase_tasks, strip_tasks
from service.upstreams.base import Report, Uncertain
from tests.contract.subject import DAY, HOUR, accept_callbacks, callback
from tests.property.life_bench import Bench
from tests.property.life_checks import Snapshot, check, check_new_lease, check_submitted_once
from tests.property.life_end import check_end, next_due, remains
from tests.property.life_inbox import InboxModel, names_another, verdicts
from tests.property.life_leases import check_write
from tests.property.life_notes import log
from tests.property.life_step import Step
from tests.property.life_upstream import Upstream
from tests.property.life_work import Read, Script, WorkerScripts, Write
from tests.stores import candidate_of

ROUNDS = 60  # rounds of claims at the end. A row that is due after them is due for ever.
# After these rounds the clock leaps, because a task that the upstream does not know is queried
# for a day.
PATIENT_ROUNDS = 20
HANDS = 8  # The most jobs in hand. The oldest ones are dropped.


@dataclass(slots=True, eq=False)
class Job:
    """A lease in the hands of a process, with the next read or write under it."""

    process: int
    lease: Lease
    script: Script
    wants: Read | Write


class StoreMachine(RuleBasedStateMachine):
    """Runs reads and writes for the rules, and checks each result."""

    bench: ClassVar[Bench]

    def __init__(self) -> None:
        super().__init__()
        self.bench.reset()
        self.upstream = Upstream()
        self.workers = WorkerScripts(self.upstream, lambda: self.bench.clock.now)
        self.jobs: list[Job] = []
        self.snapshot = Snapshot()
        self.places = 0  # free places for rows that are leased when they are inserted
        self.endpoint: str | None = None
        self.inbox = InboxModel()
        self.last: list[int] = []  # luck in the first rounds at the end
        self.begun = self.quiet = False

    @property
    def tasks(self) -> list[Row]:
        return [self.snapshot.tasks[id] for id in sorted(self.snapshot.tasks)]

    def job(self, pick: int) -> Job:
        return self.jobs[-1 - pick % len(self.jobs)]

    def due_in(self) -> int:
        due = next_due(self.snapshot)
        return sys.maxsize if due is None else due - self.bench.clock.now

    @property
    def sent(self) -> list[str]:
        """The tasks whose callback URL the upstream has. An honest upstream calls back only about
        tasks that it created.
        """
        return sorted(
            {real.task_id for real in self.upstream.reals.values()}
            if self.upstream.honest
            else self.workers.sent
        )

    # --- the store ---

    def write(
        self,
        process: int,
        *writes: Write,
        twice: bool = False,
        places: dict[str, int] | None = None,
    ) -> list[Any]:
        """Commits writes in one transaction and checks the result. With `twice`, the response to
        the first COMMIT was lost, and the transaction runs again. New leases become jobs.
        """
        process %= self.bench.processes
        first: list[Any] = []
        free = dict.fromkeys(QUEUES, self.places) if places is None else places
        results: list[Any] = []
        for _ in range(1 + twice):
            before = self.snapshot
            results, leased, self.snapshot = self.bench.write(process, writes, free, before)
            self.see(self.bench.names[process], writes, results, leased, before, free)
            for lease in sorted(leased, key=lambda lease: lease.key):
                self.start_job(process, lease, writes, before)
            first = first or verdicts(results)
            assert verdicts(results) == first, "a repeated transaction gave another verdict"
        return results

    def see(
        self,
        process: str,
        writes: Sequence[Write],
        results: Sequence[Any],
        leased: Sequence[Lease],
        before: Snapshot,
        places: dict[str, int],
    ) -> None:
        """Checks a transaction and records it in the model of the inbox. The checks of single
        writes run if the write was alone, or if its effects can be told apart.
        """
        now, alone = self.bench.clock.now, len(writes) == 1
        for write in writes:
            if (
                isinstance(write.item, Settlement)
                and write.item.report
                and before.holds(write.item.lease)
            ):
                self.inbox.links |= set(write.item.report.results)
        check(before, self.snapshot, self.inbox, alone=alone)
        found = [result for result in results if result is not None]
        for write, result in zip(writes, results, strict=True):
            claims = write.operation is leases.claim or (
                write.operation is claim_candidates and len(found) <= 1
            )
            if alone or claims:
                stage = write.item[0] if write.operation is claim_candidates else write.item
                mine = [lease for lease in leased if not claims or lease.stage == stage]
                check_write(
                    Step(
                        process,
                        write,
                        result,
                        mine,
                        places.get(stage, 0) if claims else 0,
                        before,
                        self.snapshot,
                        now,
                        self.inbox,
                    )
                )
        for write, result in zip(writes, results, strict=True):
            self.remember(write, result, before, alone=alone)

    def remember(self, write: Write, result: Any, before: Snapshot, *, alone: bool) -> None:
        item = write.item
        if isinstance(item, Callback):
            self.inbox.called(
                item, result.verdict, foreign=names_another(item, before.tasks), alone=alone
            )
        elif isinstance(item, Settlement):
            self.inbox.answered(
                item, before.tasks[item.lease.key], self.snapshot.tasks[item.lease.key]
            )
        elif write.operation is erase_tasks and result.refused is None:
            self.inbox.erased.add(item.id)
        elif write.operation is strip_tasks:
            for task_id, was in before.tasks.items():
                if was["erased_at"] is None is not self.snapshot.tasks[task_id]["erased_at"]:
                    self.inbox.stripped(task_id)

    def look_for_work(self, process: int, stages: Iterable[str], places: int) -> None:
        """Claims due rows, and then poison candidates, which run alone."""
        before = len(self.jobs)
        self.write(
            process,
            *(Write(leases.claim, stage) for stage in sorted(stages)),
            places=dict.fromkeys(stages, places),
        )
        if any(
            row[queue.prefix + "deaths"]
            for queue in QUEUES.values()
            for row in self.snapshot.table(queue.table).values()
        ):
            earlier = self.snapshot
            candidates = self.write(
                process,
                *(Write(claim_candidates, candidate_of(stage)) for stage in sorted(stages)),
                places={},
            )
            for candidate in candidates:
                if candidate is not None and not candidate.dead_lettered:
                    self.start_job(process, candidate.lease, (), earlier)
        log([job.lease for job in self.jobs[before:]])

    def start_job(
        self, process: int, lease: Lease, writes: Sequence[Write], before: Snapshot
    ) -> None:
        check_new_lease(lease, writes, before, self.snapshot, self.bench.clock.now)
        script = self.workers.script(lease)
        self.jobs.append(Job(process % self.bench.processes, lease, script, next(script)))

    def advance(self, jobs: Sequence[Job], *more: Write, twice: bool = False) -> list[Any]:
        """Does the next read or write of each job of one process. The writes and `more` share one
        transaction. Returns the results of `more`.
        """
        process = jobs[0].process if jobs else 0
        reading = [(job, job.wants) for job in jobs if isinstance(job.wants, Read)]
        writing = [(job, job.wants) for job in jobs if isinstance(job.wants, Write)]
        for job, read in reading:
            self.send_result(job, self.bench.read(process, read))
        if not writing and not more:
            return []
        before = self.snapshot
        results = self.write(process, *(write for _, write in writing), *more, twice=twice)
        for (job, write), result in zip(writing, results, strict=False):
            if not self.quiet:
                log((write.operation.__name__, write.item, result))
            if isinstance(write.item, SubmissionStart) and result is not None:
                permitted = write.item.resubmit and (
                    self.workers.resubmits or job.lease.key in self.workers.permitted
                )
                check_submitted_once(
                    before.tasks[job.lease.key],
                    self.workers.sent.get(job.lease.key, ()),
                    permitted=permitted,
                )
            if (
                isinstance(write.item, SubmissionResult)
                and isinstance(write.item.outcome, Uncertain)
                and result is State.UNCERTAIN
            ):
                self.workers.permitted -= {job.lease.key} if before.holds(job.lease) else set()
            self.send_result(job, result)
        return results[len(writing) :]

    def send_result(self, job: Job, result: Any) -> None:
        try:
            job.wants = job.script.send(result)
        except StopIteration:
            self.jobs.remove(job)

    def a_callback(self, task_id: str, report: Report | None, pick: int = 0) -> Write:
        log((task_id, "is called back with", report))
        body = bytes([pick]) if report is None else repr(report).encode()
        if report is not None:
            self.workers.said[body] = report
        return Write(accept_callbacks, callback(task_id, report, body))

    def receive(self, process: int, writes: Sequence[Write], *, twice: bool = False) -> None:
        """Records callbacks, and remembers tasks whose first proof came after Darkroom had ended
        them.
        """
        before = self.snapshot
        for write, verdict in zip(writes, self.write(process, *writes, twice=twice), strict=True):
            log(verdict)
            said, task = write.item.report, before.tasks[write.item.task_id]
            if (
                verdict.verdict == "accepted"
                and said is not None
                and said.final
                and State(task["state"]) in TERMINAL
            ):
                self.workers.proved_late.add(task["id"])

    @invariant()
    def holds(self) -> None:
        """Limits the jobs in hand and counts the step. The checks ran after each write."""
        self.jobs = self.jobs[-HANDS:]
        self.bench.steps += self.begun
        self.begun = True

    # --- the end of a life ---

    def teardown(self) -> None:
        if sys.exception() is None:
            self.jobs.clear()
            self.places = 0
            self.run_to_the_end()
            self.receive(
                0,
                [
                    self.a_callback(real.task_id, real.truth)
                    for real in self.upstream.reals.values()
                ],
            )
            self.run_to_the_end()

    def run_to_the_end(self) -> None:
        """Every call succeeds until no row is due, and then every task must be decided."""
        if self.endpoint:
            self.write(
                0, Write(change_endpoints, EndpointChange(self.endpoint, None, status="enabled"))
            )
        for count in range(ROUNDS):
            self.quiet = count > 10
            self.look_for_work(0, QUEUES, 1000)
            for real in self.upstream.reals.values():
                self.upstream.end(real, "completed")
            while self.jobs:
                self.workers.luck = self.last.pop() if self.last else 0
                self.advance(list(self.jobs))
            if next_due(self.snapshot) is None:
                check_end(self.snapshot, self.workers, self.bench.clock.now + HOUR)
                assert not self.bench.read(0, Read(remains, (sorted(self.inbox.erased),))), (
                    "content is left after erasure"
                )
                return
            self.bench.clock.shift(max(1, self.due_in()) + (DAY if count > PATIENT_ROUNDS else 0))
        raise AssertionError(
            "due for ever:"
            f" {[row['id'] for row in self.tasks if row['settle_due_at'] or row['submit_due_at']]}"
        )
