"""Accepts submissions: checks them before money is spent and commits them as `queued`."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import structlog

from service.db.prepared import run
from service.db.tables import tasks
from service.db.transaction import Transaction
from service.errors import ApiError, EgressRefused, NotConnected
from service.events.secrets import stored_secret
from service.ids import PREFIXES
from service.links import trimmed
from service.ops import tracing
from service.queue import leases
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.signing import canonical_json, new_secret
from service.strict_json import JSON, off_loop
from service.tasks import task_queries
from service.tasks.budgets import HAS_BUDGET, BudgetCheck, BudgetRefusal, over_budget
from service.tasks.fair_queue import FairQueue
from service.tasks.files import NamedInput
from service.tasks.ledger import entered
from service.tasks.metadata import check_metadata
from service.tasks.owner_keys import NewOwner, insert_owners
from service.tasks.rows import TaskRow
from service.tasks.state import State
from service.upstreams.catalogue import Catalogue, upstream_for
from service.upstreams.field_values import shown

log = structlog.get_logger()

OWN_FIELDS = ("callback_url", "metadata")  # which the upstream does not get
MODEL_CHARS = 200


class Inputs(Protocol):
    """Finds the input images of a submission. Raises ApiError 400."""

    async def resolve(
        self, owner: str, entries: list[str], model: str, mask: str | None = None
    ) -> list[NamedInput]:
        """The images of the entries, and last that of `mask` if the service keeps it."""

    async def discard(self, owner: str, named: Sequence[NamedInput]) -> None:
        """Erases the files that were made for a submission that is refused."""


@dataclass(frozen=True, slots=True)
class TaskIntake:
    """Accepts submissions. `callback_prefix` None: the upstream gets no callback_url."""

    resources: Resources
    catalogue: Catalogue
    callback_prefix: str | None
    min_free_bytes: int
    log_prompts: bool
    inputs: Inputs
    unpriced: bool  # tasks without a price are allowed under a budget

    async def accept(
        self,
        owner: str,
        body: JSON,
        idempotency_key: str | None,
        *,
        admin: bool = False,
        large: bool = False,
    ) -> tuple[str, TaskRow | None]:
        """The id of the durable task, and its row unless it existed before. A `large` body is
        encoded in a thread. Raises ApiError 400, 402, 409 or 503.
        """
        store = self.resources.store
        if isinstance(url := body.get("callback_url"), str) and not trimmed(url):
            body = {name: value for name, value in body.items() if name != "callback_url"}
        digest = await off_loop(large, lambda: hashlib.sha256(canonical_json(body)).hexdigest())
        if idempotency_key is not None:
            earlier = await store.look_up(task_queries.task_by_key, owner, idempotency_key)
            if earlier is not None:
                return _replayed(*earlier, digest), None
        await self._check(owner, body)
        upstream_body = await self._translated(owner, body, admin=admin)
        await self.resources.check_room(self.min_free_bytes, "images")
        named = await self._named(owner, body)
        upstream_body |= with_inputs(body, [each.stored for each in named])
        body = {**body, **with_inputs(body, [each.shown for each in named])}
        make = partial(self._task, owner, body, upstream_body, idempotency_key, digest)
        task = await off_loop(large, make)
        task.request_id, task.traceparent = tracing.request_id(), tracing.current()
        task.inputs = [asdict(each.image) for each in named] or None
        checkpoint("submit.checked")
        insert = insert_also_unpriced if self.unpriced else insert_tasks
        inserted = await store.write(insert, task)
        if inserted.refusal is not None:
            await self.inputs.discard(owner, named)
            raise over_budget(task, inserted.refusal, self.resources.metrics)
        checkpoint("submit.inserted")
        if not inserted.created:
            await self.inputs.discard(owner, named)
            return _replayed(inserted.task_id, inserted.idempotency_hash, digest), None
        fields = {"owner": owner, "task_id": task.id, "model": task.model}
        prompt = {"prompt": task.prompt} if self.log_prompts else {}
        log.info("task.queued", **fields, replayed=False, **prompt)
        return task.id, task

    def check_limits(self, body: JSON, *, whole: bool = True) -> None:
        """Checks a submission by the catalogue. Without `whole`, fields may be missing. Raises
        ApiError 400.
        """
        name = body.get("model")
        if not isinstance(name, str) or not 0 < len(name) <= MODEL_CHARS:
            message = f"model must be text of 1 to {MODEL_CHARS} characters, not {shown(name)}"
            raise ApiError(400, "invalid_request", message, param="model")
        if (violation := self.catalogue.check(body, whole=whole)) is not None:
            raise _invalid(violation.param, violation.message)

    def check_own_fields(self, body: JSON) -> None:
        """Checks `metadata`, and `callback_url` by its text. Raises ApiError 400."""
        check_metadata(body.get("metadata"))
        if (url := body.get("callback_url")) is None or (isinstance(url, str) and not trimmed(url)):
            return
        if not isinstance(url, str):
            raise _invalid("callback_url", f"callback_url must be text, not {shown(url)}")
        try:
            self.resources.task_callbacks.check_url(url)
        except EgressRefused as error:
            raise _invalid("callback_url", f"callback_url: {error}") from error

    async def _named(self, owner: str, body: JSON) -> list[NamedInput]:
        entries, mask = body.get("image_urls") or [], body.get("mask_url")
        if not isinstance(entries, list) or not all(isinstance(each, str) for each in entries):
            raise _invalid("image_urls", f"image_urls must be links, not {shown(entries)}")
        mask = mask if isinstance(mask, str) else None
        return await self.inputs.resolve(owner, entries, body["model"], mask)

    async def _check(self, owner: str, body: JSON) -> None:
        self.check_limits(body)
        self.check_own_fields(body)
        if body.get("callback_url") is not None:
            await self._check_callback_url(owner, body["callback_url"])

    async def _check_callback_url(self, owner: str, url: str) -> None:
        """Checks the address, and gives an owner without any key a secret to sign with."""
        try:
            with suppress(NotConnected):  # a name that does not resolve now may do so later
                await self.resources.task_callbacks.check(url)
        except EgressRefused as error:
            raise _invalid("callback_url", f"callback_url: {error}") from error
        if await self.resources.store.read(stored_secret, "owners", owner) is None:
            secret = self.resources.keyring.encrypt(new_secret(os.urandom(32)))
            await self.resources.store.write(insert_owners, NewOwner(owner, secret))

    async def _translated(self, owner: str, body: JSON, *, admin: bool) -> JSON:
        """The upstream's part of the body, with its own id in `model_params.task_id`.

        An owner may name only its own tasks there, because all owners share one account at the
        upstream. An admin may name any id of the upstream's. Raises ApiError 400 or 409.
        """
        upstream_body = {name: value for name, value in body.items() if name not in OWN_FIELDS}
        parameters = body.get("model_params")
        task_id = parameters.get("task_id") if isinstance(parameters, dict) else None
        if not isinstance(task_id, str):
            return upstream_body
        sees = None if admin else owner
        row = await self.resources.store.look_up(task_queries.task_row, task_id, sees)
        if row is None and admin and not task_id.startswith(PREFIXES["task"]):
            return upstream_body  # a task that was not submitted here
        param = "model_params.task_id"
        if row is None or (row.upstream_id is None and row.terminal):
            raise _invalid(param, f"{param} names no submitted task of yours")
        if row.upstream_id is None:
            message = f"{param} names a task that the upstream does not have yet"
            raise ApiError(409, "task_not_submitted", message, param=param)
        return upstream_body | {"model_params": body["model_params"] | {"task_id": row.upstream_id}}

    def _task(
        self, owner: str, body: JSON, upstream_body: JSON, idempotency_key: str | None, digest: str
    ) -> TaskRow:
        task_id, upstream = self.resources.id("task"), upstream_for(body["model"])
        if self.callback_prefix is not None:
            hashed = self.resources.keyring.hashed_token(upstream, task_id)
            path = f"/callbacks/{upstream}/{task_id}/{hashed}"
            upstream_body = {**upstream_body, "callback_url": self.callback_prefix + path}
        prompt, hidden = body.get("prompt"), ("prompt", "model", *OWN_FIELDS)
        callback_url = body.get("callback_url")
        shown = {name: value for name, value in body.items() if name not in hidden}
        return TaskRow(
            id=task_id,
            owner=owner,
            upstream=upstream,
            model=body["model"],
            state=State.QUEUED,
            created_at=0,  # the time of the transaction
            prompt=prompt if isinstance(prompt, str) else None,
            request=shown,
            warnings=self.catalogue.warnings(body["model"], shown) or None,
            metadata=body.get("metadata") or {},
            credits_estimated=self.catalogue.estimate(body).credits,
            images_requested=self.catalogue.images_of(body),
            body=json.dumps(upstream_body, ensure_ascii=False, separators=(",", ":")).encode(),
            callback_url=None if callback_url is None else trimmed(callback_url),
            idempotency_key=idempotency_key,
            idempotency_hash=digest,
        )


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_parameter", message, param=param)


def with_inputs(body: JSON, named: list[str]) -> JSON:
    """The fields of the body that name input images, with these names."""
    count = len(body.get("image_urls") or ())
    links, mask = named[:count], named[count:]
    return ({"image_urls": links} if links else {}) | ({"mask_url": mask[0]} if mask else {})


def _replayed(task_id: str, stored_digest: str | None, digest: str) -> str:
    if stored_digest != digest:
        raise ApiError(
            409,
            "idempotency_conflict",
            "this Idempotency-Key was used with another body",
            param="Idempotency-Key",
            task_id=task_id,
        )
    log.info("task.queued", task_id=task_id, replayed=True)
    return task_id


# --- the row


@dataclass(frozen=True, slots=True)
class Inserted:
    """`created` False: an earlier task of the owner has this idempotency key. Its body has the hash
    `idempotency_hash`.
    """

    task_id: str
    created: bool
    idempotency_hash: str | None
    refusal: BudgetRefusal | None = None  # nothing was inserted


_MORE = (HAS_BUDGET, task_queries.EARLIER.exists())


def insert_tasks(
    tx: Transaction, items: Sequence[TaskRow], *, unpriced: bool = False
) -> list[Inserted]:
    """Inserts tasks as `queued`, and reserves their estimates. A second run after a lost commit,
    and a key that exists, find the first row.
    """
    owners = {item.owner for item in items}
    keys = [(item.owner, item.idempotency_key) for item in items if item.idempotency_key]
    ids, names = [item.id for item in items], [key for _, key in keys]
    given = {"ids": ids, "keys": keys, "owners": list(owners), "names": names}
    limited, repeat = (queue := FairQueue(tx, owners, _MORE, given)).found
    check = BudgetCheck(tx, owners if limited else (), unpriced=unpriced)  # locks first
    existing = _existing(tx, given) if repeat or limited else {}  # also of who held a budget's lock
    results = []
    for item in items:
        key = (item.owner, item.idempotency_key)
        earlier = existing.get(item.id) or (existing.get(key) if item.idempotency_key else None)
        if earlier is None and (refusal := check.admit(item)) is not None:
            earlier = Inserted(item.id, False, None, refusal)
        elif earlier is None:
            earlier = existing[item.id] = Inserted(item.id, True, item.idempotency_hash)
            existing[key] = Inserted(item.id, False, item.idempotency_hash)
            item.created_at, item.submit_turn = tx.now, queue.next_turn(item.owner)
            columns = {name: getattr(item, name) for name in TaskRow.__slots__}
            lease = leases.enqueue(tx, "submit", item.id, item, behind=queue.behind)
            tx.insert(tasks, columns | lease)
            tx.step(item.id, "task.queued", model=item.model)
            entered(tx, item, new=True)
        results.append(earlier)
    return results


insert_also_unpriced = partial(insert_tasks, unpriced=True)


def _existing(tx: Transaction, given: Mapping[str, Any]) -> dict[Any, Inserted]:
    existing: dict[Any, Inserted] = {}
    for id, owner, key, digest in run(tx.connection, task_queries.EARLIER, given):
        existing[id], existing[owner, key] = Inserted(id, True, digest), Inserted(id, False, digest)
    return existing
