"""What every rule does with the store, what is looked at after each, and how every life ends."""

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
from service.tasks.callbacks import Callback, accept_callbacks
from service.tasks.confirm_worker import Settlement
from service.tasks.state import TERMINAL, State
from service.tasks.submissions import SubmissionResult, SubmissionStart
from service.upkeep.expiry import Erasure, strip_tasks
from service.upstreams.base import Report, Uncertain
from tests.contract.subject import DAY, HOUR, callback
from tests.property.life_bench import Bench
from tests.property.life_checks import Seen, check, check_grant, check_sent
from tests.property.life_end import check_end, next_due, remains
from tests.property.life_heard import Heard, names_another, verdicts
from tests.property.life_leases import check_write
from tests.property.life_step import Step
from tests.property.life_story import tell
from tests.property.life_upstream import Upstream
from tests.property.life_work import Life, Read, Workshop, Write
from tests.stores import candidate_of

ROUNDS = 60  # of claims at the end, before something is due for ever
PATIENT_ROUNDS = 20  # afterwards the clock leaps: an upstream that knows nothing is asked for a day
HANDS = 8  # jobs in hand; whoever has held one for longest is gone


@dataclass(slots=True, eq=False)
class Job:
    """A lease in the hands of a process, and what is wanted next under it."""

    process: int
    lease: Lease
    life: Life
    wants: Read | Write


