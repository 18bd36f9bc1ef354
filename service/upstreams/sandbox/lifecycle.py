"""The sandbox's tasks: made, looked up and charged in memory; each lives from `pending` to its end
and then calls back.
"""

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random

from service.errors import ApiError
from service.strict_json import JSON
from service.upstreams.base import Status
from service.upstreams.sandbox.answers import encoded
from service.upstreams.sandbox.callback_sender import Call, Caller
from service.upstreams.sandbox.checks import Order
from service.upstreams.sandbox.faults import FAULTS, Faults, Outcome, Waves
from service.upstreams.sandbox.options import SandboxOptions

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
USAGE = {"billing_rule": "per_call", "user_group": "default"}
SEEDED_CREATED = (
    1_757_165_031  # what seeded tasks say of their creation: the clock would make every run another
)
UNFINISHED = Outcome(Status.PENDING)


@dataclass(slots=True)
class SandboxTask:
    """One paid task. `created` and `ended` are Unix seconds, `stamp` those that it shows as its
    creation.

    `called`: after the first callback's first attempt, or when none is sent.
    """

    id: str
    order: Order
    faults: Faults
    base_url: str
    created: float
    stamp: int
    price: Decimal
    key: str | None = None
    digest: str = ""
    status: Status = Status.PENDING
    ended: float | None = None
    outcome: Outcome = UNFINISHED
    calls: list[Call] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    asked: Counter[str] = field(default_factory=Counter)

    @property
    def format(self) -> str:
        return str(self.faults.get("format", "png"))

    @property
    def used(self) -> Decimal:
        """What it costs in the end: by the images made."""
        return self.outcome.images * self.price

    def record(self, call: Call) -> None:
        self.calls.append(call)
        self.called.set()


