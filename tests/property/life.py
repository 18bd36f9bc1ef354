"""The life of tasks as a state machine: clients, operators, workers, the upstream, time and crashes
act in any order.

One example is the life of some tasks on an empty store. At its end, the upstream tells the truth
and the clock runs until no row is due. Rules draw small numbers: `pick` chooses among the rows or
jobs, and `luck` chooses an outcome (0 is success). No rule has a precondition, because databases
may break ties differently and the drawn values must not depend on that. A rule without work looks
for some.
"""

import hypothesis.strategies as st
from hypothesis.stateful import initialize, rule

from service.db.paging import Owned
from service.db.queues import QUEUES
from service.events.endpoints import (
    EndpointChange,
    NewEndpointRow,
    change_endpoints,
    insert_endpoints,
)
from service.queue import leases
from service.queue.crashes import record_faults
from service.tasks.accept import Inserted, insert_tasks
from service.tasks.account_breaker import resume_submissions
from service.tasks.admin import TaskResolution, cancel_tasks, reconcile_tasks, resolve_tasks
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.submissions import SubmissionStart
from service.upkeep.retention_sql import erase_tasks, strip_tasks
from tests.contract.subject import DAY, HOUR, MINUTE, SECOND, new_id
from tests.property.life_end import next_due
from tests.property.life_leases import check_freed
from tests.property.life_machine import Job, StoreMachine
from tests.property.life_notes import among, log
from tests.property.life_upstream import CALLBACKS, ENDS
from tests.property.life_work import Read, Write
from tests.stores import fault

TASKS = 6  # at most, so that enough happens to each task
LEAPS = (
    SECOND,
    5 * SECOND,
    31 * SECOND,
    90 * SECOND,
    15 * MINUTE,
    HOUR,
    6 * HOUR,
    DAY,
    3 * DAY,
    -HOUR,
)
INTERVENTIONS = ("cancel", "reconcile", "id", "another's id", "failed", "resubmit", "erase")
# The states in which an intervention has an effect. A task in such a state is preferred.
FITTING_STATES = {
    **dict.fromkeys(("id", "failed", "resubmit"), (State.UNCERTAIN,)),
    "erase": (State.FAILED, State.EXPIRED),
    "cancel": (State.SUBMITTED,),
}
MISHAPS = ("fault", "release", "renew", "death")
STATUSES = ("enabled", "paused", "disabled")
ACTIONS = ("submit", *INTERVENTIONS, *MISHAPS, *STATUSES, "fault", "resubmit", "resume", "strip")
PICK, LUCK = st.integers(0, 15), st.integers(0, 11)
LUCKS = st.lists(LUCK, max_size=8)
YES = st.booleans()
STAGES = st.sets(st.sampled_from(sorted(QUEUES)), min_size=1)


