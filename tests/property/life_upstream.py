"""A model of the upstream: the tasks that it really has, their outcomes, and its answers and
callbacks.

`luck` 0 is the plain truth. Other numbers are faults, and some of them are lies. The model
remembers the tasks that it lied about.
"""

from dataclasses import dataclass, field, replace

from service.strict_json import JSON
from service.upstreams.base import Found, NoAnswer, NotFound, QueryOutcome, Report, Status

ENDS = ("completed", "failed", "completed", "cancelled", "completed", "empty", "completed", "gone")
CALLBACKS = (
    *(
        "truth",
        "end",
        "processing",
        "without id",
        "unreadable",
        "another end",
        "other links",
        "another's id",
        "nobody's id",
    ),
    *("no status", "again", "again"),
)
LIES = ("another end", "another's id", "nobody's id")
CREDITS = 1_500_000


@dataclass(slots=True)
class Real:
    """A task at the upstream, for one of our tasks."""

    id: str
    task_id: str
    truth: Report
    known: bool = True  # False: the upstream answers 404 from now on


@dataclass(slots=True)
class Upstream:
    """The created and charged tasks. One of our tasks may have none, one or several."""

    reals: dict[str, Real] = field(default_factory=dict)
    lied_about: set[str] = field(default_factory=set)
    honest: bool = False  # the upstream never lies
    said: dict[str, list[Report | None]] = field(
        default_factory=dict
    )  # the callbacks so far, by task
    _links: int = 0

    def create(self, task_id: str) -> Real:
        name = f"task-unified-{len(self.reals)}-{task_id[-6:]}"
        self.reals[name] = Real(
            name,
            task_id,
            Report(
                name, Status.PENDING, estimated_time=45 + len(self.reals), credits_reserved=CREDITS
            ),
        )
        return self.reals[name]

    def of(self, task_id: str) -> list[Real]:
        return [real for real in self.reals.values() if real.task_id == task_id]

    def end(self, real: Real, kind: str, results: int = 1) -> None:
        """Decides the outcome of a task once."""
        if not real.truth.final:
            real.truth = self.an_end(real.id, kind, results)

    def an_end(self, id: str, kind: str, results: int) -> Report:
        match kind:
            case "failed":
                return Report(id, Status.FAILED, (), error("content_policy_violation"))
            case "cancelled":
                return Report(id, Status.CANCELLED)
            case "gone":
                return Report(id, Status.FAILED, (), error("resource_not_found"))
        return Report(
            id,
            Status.COMPLETED,
            () if kind == "empty" else self.links(results),
            credits_used=CREDITS,
        )

    def links(self, count: int) -> tuple[str, ...]:
        self._links += 1
        return tuple(f"https://r.test/{self._links}/{place}" for place in range(count))

    def renewed(self, report: Report) -> Report:
        return replace(report, results=self.links(len(report.results)))

    def query(self, id: str, luck: int) -> QueryOutcome | None:
        """The answer to a query. None means that the worker found no free place for it."""
        real = self.reals.get(id)
        truth = real.truth if real and real.known else None
        match 0 if self.honest and luck in (2, 6, 7) else luck:
            case 1:
                return NoAnswer("500")
            case 2:
                self.lied_about |= {real.task_id} if real and real.known else set()
                return NotFound()
            case 3:
                return Found(Report(id, Status.PROCESSING, progress=50))
            case 4:
                return Found(Report(id, None))
            case 5:
                return None
            case 6 | 7 if real:
                self.lied_about.add(real.task_id)
                return Found(self.an_end(id, ENDS[luck - 6], 2))
            case 8 | 9 if real and truth:
                real.truth = truth = self.renewed(truth)
        return NotFound() if truth is None else Found(truth)

    def reports(self, task_id: str, kind: str, pick: int) -> Report | None:
        """The report of a callback for one of our tasks. `again` repeats the first final one. None
        means an unreadable body.
        """
        before = self.said.setdefault(task_id, [])
        ends = [report for report in before if report and report.final]
        before.append(ends[0] if kind == "again" and ends else self._says(task_id, kind, pick))
        return before[-1]

    def _says(self, task_id: str, kind: str, pick: int) -> Report | None:
        mine, others = (
            self.of(task_id),
            [real for real in self.reals.values() if real.task_id != task_id],
        )
        if self.honest and kind in LIES:
            kind = "end"
        if not mine or kind in LIES:
            self.lied_about.add(task_id)
        real = (
            mine[pick % len(mine)]
            if mine
            else Real(
                "task-unified-ghost", task_id, Report("task-unified-ghost", Status.PROCESSING)
            )
        )
        if kind in ("end", "without id", "other links") or (kind == "truth" and pick % 2):
            self.end(real, ENDS[pick % len(ENDS)], 1 + pick % 3)
        match kind:
            case "processing":
                return Report(real.id, Status.PROCESSING, progress=pick)
            case "without id":
                return replace(real.truth, upstream_id=None)
            case "unreadable":
                return None
            case "another end":
                self.end(real, ENDS[(pick + 1) % len(ENDS)] if pick % 4 else "completed")
                return self.an_end(real.id, ENDS[pick % len(ENDS)], 1 + pick % 3)
            case "other links":
                return self.renewed(real.truth)
            case "another's id" if others:
                taken = others[pick % len(others)]
                self.lied_about.add(taken.task_id)
                return replace(real.truth, upstream_id=taken.id)
            case "another's id" | "nobody's id":
                return replace(real.truth, upstream_id="task-unified-nobody", estimated_time=pick)
            case "no status":
                return replace(real.truth, status=None)
        return replace(real.truth, credits_used=None) if pick % 2 else real.truth


def error(code: str) -> JSON:
    return {"code": code, "message": "the upstream's message", "type": "task_error"}