class Ledger:
    """Every task by its id and by its idempotency key, and the account they are charged to. Tasks
    are forgotten after `task_ttl_s`.
    """

    def __init__(self, options: SandboxOptions, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.credits = options.credits
        self.submissions: Counter[str] = Counter()
        self._options = options
        self._seed = Random().getrandbits(64) if options.seed is None else options.seed
        self._seen: Counter[str] = Counter()
        self._lots: dict[str, str] = {}
        self._tasks: dict[str, SandboxTask] = {}
        self._keys: dict[str, SandboxTask] = {}

    def all(self) -> list[SandboxTask]:
        """The tasks not yet forgotten, oldest first."""
        self._forget()
        return list(self._tasks.values())

    def find(self, task_id: str) -> SandboxTask:
        """404 for an id that was never there or is forgotten."""
        self._forget()
        if task_id not in self._tasks:
            raise ApiError(404, "task_not_found", "the task does not exist or has expired")
        return self._tasks[task_id]

    def replayed(self, key: str | None, digest: str) -> SandboxTask | None:
        """The task an earlier submission under this key created; 409 when its body was another."""
        self._forget()
        task = None if key is None else self._keys.get(key)
        if task is not None and task.digest != digest:
            raise ApiError(
                409, "idempotency_conflict", "the Idempotency-Key was used with another body"
            )
        return task

    def lot(self, key: str | None, body: JSON) -> str:
        """What chance goes by: the seed, a body but for its callback's address, how many like it
        came before. A key keeps its first.
        """
        if key is None or key not in self._lots:
            like = digest_of(
                {name: value for name, value in body.items() if name != "callback_url"}
            )
            lot = f"{self._seed}/{like}/{self._seen[like]}"
            self._seen[like] += 1
            if key is None:
                return lot
            self._lots[key] = lot
        return self._lots[key]

    def create(
        self, order: Order, faults: Faults, base_url: str, lot: str, key: str | None, digest: str
    ) -> SandboxTask:
        """A task, its price reserved for `n` images; 402 when the account has less."""
        price = self._options.price
        if order.n * price > self.credits:
            raise ApiError(
                402,
                "insufficient_quota",
                f"the task needs {order.n * price} credits, {self.credits} are left",
            )
        self.credits -= order.n * price
        now = self.clock()
        stamp = int(now) if self._options.seed is None else SEEDED_CREATED
        task_id = f"task-unified-{stamp}-" + "".join(Random(lot).choices(LETTERS, k=8))
        task = SandboxTask(task_id, order, faults, base_url, now, stamp, price, key, digest)
        self._tasks[task_id] = task
        if key is not None:
            self._keys[key] = task
        return task

    def end(self, task: SandboxTask) -> None:
        """Bring a task to the end its faults have in store, and charge what it really made."""
        outcome = Outcome(Status.COMPLETED, task.order.n)
        for name, value in task.faults.items():
            if (change := FAULTS[name].outcome) is not None:
                outcome = change(value, outcome)
        task.outcome, task.status, task.ended = outcome, outcome.status, self.clock()
        self.credits += task.order.n * task.price - task.used

    def _forget(self) -> None:
        oldest = self.clock() - self._options.task_ttl_s
        while (
            self._tasks and (task := next(iter(self._tasks.values()))).created <= oldest
        ):  # the first is the oldest
            del self._tasks[task.id]
            if task.key is not None:
                self._keys.pop(task.key, None)
                self._lots.pop(task.key, None)


async def live(task: SandboxTask, ledger: Ledger, caller: Caller, delay: float) -> None:
    """A task's whole life: a tenth of its seconds pending, the rest processing, then charged, then
    the callbacks.
    """
    seconds = task.faults.get("delay", delay)
    try:
        await asyncio.sleep(seconds / 10)
        task.status = Status.PROCESSING
        await asyncio.sleep(seconds * 9 / 10)
        ledger.end(task)
        if task.order.callback_url is not None:
            await caller.send(
                task.order.callback_url,
                callbacks(task),
                task.record,
                task.faults.get("slow_callback", 0),
            )
    finally:
        task.called.set()


def callbacks(task: SandboxTask) -> Waves:
    """What is sent when the task has ended: the true document once, if no fault says otherwise."""
    truth = document(task)
    waves: Waves = [[encoded(truth)]]
    for name, value in task.faults.items():
        if (change := FAULTS[name].calls) is not None:
            waves = change(value, waves, truth)
    return waves


def submitted(task: SandboxTask, delay: float) -> JSON:
    """The answer to a submission, also to a replayed one: the task as it was when it was
    created.
    """
    shown = {
        **frame(task),
        "progress": 0,
        "status": "pending",
        "task_info": {"can_cancel": True, "estimated_time": max(1, math.ceil(delay))},
        "usage": USAGE | {"credits_reserved": number(task.order.n * task.price)},
    }
    return as_faults_have_it(task, shown)


def document(task: SandboxTask) -> JSON:
    """A task as a query and a callback show it."""
    shown = frame(task) | {
        "progress": 0,
        "status": task.status.value,
        "task_info": {"can_cancel": task.ended is None},
    }
    match task.status:
        case Status.COMPLETED:
            shown |= {
                "progress": 100,
                "results": links(task),
                "usage": USAGE | {"credits_used": number(task.used)},
            }
        case Status.FAILED:
            shown |= {"error": task.outcome.error}
        case Status.PROCESSING:
            shown |= {"progress": 50}
    return as_faults_have_it(task, shown)


def as_faults_have_it(task: SandboxTask, shown: JSON) -> JSON:
    for name, value in task.faults.items():
        if (change := FAULTS[name].shown) is not None:
            shown = change(value, shown)
    return shown


def frame(task: SandboxTask) -> JSON:
    return {
        "created": task.stamp,
        "id": task.id,
        "model": task.order.model,
        "object": "image.generation.task",
        "type": "image",
    }


def links(task: SandboxTask) -> list[str]:
    return [
        f"{task.base_url}/files/{task.id}/{index}.{task.format}"
        for index in range(task.outcome.images)
    ]


def number(credits: Decimal) -> int | float:
    """Credits as a JSON number: 3, 1.5."""
    return int(credits) if credits == int(credits) else float(credits)


def digest_of(body: JSON) -> str:
    """The same for the same fields, in whatever order they stand."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
