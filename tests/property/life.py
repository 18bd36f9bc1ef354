"""The whole life of tasks as a state machine: clients, operators, workers, the upstream, time and
death in any order.

One example is the life of some tasks on an empty store; at its end the upstream tells the truth and
the clock runs until nothing is due. Rules draw small numbers: `pick` chooses among what there is,
`luck` what comes of it (0 is the best). No rule has a condition, for a database may break ties one
way or the other, and what is drawn must not depend on it; where there is nothing to do, work is
found.
"""

import hypothesis.strategies as st
from hypothesis.stateful import initialize, rule

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
from service.tasks.admin import TaskResolution, reconcile_tasks, resolve_tasks
from service.tasks.cancel import Cancellation, cancel_tasks
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.tasks.submissions import SubmissionStart
from service.upkeep.expiry import Erasure, erase_tasks, strip_tasks
from tests.contract.subject import DAY, HOUR, MINUTE, SECOND, new_id
from tests.property.life_end import next_due
from tests.property.life_leases import check_freed
from tests.property.life_machine import Job, Living
from tests.property.life_story import among, tell
from tests.property.life_upstream import ENDS, SAYS
from tests.property.life_work import Read, Write
from tests.stores import fault

TASKS = 6  # at most, or nothing much happens to any of them
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
MEANT = {  # those that an intervention does something to, where there are any
    **dict.fromkeys(("id", "failed", "resubmit"), (State.UNCERTAIN,)),
    "erase": (State.FAILED, State.EXPIRED),
    "cancel": (State.SUBMITTED,),
}
MISHAPS = ("fault", "release", "renew", "death")
STATUSES = ("enabled", "paused", "disabled")
HAPPENS = (
    "submit",
    *INTERVENTIONS,
    *MISHAPS,
    *STATUSES,
    "fault",
    "resubmit",
    "the account is good again",
    "strip",
)
PICK, LUCK = st.integers(0, 15), st.integers(0, 11)
LUCKS = st.lists(LUCK, max_size=8)
YES = st.booleans()
STAGES = st.sets(st.sampled_from(sorted(QUEUES)), min_size=1)


