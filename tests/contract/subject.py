"""The store under test with its clock and its workers, and the steps that move a task through its
states.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Table, select

from service.db.batching import BatchingStore, Item, Result
from service.db.paging import Owned, Row
from service.db.tables import events, images, tasks
from service.db.transaction import Lease, Transaction
from service.events.deliveries import DeliveryOutcome, record_attempts
from service.events.endpoints import (
    DeliveryAttempt,
    EndpointChange,
    NewEndpointRow,
    change_endpoints,
    insert_endpoints,
)
from service.events.replay_filter import ReplayFilter, replay_extent
from service.events.replays import NewReplayRow, insert_replays
from service.ids import PREFIXES
from service.images.downloads import Download, Lost, Retry, Stored, record_downloads
from service.queue import leases
from service.queue.leases import claim
from service.strict_json import JSON
from service.tasks.accept import Inserted, insert_tasks
from service.tasks.admin import cancel_tasks
from service.tasks.callbacks import Callback, Verdict, give_verdicts
from service.tasks.owner_keys import StoredKey, insert_keys
from service.tasks.rows import TaskRow
from service.tasks.settlements import Settlement, record_settlements
from service.tasks.state import State
from service.tasks.submissions import (
    SubmissionResult,
    SubmissionStart,
    record_submissions,
    start_submissions,
)
from service.tasks.transitions import change, lock
from service.upstreams.base import (
    Accepted,
    NotCreated,
    Refused,
    Report,
    Status,
    Uncertain,
    outcome_digest,
)

SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000
DAY = 24 * HOUR
LEASE = 15 * SECOND
FIRST_QUERY, ASK_AGAIN = 90 * SECOND, 60 * SECOND
OWNER = "painter"

counter = itertools.count(1)


def new_id(kind: str, _now: int = 0) -> str:
    """Ids count up in the order in which they are made, so that a failed assertion is easy to
    read.
    """
    return f"{PREFIXES[kind]}{next(counter):026d}"


@dataclass(slots=True)
class Clock:
    """A clock in milliseconds since 1970 that only the test moves."""

    now: int = 1_750_000_000_000

    def shift(self, ms: int) -> None:
        self.now += ms


@dataclass(slots=True)
class Places:
    """`Workers` with as many free places as the test sets. It keeps the leases and transactions
    that it receives and works on none of them.
    """

    free: dict[str, int] = field(default_factory=dict)
    used: dict[str, dict[str, int]] = field(default_factory=dict)
    leased: list[Lease] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    hints: list[set[str] | None] = field(default_factory=list)

    def reserve(self) -> dict[str, int]:
        reserved = {stage: places for stage, places in self.free.items() if places}
        self.free = dict.fromkeys(self.free, 0)
        return reserved

    def shares(self) -> dict[str, dict[str, int]]:
        return {stage: dict(used) for stage, used in self.used.items()}

    def take(self, leased: Iterable[Lease], unused: Mapping[str, int]) -> None:
        self.leased += leased
        for stage, places in unused.items():
            self.free[stage] += places

    def committed(self, tx: Transaction) -> None:
        self.transactions.append(tx)

    def hinted(self, stages: Iterable[str] | None) -> None:
        self.hints.append(None if stages is None else set(stages))

    def new_leases(self) -> list[Lease]:
        """The leases that arrived since the last call."""
        leased, self.leased = self.leased, []
        return leased


Opener = Callable[
    ..., AbstractAsyncContextManager[BatchingStore]
]  # opens a database as the process with the given name


@dataclass(slots=True)
class Subject:
    """One open store with its places."""

    store: BatchingStore
    clock: Clock
    places: Places = field(default_factory=Places)

    def __post_init__(self) -> None:
        self.store.attach(self.places)

    # --- reading and writing ---

    async def write(
        self, operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]], item: Item
    ) -> Result:
        return await self.store.write(operation, item)

    async def batch(
        self,
        operation: Callable[[Transaction, Sequence[Item]], Sequence[Result]],
        items: Sequence[Item],
    ) -> list[Result]:
        """Runs an operation over several items in one transaction, independent of how the store
        batches.
        """

        def whole(tx: Transaction, lists: Sequence[Sequence[Item]]) -> list[Sequence[Result]]:
            return [operation(tx, some) for some in lists]

        return list(await self.store.write(whole, items))

    async def rows(self, table: Table, **where: Any) -> list[Row]:
        """The rows with these values, in the order of the primary key."""

        def query(connection: Connection) -> list[Row]:
            statement = (
                select(table)
                .where(*(table.c[name] == value for name, value in where.items()))
                .order_by(*table.primary_key)
            )
            return list(connection.execute(statement).mappings())

        return await self.store.read(query)

    async def row(self, table: Table, id: str) -> Row:
        (row,) = await self.rows(table, id=id)
        return row

    async def task(self, task_id: str) -> Row:
        return await self.row(tasks, task_id)

    async def state(self, task_id: str) -> State:
        return State((await self.task(task_id))["state"])

    async def events(self, task_id: str | None = None) -> list[Row]:
        return await self.rows(events, **({} if task_id is None else {"task_id": task_id}))

    async def types(self, task_id: str | None = None) -> list[str]:
        return [row["type"] for row in await self.events(task_id)]

    async def images(self, task_id: str) -> list[Row]:
        return sorted(await self.rows(images, task_id=task_id), key=lambda row: row["position"])

    # --- leases ---

    async def claim(self, stage: str, places: int = 1) -> list[Lease]:
        """The leases that this process gets for a stage with this number of free places."""
        self.places.new_leases()
        self.places.free[stage] = places
        await self.write(claim, stage)
        self.places.free[stage] = 0
        return self.places.new_leases()

    async def claimed(self, stage: str, key: str) -> Lease:
        """The lease for one row, which must be due. All other due rows are released again."""
        claimed = {lease.key: lease for lease in await self.claim(stage, 1000)}
        lease = claimed.pop(key)
        await self.batch(leases.give_back, list(claimed.values()))
        return lease

    # --- a task's life ---

    def wish(self, **different: Any) -> TaskRow:
        task_id = new_id("task")
        usual: dict[str, Any] = {
            "id": task_id,
            "owner": OWNER,
            "upstream": "evolink",
            "model": "wan2.5-text-to-image",
            "prompt": "a lighthouse",
            "request": {"size": "1280x1280", "n": 1},
            "metadata": {"order": "7"},
            "body": b'{"prompt":"a lighthouse"}',
        }
        return TaskRow(state=State.QUEUED, created_at=0, **(usual | different))

    async def queued(self, **different: Any) -> str:
        inserted: Inserted = await self.write(insert_tasks, self.wish(**different))
        return inserted.task_id

    async def start(self, lease: Lease, *, resubmit: bool = False) -> bytes | None:
        return await self.write(start_submissions, SubmissionStart(lease, 70 * SECOND, resubmit))

    async def submitting(self, **different: Any) -> Lease:
        """A new task whose request is on its way, as the lease of its worker."""
        lease = await self.claimed("submit", await self.queued(**different))
        assert await self.start(lease) is not None
        return lease

    async def submission(self, lease: Lease, result: SubmissionResult) -> State:
        return await self.write(record_submissions, replace(result, lease=lease))

    async def submitted(self, **different: Any) -> str:
        """A task that the upstream has accepted under the id `upstream_id(task)`."""
        lease = await self.submitting(**different)
        assert await self.submission(lease, accepted(upstream_id(lease.key))) is State.SUBMITTED
        return lease.key

    async def uncertain(self, decide_ms: int = 15 * MINUTE, **different: Any) -> str:
        lease = await self.submitting(**different)
        assert (
            await self.submission(lease, doubts("no answer in time", decide_ms)) is State.UNCERTAIN
        )
        return lease.key

    async def cancel(self, task_id: str, owner: str | None = None) -> str | None:
        return await self.write(cancel_tasks, Owned(task_id, owner))

    async def callback(self, task_id: str, report: Report | None, body: bytes = b"{}") -> Verdict:
        return await self.write(accept_callbacks, callback(task_id, report, body))

    async def asking(self, task_id: str) -> Lease:
        """Moves the clock to the task's next query and returns the lease for it."""
        task = await self.task(task_id)
        assert task["settle_due_at"] is not None
        self.clock.now = max(self.clock.now, task["settle_due_at"])
        return await self.claimed("settle" if task["settle_requests"] else "reconcile", task_id)

    async def requeued(self, stage: str, key: str) -> Lease:
        """Makes one row due now, as a callback would, and returns the lease for it."""

        def want(tx: Transaction, keys: Sequence[str]) -> list[None]:
            for id, row in lock(tx, keys).items():
                change(
                    tx,
                    row,
                    settle_requests=row.settle_requests + 1,
                    **leases.requeue(tx, stage, id, row),
                )
            return [None] * len(keys)

        await self.write(want, key)
        return await self.claimed(stage, key)

    async def settle(
        self,
        task_id: str,
        report: Report | None,
        *,
        expires_ms: int | None = None,
        lease: Lease | None = None,
    ) -> State | None:
        """Records the upstream's report about a task with the task's current count of requests."""
        lease = lease or await self.asking(task_id)
        requests = (await self.task(task_id))["settle_requests"]
        return await self.write(
            record_settlements, Settlement(lease, report, requests, ASK_AGAIN, DAY, expires_ms)
        )

    async def storing(self, *urls: str, **different: Any) -> str:
        """A task whose results a query has named and no worker has downloaded yet."""
        task_id = await self.submitted(**different)
        assert await self.settle(task_id, completed(task_id, *urls)) is State.STORING
        return task_id

    async def download(
        self, image: Row, outcome: Stored | Retry | Lost, lease: Lease | None = None
    ) -> str | None:
        """Moves the clock to the image's due time and records the outcome of its download."""
        if lease is None:
            self.clock.now = max(self.clock.now, (await self.row(images, image["id"]))["due_at"])
            lease = await self.claimed("download", image["id"])
        return await self.write(
            record_downloads, Download(lease, image["task_id"], image["source_url"], outcome)
        )

    async def completed(self, *urls: str, **different: Any) -> str:
        """A completed task with its images stored."""
        task_id = await self.storing(*(urls or ("https://r.test/0",)), **different)
        for image in await self.images(task_id):
            assert await self.download(image, stored(image)) == "stored"
        assert await self.state(task_id) is State.COMPLETED
        return task_id

    async def endpoint(
        self, owner: str | None = OWNER, types: Sequence[str] = ("image.task.*",)
    ) -> str:
        made = NewEndpointRow(
            new_id("endpoint"), owner, "https://s.test/hook", tuple(types), "", b"secret"
        )
        await self.write(insert_endpoints, made)
        return made.id

    async def replay(self, owner: str = OWNER) -> str:
        """A replay of all events to a new endpoint. Its first page is due."""
        wanted = ReplayFilter(
            await self.endpoint(owner), owner, 0, self.clock.now + 1, ("image.task.*",), "all"
        )
        replay = NewReplayRow(
            new_id("replay"), owner, wanted, await self.store.read(replay_extent, wanted)
        )
        assert await self.write(insert_replays, replay)
        return replay.id

    async def change(self, id: str, owner: str | None = None, **values: Any) -> bool:
        return await self.write(change_endpoints, EndpointChange(id, owner, **values))

    async def key(
        self, owner: str, callback_secret: bytes = b"callback secret", *, id: str | None = None
    ) -> bool:
        """Creates an API key whose hash is its id. Returns whether it is the owner's first key."""
        id = id or new_id("key")
        return await self.write(
            insert_keys, StoredKey(id, owner, id, "dk_hint", ("submit", "read"), callback_secret)
        )

    async def attempt(self, lease: Lease, result: str, **more: Any) -> bool:
        """Records an attempt that a worker made."""
        said = {name: more.pop(name) for name in ("ours", "pause_ms", "url") if name in more}
        status = 204 if result == "delivered" else 500
        made = DeliveryAttempt(new_id("attempt"), status, 12, None, b"", **said)
        return await self.write(record_attempts, DeliveryOutcome(lease, result, made, **more))