class TaskLife(StoreMachine):
    # --- the settings of the service ---

    @initialize(
        flags=st.tuples(YES, YES, YES, YES),
        places=st.integers(0, 2),
        listener=PICK,
        last=LUCKS,
        first=st.integers(1, 3),
    )
    def set_up(
        self,
        flags: tuple[bool, bool, bool, bool],
        places: int,
        listener: int,
        last: list[int],
        first: int,
    ) -> None:
        (
            self.upstream.honest,
            self.workers.resubmits,
            self.workers.with_callback,
            self.workers.confirms,
        ) = flags
        self.places, self.last = places, last
        log(f"honest, resubmits, with_callback, confirms: {flags}")
        if listener > 11:
            self.endpoint = new_id("endpoint")
            self.write(
                0,
                Write(
                    insert_endpoints,
                    NewEndpointRow(self.endpoint, None, "https://s.test", ("*",), "", b"secret"),
                ),
            )
        for _ in range(first):
            self.submit(0, 0)

    # --- workers ---

    @rule(
        process=PICK,
        stages=STAGES,
        places=st.sampled_from([1, 100]),
        leap=st.sampled_from((0, 0, *LEAPS)),
    )
    def look(self, process: int, stages: set[str], places: int, leap: int) -> None:
        """Some stages of a process look for work, after a leap of the clock."""
        self.bench.clock.shift(leap)
        if process % 3 == 1:
            self.write(process, Write(resume_submissions, 100))
        self.look_for_work(process, stages, places)

    @rule(process=PICK, pick=PICK, lucks=LUCKS)
    def work_on(self, process: int, pick: int, lucks: list[int]) -> None:
        """One job advances as long as it lasts. Without a job, the clock moves to the next one."""
        job = self.find(pick, process)
        for luck in lucks:
            if job and job in self.jobs:
                self.workers.luck = luck
                self.advance([job])

    def find(self, pick: int, process: int = 0) -> Job | None:
        """A job in hand, or else the next one that becomes due. None if no row is due, or if the
        row may only run alone later.
        """
        if not self.jobs and next_due(self.snapshot) is None:
            self.submit(process, pick)
        if not self.jobs and next_due(self.snapshot) is not None:
            self.bench.clock.shift(max(1, self.due_in()))
            self.look_for_work(process, set(QUEUES), 100)
        return self.job(pick) if self.jobs else None

    @rule(pick=PICK, luck=LUCK, twice=PICK)
    def work(self, pick: int, luck: int, twice: int) -> None:
        """One job does one read or write. It may then wait for a long time."""
        job, self.workers.luck = self.find(pick), luck
        self.advance([job] if job else [], twice=twice > 13)

    @rule(
        pick=PICK,
        luck=LUCK,
        said=st.lists(st.tuples(PICK, st.sampled_from(CALLBACKS)), max_size=2),
        twice=YES,
    )
    def work_together(self, pick: int, luck: int, said: list[tuple[int, str]], twice: bool) -> None:
        """All jobs of a process, and new callbacks, write in one transaction."""
        first, self.workers.luck = self.find(pick), luck
        callbacks = [self.said(which, kind) for which, kind in said if self.sent]
        self.advance(
            [job for job in self.jobs if first and job.process == first.process],
            *callbacks,
            twice=twice,
        )

    @rule(
        pick=PICK,
        luck=st.sampled_from((*range(12), 3, 5, 5)),
        lucks=st.lists(st.sampled_from((0, 8, *range(12))), min_size=1, max_size=5),
        process=PICK,
        leap=st.sampled_from((0, 31 * SECOND, 90 * SECOND)),
        word=st.sampled_from(("", "", "unreadable", "end", "nobody's id", "resubmit", "cancel")),
    )
    def come_late(
        self, pick: int, luck: int, lucks: list[int], process: int, leap: int, word: str
    ) -> None:
        """A job receives its result. Before it records the result, a callback arrives, an operator
        intervenes, or other jobs go on. The lease may expire meanwhile.
        """
        job, self.workers.luck = self.find(pick, process), luck
        while (
            job
            and job in self.jobs
            and (isinstance(job.wants, Read) or isinstance(job.wants.item, SubmissionStart))
        ):
            self.advance([job])
        task_id = job.lease.key if job and job.lease.key in self.snapshot.tasks else ""
        if word in CALLBACKS and task_id in self.sent:
            self.receive(
                process,
                [self.a_callback(task_id, self.upstream.reports(task_id, word, pick), pick)],
            )
        elif word in INTERVENTIONS and task_id:
            self.intervene(process, task_id, word, 0)
        self.bench.clock.shift(leap)
        self.look_for_work(process, set(QUEUES), 100)
        for self.workers.luck in lucks:
            for other in [other for other in self.jobs if other is not job]:
                self.advance([other])
        if job and job in self.jobs and pick % 5:
            self.advance([job])
        elif job and job in self.jobs:
            self.go_wrong(job, "fault", 0)

    # --- the upstream ---

    def said(self, pick: int, kind: str) -> Write:
        task_id = among(self.sent, pick)
        return self.a_callback(task_id, self.upstream.reports(task_id, kind, pick), pick)

    @rule(
        process=PICK,
        pick=PICK,
        kinds=st.lists(st.sampled_from(CALLBACKS), min_size=1, max_size=3),
        twice=PICK,
    )
    def call_back(self, process: int, pick: int, kinds: list[str], twice: int) -> None:
        if not self.sent:
            self.work_on(process, pick, [0, 0, 0])
        for kind in kinds if self.sent else ():
            self.receive(process, [self.said(pick, kind)], twice=twice > 13)

    @rule(pick=PICK, what=st.sampled_from([*ENDS, "forget"]))
    def end(self, pick: int, what: str) -> None:
        """The upstream ends a task without a callback, or forgets it."""
        if not self.upstream.reals:
            self.work_on(0, pick, [0, 0, 0])
            return
        real = among(list(self.upstream.reals.values()), pick)
        if what == "forget":
            real.known = False
        else:
            self.upstream.end(real, what, 1 + pick % 3)
        log(real)

    # --- clients, operators and mishaps ---

    @rule(what=st.sampled_from(ACTIONS), process=PICK, pick=PICK, other=PICK)
    def happen(self, what: str, process: int, pick: int, other: int) -> None:
        if what in INTERVENTIONS:
            fit = [
                row
                for row in self.tasks
                if row["state"] in FITTING_STATES.get(what, ()) and row["settled_digest"] is None
            ]
            self.intervene(process, among(fit or self.tasks, pick)["id"], what, other)
        elif what in STATUSES and self.endpoint:
            self.write(0, Write(change_endpoints, EndpointChange(self.endpoint, None, status=what)))
        elif what == "resume":
            self.write(process, Write(resume_submissions, 100))
        elif what == "strip":
            ends = [row["terminal_at"] for row in self.tasks if row["terminal_at"]]
            self.write(process, Write(strip_tasks, among(sorted(ends) or [0], pick)))
        elif what in MISHAPS and self.jobs:
            self.go_wrong(self.job(pick), what, among([0, SECOND, HOUR], other))
        else:
            self.submit(process, other)

    def submit(self, process: int, pick: int) -> None:
        """A client submits a task, with or without a known key. It may repeat the insert under the
        same id, as after a lost COMMIT.
        """
        if len(self.tasks) >= TASKS:
            return
        owner, key, digest = (
            among(["painter", "printer"], pick),
            among([None, None, "a", "b"], pick // 2),
            str(pick // 8),
        )
        earlier = [
            row
            for row in self.tasks
            if key and (row["owner"], row["idempotency_key"]) == (owner, key)
        ]
        wish = TaskRow(
            new_id("task"),
            owner,
            "evolink",
            "wan2.5-text-to-image",
            State.QUEUED,
            0,
            prompt="a lighthouse",
            request={"size": "1280x1280", "n": 1},
            body=b'{"prompt":"a lighthouse"}',
            callback_url="https://c.test" if pick % 5 == 0 else None,
            idempotency_key=key,
            idempotency_hash=digest,
        )
        (inserted,) = self.write(process, Write(insert_tasks, wish), twice=pick % 3 == 0)
        log(inserted)
        if earlier:
            assert inserted == Inserted(earlier[0]["id"], False, earlier[0]["idempotency_hash"]), (
                "an idempotency key made a second task"
            )
        else:
            assert inserted == Inserted(wish.id, True, digest)

    def intervene(self, process: int, task_id: str, word: str, other: int) -> None:
        mine = [real.id for real in self.upstream.of(task_id)]
        named = (
            among(mine, other)
            if mine and word == "id"
            else among([*self.upstream.reals, "task-unified-nobody"], other)
        )
        match word:
            case "cancel":
                write = Write(
                    cancel_tasks, Owned(task_id, among([None, "painter", "printer"], other))
                )
            case "erase":
                write = Write(erase_tasks, Owned(task_id, None))
            case "reconcile":
                write = Write(reconcile_tasks, task_id)
            case "failed" | "resubmit":
                write = Write(resolve_tasks, TaskResolution(task_id, resubmit=word == "resubmit"))
            case _:
                write = Write(resolve_tasks, TaskResolution(task_id, named))
        (answer,) = self.write(process, write)
        log((task_id, named, answer))
        if word == "resubmit" and answer is None:
            self.workers.permitted.add(task_id)
        if word == "erase" and task_id in self.sent and other % 2:
            self.receive(
                process,
                [
                    self.a_callback(
                        task_id, self.upstream.reports(task_id, "end", other // 2), other
                    )
                ],
            )
        if word in ("id", "another's id") and answer is None and named not in mine:
            self.upstream.lied_about.add(task_id)

    def go_wrong(self, job: Job, what: str, wait: int) -> None:
        log(job.lease)
        if what == "renew":
            self.write(job.process, Write(leases.renew, job.lease))
        elif what == "death":
            # The process's jobs are gone, and its leases stand. Opening a file that one process
            # uses alone releases them.
            self.jobs = [other for other in self.jobs if other.process != job.process]
            if self.bench.exclusive:
                before = self.snapshot
                self.bench.reopen()
                self.write(0)  # takes a new snapshot
                check_freed(before, self.snapshot)
        else:
            self.write(
                job.process,
                Write(leases.give_back, job.lease)
                if what == "release"
                else Write(record_faults, fault(job.lease, wait)),
            )
            self.jobs.remove(job)
            if what == "fault" and wait == 0:  # the fault comes again at each retry
                self.look_for_work(job.process, (job.lease.stage,), 100)
                again = [
                    other
                    for other in self.jobs
                    if (other.lease.stage, other.lease.key) == (job.lease.stage, job.lease.key)
                ]
                if again and again[-1].lease.fence > job.lease.fence:
                    self.go_wrong(again[-1], "fault", wait)
