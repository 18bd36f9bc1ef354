"""Input images on their way to the upstream: their copies in its file API, and what happens to a
task whose copies cannot be made.

The copies are made before the submission leaves, so a failure there never leads to a paid call.
"""

import asyncio
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import structlog
from sqlalchemy import Connection, Row, delete, select

from service.blobs.blob_store import check_size
from service.db.file_tables import copies
from service.db.file_tables import files as file_table
from service.db.tables import images, tasks
from service.db.transaction import Lease, Transaction, one_by_one
from service.errors import BlobUnavailable
from service.ids import EXTENSIONS, PREFIXES
from service.queue import leases
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.strict_json import JSON
from service.tasks.fair_queue import FairQueue
from service.tasks.files import InputCopy, forget_copies, input_copies
from service.tasks.rows import TaskRow
from service.tasks.state import TERMINAL, State
from service.tasks.submissions import end_uncertain
from service.tasks.transitions import change, end, lock_leased, task_error
from service.upstreams.base import Refused
from service.upstreams.file_api import NotUploaded

log = structlog.get_logger()

SPARE_MS = 3_600_000  # a copy that lives shorter is made anew: the upstream must still fetch it
FREED = 10  # copies that make room at once
GONE = "input_gone"
FORGET_S = 5.0  # how long a deletion waits for the upstream


@dataclass(frozen=True, slots=True)
class InputProblem:
    """Why a task cannot be sent now, or, with `code`, never."""

    reason: str
    code: str | None = None
    retry_after: float | None = None
    throttled: bool = False


async def input_links(resources: Resources, row: TaskRow) -> Mapping[str, str] | InputProblem:
    """The upstream's links of the task's input images, by id."""
    store, links = resources.store, dict[str, str]()
    ids = [each["id"] for each in row.inputs or () if each["id"]]
    sources = await store.read(input_sources, ids, store.clock())
    by_id = await store.read(input_copies, ids)
    for id in ids:
        if id not in sources:
            return InputProblem(f"the input image {id} was erased or its days are over", GONE)
        copy = by_id.get(id)
        if copy is None or copy.expires_at <= store.clock() + SPARE_MS:
            link = links.get(id) or await _copied(resources, row, id, sources[id])
            if isinstance(link, InputProblem):
                return link
            links[id] = link
        else:
            links[id] = copy.url
    return links


async def _copied(
    resources: Resources, row: TaskRow, id: str, source: Row[Any]
) -> str | InputProblem:
    try:
        await check_size(resources.blobs, source.blob, source.bytes, "it")
    except BlobUnavailable as error:  # else the upload would break off, as if by the upstream
        return InputProblem(f"the input image {id} was not read: {error}")
    content = resources.blobs.read(source.blob)
    # An upload under the name of another file would overwrite it.
    name = f"{id}-{secrets.token_hex(6)}.{EXTENSIONS[source.media_type]}"
    checkpoint("input.started")
    upload = resources.file_api.upload
    outcome = await upload(content, source.bytes, name, source.media_type)
    checkpoint("input.uploaded")
    if isinstance(outcome, NotUploaded):
        if outcome.full:
            await _make_room(resources)
        reason = f"the input image {id} was not uploaded: {outcome.reason}"
        code = "input_refused" if outcome.final else None
        return InputProblem(reason, code, outcome.retry_after, outcome.throttled)
    expires_at = round(outcome.expires_at * 1000)
    copy = InputCopy(id, row.owner, row.upstream, outcome.file_id, outcome.url, expires_at)
    kept = await resources.store.write(record_copies, copy)
    checkpoint("input.recorded")
    log.info("input.uploaded", input_id=id, bytes=source.bytes, kept=kept)
    if not kept:  # erased meanwhile
        await forget_copy(resources, copy)
        return InputProblem(f"the input image {id} was erased", GONE)
    return outcome.url


async def forget_copy(resources: Resources, copy: InputCopy) -> None:
    """Deletes a copy at the upstream. It expires there by itself if that fails."""
    if copy.file_id is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(FORGET_S):
                await resources.file_api.delete(copy.file_id)


async def forget_refused(resources: Resources, refusal: Refused, ids: Iterable[str]) -> None:
    """The upstream refused a task with these inputs. No other response shows that it lost a copy,
    so the next task uploads those anew that no task at work needs.
    """
    if refusal.error["param"] not in (None, "image_urls", "mask_url"):
        return
    for copy in await resources.store.write(forget_unneeded_copies, tuple(ids)):
        await forget_copy(resources, copy)