# --- results of upstream calls ---

LOST = Lost("answered 451")


def upstream_id(task_id: str) -> str:
    return f"task-unified-{task_id[-6:]}"


NOBODYS = Lease("submit", "", 0, 0)  # `Subject.submission` sets the lease of a result


def accepts(report: Report, first_query_ms: int, decide_ms: int = 0) -> SubmissionResult:
    return SubmissionResult(NOBODYS, Accepted(report), wait_ms=first_query_ms, decide_ms=decide_ms)


def creates_nothing(reason: str, wait_ms: int, give_up_ms: int) -> SubmissionResult:
    return SubmissionResult(NOBODYS, NotCreated(reason), wait_ms=wait_ms, give_up_ms=give_up_ms)


def refuses(status: int, error: JSON) -> SubmissionResult:
    return SubmissionResult(NOBODYS, Refused(status, error))


def doubts(reason: str, decide_ms: int, *, resend: bool = False) -> SubmissionResult:
    return SubmissionResult(NOBODYS, Uncertain(reason), decide_ms=decide_ms, resend=resend)


UNDECIDED = SubmissionResult(NOBODYS, None)


def accepted(id: str, **more: Any) -> SubmissionResult:
    return accepts(Report(id, Status.PENDING, **more), FIRST_QUERY)


