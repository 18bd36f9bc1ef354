"""The sandbox's tasks, in memory: created, charged, ended and reported by callbacks."""

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
from service.upstreams.sandbox.callback_sender import CallbackAttempt, CallbackSender
from service.upstreams.sandbox.checks import Order
from service.upstreams.sandbox.effects import TaskEnd
from service.upstreams.sandbox.faults import Faults, Waves, applied
from service.upstreams.sandbox.options import SandboxOptions

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
USAGE = {"billing_rule": "per_call", "user_group": "default"}
SEEDED_CREATED = 1_757_165_031  # `created` of seeded tasks, so that their ids repeat
UNFINISHED = TaskEnd(Status.PENDING)


@dataclass(slots=True)
class SandboxTask:
    """One paid task.

    `created` and `ended` are Unix seconds, `stamp` is the `created` of its document. `called` is
    set after the first attempt of the first callback, or when no callback is sent.
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
    end: TaskEnd = UNFINISHED
    attempts: list[CallbackAttempt] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def format(self) -> str:
        return str(self.faults.get("format", "png"))

    @property
    def reserved(self) -> Decimal:
        if "reserved" in self.faults:
            return Decimal(str(self.faults["reserved"]))
        return self.price * (self.order.n if self.order.per == "image" else 1)

    @property
    def used(self) -> Decimal:
        """The cost by the images made, or of the request if it made some."""
        if self.status is Status.COMPLETED and self.faults.get("usage", "absent") != "absent":
            return Decimal(str(self.faults["usage"]))
        return self.price * (self.end.images if self.order.per == "image" else self.end.images > 0)

    def refunded(self, now: float) -> Decimal:
        """The credits given back so far. A task that is charged nothing has no refund."""
        late = self.faults.get("refund_after", 0)
        if self.ended is None or now < self.ended + late:
            return Decimal(0)
        return min(Decimal(str(self.faults.get("refund", 0))), self.used)

    def record(self, attempt: CallbackAttempt) -> None:
        self.attempts.append(attempt)
        self.called.set()


class Ledger:
    """Every task by its id and by its idempotency key, and the account that they are charged to.

    Tasks are forgotten after `task_ttl_s`.
    """

    def __init__(self, options: SandboxOptions, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.credits = options.credits
        self.submissions: Counter[str] = Counter()
        self._options = options
        self._seed = Random().getrandbits(64) if options.seed is None else options.seed
        self._alike: Counter[str] = Counter()
        self._seeds: dict[str, str] = {}
        self._charged: list[SandboxTask] = []
        self._tasks: dict[str, SandboxTask] = {}
        self._keys: dict[str, SandboxTask] = {}

    def all(self) -> list[SandboxTask]:
        """The tasks, oldest first."""
        self._forget()
        return list(self._tasks.values())

    def charges(self) -> list[JSON]:
        """The record of charges: every task that was ever created, oldest first. `reserved` is what
        is reserved now.
        """
        now = self.clock()
        return [
            {
                "id": task.id,
                "idempotency_key": task.key,
                "model": task.order.model,
                "images_requested": task.order.n,
                "images": task.end.images,
                "credits_reserved": number(task.reserved),
                "reserved": number(Decimal(0) if task.ended else task.reserved),
                "used": number(task.used if task.ended else Decimal(0)),
                "refunded": number(task.refunded(now)),
            }
            for task in self._charged
        ]

    def find(self, task_id: str) -> SandboxTask:
        self._forget()
        if task_id not in self._tasks:
            raise ApiError(404, "task_not_found", "the task does not exist or has expired")
        return self._tasks[task_id]

    def replayed(self, key: str | None, digest: str) -> SandboxTask | None:
        """The task of an earlier submission with this key. 409 if its body was another."""
        self._forget()
        task = None if key is None else self._keys.get(key)
        if task is not None and task.digest != digest:
            raise ApiError(
                409, "idempotency_conflict", "the Idempotency-Key was used with another body"
            )
        return task

    def seed(self, key: str | None, body: JSON) -> str:
        """The seed of a submission's randomness.

        It depends on the sandbox's seed, the body without the callback URL, and the number of equal
        submissions before. A key keeps its first seed.
        """
        if key is not None and key in self._seeds:
            return self._seeds[key]
        like = digest_of({name: value for name, value in body.items() if name != "callback_url"})
        seed = f"{self._seed}/{like}/{self._alike[like]}"
        self._alike[like] += 1
        if key is not None:
            self._seeds[key] = seed
        return seed

    def create(
        self, order: Order, faults: Faults, base_url: str, seed: str, key: str | None, digest: str
    ) -> SandboxTask:
        """A task with its price reserved for `n` images. 402 if the account has less."""
        now, price = self.clock(), self._options.price
        price = order.price if price is None else price
        stamp = int(now) if self._options.seed is None else SEEDED_CREATED
        task_id = f"task-unified-{stamp}-" + "".join(Random(seed).choices(LETTERS, k=8))
        task = SandboxTask(task_id, order, faults, base_url, now, stamp, price, key, digest)
        if task.reserved > self.credits:
            raise ApiError(
                402,
                "insufficient_quota",
                f"the task needs {task.reserved} credits, {self.credits} are left",
            )
        self.credits -= task.reserved
        self._tasks[task_id] = task
        self._charged.append(task)
        if key is not None:
            self._keys[key] = task
        return task

    def end(self, task: SandboxTask) -> None:
        """Ends a task as its faults say, and charges the images made."""
        task.end = applied("end", task.faults, TaskEnd(Status.COMPLETED, task.order.n))
        task.status, task.ended = task.end.status, self.clock()
        self.credits += task.reserved - task.used

    def _forget(self) -> None:
        oldest = self.clock() - self._options.task_ttl_s
        for task in list(self._tasks.values()):  # oldest first
            if task.created > oldest:
                return
            del self._tasks[task.id]
            if task.key is not None:
                self._keys.pop(task.key, None)
                self._seeds.pop(task.key, None)


async def live(task: SandboxTask, ledger: Ledger, sender: CallbackSender, delay: float) -> None:
    """Runs a task: a tenth of its time pending, the rest processing, then the callbacks."""
    seconds = task.faults.get("delay", delay)
    try:
        await asyncio.sleep(seconds / 10)
        task.status = Status.PROCESSING
        await asyncio.sleep(seconds * 9 / 10)
        ledger.end(task)
        if task.order.callback_url is not None:
            slow = task.faults.get("slow_callback", 0)
            await sender.send(task.order.callback_url, callbacks(task), task.record, slow)
    finally:
        task.called.set()


def callbacks(task: SandboxTask) -> Waves:
    """The callbacks of a task: its document once, unless a fault changes that."""
    truth = document(task)
    waves: Waves = applied("calls", task.faults, truth, [[encoded(truth)]])
    return waves


def submitted(task: SandboxTask, delay: float) -> JSON:
    """The response to a submission and to its repetition: the task as it was created."""
    return documented(
        task,
        progress=0,
        status="pending",
        task_info={"can_cancel": True, "estimated_time": max(1, math.ceil(delay))},
        usage=USAGE | {"credits_reserved": number(task.reserved)},
    )


def document(task: SandboxTask, now: float = 0) -> JSON:
    """The task in a query and in a callback. `now`: the time of a query, which has refunds."""
    fields: JSON = {"status": task.status.value, "task_info": {"can_cancel": task.ended is None}}
    match task.status:
        case Status.COMPLETED:
            usage = USAGE | {"credits_used": number(task.used)}
            if back := task.refunded(now):
                fields["billing"] = {"charge_status": "charged", "refund_status": "refunded"}
                fields["billing"]["refunded_credits"] = number(back)
            return documented(task, progress=100, **fields, results=links(task), usage=usage)
        case Status.FAILED:
            return documented(task, progress=0, **fields, error=task.end.error)
        case Status.PROCESSING:
            return documented(task, progress=50, **fields)
    return documented(task, progress=0, **fields)


def documented(task: SandboxTask, **fields: object) -> JSON:
    frame = {
        "created": task.stamp,
        "id": task.id,
        "model": task.order.model,
        "object": "image.generation.task",
        "type": "image",
    }
    shown: JSON = applied("document", task.faults, frame | fields)
    return shown


def links(task: SandboxTask) -> list[str]:
    return [
        f"{task.base_url}/files/{task.id}/{index}.{task.format}" for index in range(task.end.images)
    ]


def number(credits: Decimal) -> int | float:
    """Credits as a JSON number: 3, 1.5."""
    return int(credits) if credits == int(credits) else float(credits)


def digest_of(body: JSON) -> str:
    """A hash of the fields in any order."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