class TaskLife(Living):
    # --- the service, as it is set up ---

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
        self.upstream.honest, self.shop.resubmits, self.shop.with_callback, self.shop.confirms = (
            flags
        )
        self.places, self.last = places, last
        tell(f"honest, resubmits, with_callback, confirms: {flags}")
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
        """Some stages of a process look for work, later."""
        self.bench.clock.shift(leap)
        if process % 3 == 1:
            self.write(process, Write(resume_submissions, 100))
        self.look_for_work(process, stages, places)

    @rule(process=PICK, pick=PICK, lucks=LUCKS)
    def work_on(self, process: int, pick: int, lucks: list[int]) -> None:
        """One job, for as long as it lasts; when there is none, it is waited for."""
        job = self.find(pick, process)
        for luck in lucks:
            if job and job in self.jobs:
                self.shop.luck = luck
                self.go_on([job])

    def find(self, pick: int, process: int = 0) -> Job | None:
        """A job in hand, else one that is waited for; None: there is nothing to do, or it is to run
        alone and not yet.
        """
        if not self.jobs and next_due(self.seen) is None:
            self.submit(process, pick)
        if not self.jobs and next_due(self.seen) is not None:
            self.bench.clock.shift(max(1, self.due_in()))
            self.look_for_work(process, set(QUEUES), 100)
        return self.job(pick) if self.jobs else None

    @rule(pick=PICK, luck=LUCK, twice=PICK)
    def work(self, pick: int, luck: int, twice: int) -> None:
        """One read or write of one job; what it holds afterwards may wait for long."""
        job, self.shop.luck = self.find(pick), luck
        self.go_on([job] if job else [], twice=twice > 13)

    @rule(
        pick=PICK,
        luck=LUCK,
        said=st.lists(st.tuples(PICK, st.sampled_from(SAYS)), max_size=2),
        twice=YES,
    )
    def work_together(self, pick: int, luck: int, said: list[tuple[int, str]], twice: bool) -> None:
        """All jobs of a process, and what is called back meanwhile, in one transaction."""
        first, self.shop.luck = self.find(pick), luck
        callbacks = [self.said(which, kind) for which, kind in said if self.sent]
        self.go_on(
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
        """One job has its answer in hand; before it is recorded its task is called back about, or
        decided by hand, or others go on, maybe after the lease has ended.
        """
        job, self.shop.luck = self.find(pick, process), luck
        while (
            job
            and job in self.jobs
            and (isinstance(job.wants, Read) or isinstance(job.wants.item, SubmissionStart))
        ):
            self.go_on([job])
        task_id = job.lease.key if job and job.lease.key in self.seen.tasks else ""
        if word in SAYS and task_id in self.sent:
            self.hear(
                process, [self.a_callback(task_id, self.upstream.says(task_id, word, pick), pick)]
            )
        elif word in INTERVENTIONS and task_id:
            self.intervene(process, task_id, word, 0)
        self.bench.clock.shift(leap)
        self.look_for_work(process, set(QUEUES), 100)
        for self.shop.luck in lucks:
            for other in [other for other in self.jobs if other is not job]:
                self.go_on([other])
        if job and job in self.jobs and pick % 5:
            self.go_on([job])
        elif job and job in self.jobs:
            self.go_wrong(job, "fault", 0)

    # --- the upstream ---

    def said(self, pick: int, kind: str) -> Write:
        task_id = among(self.sent, pick)
        return self.a_callback(task_id, self.upstream.says(task_id, kind, pick), pick)

    @rule(
        process=PICK,
        pick=PICK,
        kinds=st.lists(st.sampled_from(SAYS), min_size=1, max_size=3),
        twice=PICK,
    )
    def call_back(self, process: int, pick: int, kinds: list[str], twice: int) -> None:
        if not self.sent:
            self.work_on(process, pick, [0, 0, 0])
        for kind in kinds if self.sent else ():
            self.hear(process, [self.said(pick, kind)], twice=twice > 13)

    @rule(pick=PICK, what=st.sampled_from([*ENDS, "forget"]))
    def end(self, pick: int, what: str) -> None:
        """The upstream ends a task without a word, or knows it no longer."""
        if not self.upstream.reals:
            self.work_on(0, pick, [0, 0, 0])
            return
        real = among(list(self.upstream.reals.values()), pick)
        if what == "forget":
            real.known = False
        else:
            self.upstream.end(real, what, 1 + pick % 3)
        tell(real)

    # --- everybody else ---

    @rule(what=st.sampled_from(HAPPENS), process=PICK, pick=PICK, other=PICK)
    def happen(self, what: str, process: int, pick: int, other: int) -> None:
        if what in INTERVENTIONS:
            fit = [
                row
                for row in self.tasks
                if row["state"] in MEANT.get(what, ()) and row["settled_digest"] is None
            ]
            self.intervene(process, among(fit or self.tasks, pick)["id"], what, other)
        elif what in STATUSES and self.endpoint:
            self.write(0, Write(change_endpoints, EndpointChange(self.endpoint, None, status=what)))
        elif what == "the account is good again":
            self.write(process, Write(resume_submissions, 100))
        elif what == "strip":
            ends = [row["terminal_at"] for row in self.tasks if row["terminal_at"]]
            self.write(process, Write(strip_tasks, among(sorted(ends) or [0], pick)))
        elif what in MISHAPS and self.jobs:
            self.go_wrong(self.job(pick), what, among([0, SECOND, HOUR], other))
        else:
            self.submit(process, other)

    def submit(self, process: int, pick: int) -> None:
        """A client comes, with a key that may be known, or submits twice under one id, as after a
        lost COMMIT.
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
        tell(inserted)
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
                    cancel_tasks, Cancellation(task_id, among([None, "painter", "printer"], other))
                )
            case "erase":
                write = Write(erase_tasks, Erasure(task_id, None))
            case "reconcile":
                write = Write(reconcile_tasks, task_id)
            case "failed" | "resubmit":
                write = Write(resolve_tasks, TaskResolution(task_id, resubmit=word == "resubmit"))
            case _:
                write = Write(resolve_tasks, TaskResolution(task_id, named))
        (answer,) = self.write(process, write)
        tell((task_id, named, answer))
        if word == "resubmit" and answer is None:
            self.shop.permitted.add(task_id)
        if word == "erase" and task_id in self.sent and other % 2:
            self.hear(
                process,
                [self.a_callback(task_id, self.upstream.says(task_id, "end", other // 2), other)],
            )
        if word in ("id", "another's id") and answer is None and named not in mine:
            self.upstream.lied_about.add(task_id)

    def go_wrong(self, job: Job, what: str, wait: int) -> None:
        tell(job.lease)
        if what == "renew":
            self.write(job.process, Write(leases.renew, job.lease))
        elif (
            what == "death"
            # what it held in its hands is gone, its leases are not: unless nobody else can have the
            # store
        ):
            self.jobs = [other for other in self.jobs if other.process != job.process]
            if self.bench.exclusive:
                before = self.seen
                self.bench.reopen()
                self.write(0)  # nothing: to see it
                check_freed(before, self.seen)
        else:
            self.write(
                job.process,
                Write(leases.give_back, job.lease)
                if what == "release"
                else Write(record_faults, fault(job.lease, wait)),
            )
            self.jobs.remove(job)
            if what == "fault" and wait == 0:  # it is a bad one, and is tried again
                self.look_for_work(job.process, (job.lease.stage,), 100)
                again = [
                    other
                    for other in self.jobs
                    if (other.lease.stage, other.lease.key) == (job.lease.stage, job.lease.key)
                ]
                if again and again[-1].lease.fence > job.lease.fence:
                    self.go_wrong(again[-1], "fault", wait)