def completed(task_id: str, *urls: str, **more: Any) -> Report:
    return Report(upstream_id(task_id), Status.COMPLETED, urls, **more)


def failed(task_id: str, code: str = "content_policy_violation") -> Report:
    return Report(upstream_id(task_id), Status.FAILED, (), error_of(code))


def processing(task_id: str, **more: Any) -> Report:
    return Report(upstream_id(task_id), Status.PROCESSING, **more)


def error_of(code: str) -> JSON:
    return {"code": code, "message": "the upstream's message", "type": "task_error"}


def accept_callbacks(tx: Transaction, items: Sequence[Callback]) -> list[Verdict]:
    """Judges callbacks that arrive now, without the inbox."""
    now = [replace(item, received_at=tx.now) for item in items]
    return give_verdicts(tx, lock(tx, (item.task_id for item in items)), now)


def callback(
    task_id: str, report: Report | None, body: bytes = b"{}", *, id: str | None = None
) -> Callback:
    digest = sha256(body).hexdigest()
    return Callback(id or new_id("callback"), "evolink", task_id, report, digest, body, DAY, 0)


def digest(report: Report) -> str:
    return outcome_digest(report.status, report.results)


def stored(image: Row) -> Stored:
    """The outcome of a successful download. Each image has a different hash."""
    sha = sha256(image["id"].encode()).hexdigest()
    return Stored(
        f"{image['task_id']}/{image['position']}-{sha}.png", "image/png", 1234, sha, 768, 512
    )