async def _make_room(resources: Resources) -> None:
    """Deletes the oldest copies that no task needs, because the account has no room left."""
    for copy in await resources.store.write(forget_spare_copies, FREED):
        checkpoint("input.forgotten")
        await forget_copy(resources, copy)


def with_input_links(body: bytes, links: Mapping[str, str]) -> bytes:
    """The body to send, with the upstream's links in place of ids."""
    if not links:
        return body
    document: JSON = json.loads(body)
    if "image_urls" in document:
        document["image_urls"] = [links.get(each, each) for each in document["image_urls"]]
    if isinstance(mask := document.get("mask_url"), str):
        document["mask_url"] = links.get(mask, mask)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


# --- the store


def input_sources(connection: Connection, ids: Sequence[str], now: int) -> dict[str, Row[Any]]:
    """The `blob`, `media_type` and `bytes` of the stored files and results with these ids."""
    c, i = file_table.c, images.c
    kept = select(c.id, c.blob, c.media_type, c.bytes)
    kept = kept.where(c.blob.is_not(None), c.expires_at > now)
    results = select(i.id, i.blob, i.media_type, i.bytes)
    results = results.where(i.state == "stored", i.blob.is_not(None))
    rows = [
        *connection.execute(kept.where(c.id.in_(ids))),
        *connection.execute(results.where(i.id.in_(ids))),
    ]
    return {row.id: row for row in rows}


@one_by_one
def record_copies(tx: Transaction, item: InputCopy) -> bool:
    """Records a copy. False: the file or result is gone, so the copy must go too."""
    is_file = item.id.startswith(PREFIXES["file"])
    table = file_table if is_file else images
    source = select(table.c.id).where(table.c.id == item.id, table.c.blob.is_not(None))
    if tx.connection.execute(source.with_for_update()).first() is None:
        return False
    tx.connection.execute(delete(copies).where(copies.c.id == item.id))
    tx.connection.execute(copies.insert().values(asdict(item)))
    return True


@one_by_one
def forget_spare_copies(tx: Transaction, limit: int) -> list[InputCopy]:
    """Forgets the oldest copies that no task names which may still be sent or is at work, so many.
    The caller deletes them at the upstream afterwards. A row never names a copy that is gone there.
    """
    ids = tx.connection.execute(select(copies.c.id).order_by(copies.c.expires_at)).scalars()
    return forget_copies(tx, _unneeded(tx.connection, ids)[:limit])


@one_by_one
def forget_unneeded_copies(tx: Transaction, ids: Sequence[str]) -> list[InputCopy]:
    """As `forget_spare_copies`, of these files and results."""
    return forget_copies(tx, _unneeded(tx.connection, ids))


def _unneeded(connection: Connection, ids: Iterable[str]) -> list[str]:
    live = [state.value for state in State if state not in TERMINAL]  # read by the states' index
    waiting = select(tasks.c.inputs).where(tasks.c.state.in_(live), tasks.c.inputs.is_not(None))
    needed = {each["id"] for inputs in connection.execute(waiting).scalars() for each in inputs}
    return [id for id in ids if id not in needed]


@dataclass(frozen=True, slots=True)
class InputFailure:
    """A task whose input images did not reach the upstream. It is tried again after `wait_ms`
    unless it is older than `give_up_ms`, or the problem has a code.
    """

    lease: Lease
    problem: InputProblem
    wait_ms: int
    give_up_ms: int


def record_input_failures(tx: Transaction, items: Sequence[InputFailure]) -> list[None]:
    """Fails tasks that were not submitted, or makes them due again."""
    pairs = list(lock_leased(tx, items))
    queue = cache(lambda: FairQueue(tx, (row.owner for _, row in pairs if row)))
    for item, row in pairs:
        if row is None:
            continue
        values = {"submit_outcomes": row.submit_outcomes + 1}
        final = item.problem.code or tx.now - row.created_at >= item.give_up_ms
        if row.state is State.UNCERTAIN and final:
            end_uncertain(tx, row)
        elif row.state is State.QUEUED and final:
            message = item.problem.reason
            end(tx, row, State.FAILED, task_error(item.problem.code or "not_submitted", message))
        elif row.state in (State.QUEUED, State.UNCERTAIN):
            tx.step(row.id, "input.retried", reason=item.problem.reason)
            change(tx, row, submit_due_at=tx.now + item.wait_ms)
            if row.state is State.QUEUED:
                values["submit_turn"] = queue().next_turn(row.owner)
        change(tx, row, **values, **leases.release("submit", row.submit_due_at))
    return [None] * len(items)