class Living(RuleBasedStateMachine):
    """What every rule does with the store, and what is looked at after each."""

    bench: ClassVar[Bench]

    def __init__(self) -> None:
        super().__init__()
        self.bench.reset()
        self.upstream = Upstream()
        self.shop = Workshop(self.upstream, lambda: self.bench.clock.now)
        self.jobs: list[Job] = []
        self.seen = Seen()
        self.places = 0  # free places for rows that are born leased
        self.endpoint: str | None = None
        self.heard = Heard()
        self.noted = 0  # what time it was, when somebody looked
        self.last: list[int] = []  # luck of the first rounds after the end
        self.begun = self.quiet = False

    @property
    def tasks(self) -> list[Row]:
        return [self.seen.tasks[id] for id in sorted(self.seen.tasks)]

    def job(self, pick: int) -> Job:
        return self.jobs[-1 - pick % len(self.jobs)]

    def due_in(self) -> int:
        due = next_due(self.seen)
        return sys.maxsize if due is None else due - self.bench.clock.now

    @property
    def sent(self) -> list[str]:
        """Those whose callback URL the upstream has; an honest one calls about what it has
        created.
        """
        return sorted(
            {real.task_id for real in self.upstream.reals.values()}
            if self.upstream.honest
            else self.shop.sent
        )

    # --- the store ---

    def write(
        self,
        process: int,
        *writes: Write,
        twice: bool = False,
        places: dict[str, int] | None = None,
    ) -> list[Any]:
        """Commits writes together, `twice` when the answer to the first COMMIT was lost, and looks.
        What is leased becomes jobs.
        """
        process %= self.bench.processes
        first: list[Any] = []
        free = dict.fromkeys(QUEUES, self.places) if places is None else places
        results: list[Any] = []
        for _ in range(1 + twice):
            before = self.seen
            results, leased, self.seen = self.bench.write(process, writes, free, before)
            self.see(self.bench.names[process], writes, results, leased, before, free)
            for lease in sorted(leased, key=lambda lease: lease.key):
                self.hire(process, lease, writes, before)
            first = first or verdicts(results)
            assert verdicts(results) == first, "run again, and judged anew"
        return results

    def see(
        self,
        process: str,
        writes: Sequence[Write],
        results: Sequence[Any],
        leased: Sequence[Lease],
        before: Seen,
        places: dict[str, int],
    ) -> None:
        """Looks at what was done, and remembers what was heard. What one write does is known when
        it was alone, or none met another.
        """
        now, alone = self.bench.clock.now, len(writes) == 1
        for write in writes:
            if (
                isinstance(write.item, Settlement)
                and write.item.report
                and before.holds(write.item.lease)
            ):
                self.heard.links |= set(write.item.report.results)
        check(before, self.seen, self.heard, alone=alone)
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
                        self.seen,
                        now,
                        self.heard,
                    )
                )
        for write, result in zip(writes, results, strict=True):
            self.remember(write, result, before, alone=alone)

    def remember(self, write: Write, result: Any, before: Seen, *, alone: bool) -> None:
        item = write.item
        if isinstance(item, Callback):
            self.heard.called(
                item, result.verdict, foreign=names_another(item, before.tasks), alone=alone
            )
        elif isinstance(item, Settlement):
            self.heard.answered(item, before.tasks[item.lease.key], self.seen.tasks[item.lease.key])
        elif isinstance(item, Erasure) and result.refused is None:
            self.heard.erased.add(item.task_id)
        elif write.operation is strip_tasks:
            for task_id, was in before.tasks.items():
                if was["erased_at"] is None is not self.seen.tasks[task_id]["erased_at"]:
                    self.heard.stripped(task_id)

    def look_for_work(self, process: int, stages: Iterable[str], places: int) -> None:
        """Claims what is due, and then what brought its process down before and is to run alone."""
        before = len(self.jobs)
        self.write(
            process,
            *(Write(leases.claim, stage) for stage in sorted(stages)),
            places=dict.fromkeys(stages, places),
        )
        if any(
            row[queue.prefix + "deaths"]
            for queue in QUEUES.values()
            for row in self.seen.table(queue.table).values()
        ):
            earlier = self.seen
            candidates = self.write(
                process,
                *(Write(claim_candidates, candidate_of(stage)) for stage in sorted(stages)),
                places={},
            )
            for candidate in candidates:
                if candidate is not None and not candidate.dead_lettered:
                    self.hire(process, candidate.lease, (), earlier)
        tell([job.lease for job in self.jobs[before:]])

    def hire(self, process: int, lease: Lease, writes: Sequence[Write], before: Seen) -> None:
        check_grant(lease, writes, before, self.seen, self.bench.clock.now)
        life = self.shop.life(lease)
        self.jobs.append(Job(process % self.bench.processes, lease, life, next(life)))

    def go_on(self, jobs: Sequence[Job], *more: Write, twice: bool = False) -> list[Any]:
        """Gives jobs of one process what they want next, what they write in one transaction with
        `more`, whose results are returned.
        """
        process = jobs[0].process if jobs else 0
        reading = [(job, job.wants) for job in jobs if isinstance(job.wants, Read)]
        writing = [(job, job.wants) for job in jobs if isinstance(job.wants, Write)]
        for job, read in reading:
            self.give(job, self.bench.read(process, read))
        if not writing and not more:
            return []
        before = self.seen
        results = self.write(process, *(write for _, write in writing), *more, twice=twice)
        for (job, write), result in zip(writing, results, strict=False):
            if not self.quiet:
                tell((write.operation.__name__, write.item, result))
            if isinstance(write.item, SubmissionStart) and result is not None:
                permitted = write.item.resubmit and (
                    self.shop.resubmits or job.lease.key in self.shop.permitted
                )
                check_sent(
                    before.tasks[job.lease.key],
                    self.shop.sent.get(job.lease.key, ()),
                    permitted=permitted,
                )
            if (
                isinstance(write.item, SubmissionResult)
                and isinstance(write.item.outcome, Uncertain)
                and result is State.UNCERTAIN
            ):
                self.shop.permitted -= {job.lease.key} if before.holds(job.lease) else set()
            self.give(job, result)
        return results[len(writing) :]

    def give(self, job: Job, result: Any) -> None:
        try:
            job.wants = job.life.send(result)
        except StopIteration:
            self.jobs.remove(job)

    def a_callback(self, task_id: str, report: Report | None, pick: int = 0) -> Write:
        tell((task_id, "is told", report))
        body = bytes([pick]) if report is None else repr(report).encode()
        if report is not None:
            self.shop.said[body] = report
        return Write(accept_callbacks, callback(task_id, report, body))

    def hear(self, process: int, writes: Sequence[Write], *, twice: bool = False) -> None:
        """Takes callbacks; remembers the first proof that comes after an end of our own making."""
        before = self.seen
        for write, verdict in zip(writes, self.write(process, *writes, twice=twice), strict=True):
            tell(verdict)
            said, task = write.item.report, before.tasks[write.item.task_id]
            if (
                verdict.verdict == "accepted"
                and said is not None
                and said.final
                and State(task["state"]) in TERMINAL
            ):
                self.shop.proved_late.add(task["id"])

    @invariant()
    def holds(self) -> None:
        """Each write was looked at already."""
        self.jobs = self.jobs[-HANDS:]
        self.bench.steps += self.begun
        self.begun = True

    # --- the end ---

    def teardown(self) -> None:
        if sys.exception() is None:
            self.jobs.clear()
            self.places = 0
            self.tell_the_truth()
            self.hear(
                0,
                [
                    self.a_callback(real.task_id, real.truth)
                    for real in self.upstream.reals.values()
                ],
            )
            self.tell_the_truth()

    def tell_the_truth(self) -> None:
        """From now on everything works, until nothing is due; then everything is decided."""
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
                self.shop.luck = self.last.pop() if self.last else 0
                self.go_on(list(self.jobs))
            if next_due(self.seen) is None:
                check_end(self.seen, self.shop, self.bench.clock.now + HOUR)
                assert not self.bench.read(0, Read(remains, (sorted(self.heard.erased),))), (
                    "kept after erasure"
                )
                return
            self.bench.clock.shift(max(1, self.due_in()) + (DAY if count > PATIENT_ROUNDS else 0))
        raise AssertionError(
            "due for ever:"
            f" {[row['id'] for row in self.tasks if row['settle_due_at'] or row['submit_due_at']]}"
        )
