"""Taking a client's submission: checked before money is spent, committed as `queued`, answered when
its first outcome is known.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import structlog

from service.errors import ApiError, EgressRefused, NotConnected
from service.events.secrets import stored_secret
from service.ids import PREFIXES
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.signing import canonical_json, new_secret
from service.strict_json import JSON
from service.tasks import task_queries
from service.tasks.new_tasks import NewTask, insert_tasks
from service.tasks.owner_keys import NewOwner, insert_owners
from service.tasks.rows import ImageRow, TaskRow
from service.tasks.state import State
from service.upstreams.catalogue import Catalogue

log = structlog.get_logger()

OURS = ("callback_url", "metadata")
METADATA_PAIRS, METADATA_BYTES = 16, 2048
MODEL_CHARS = 200
LOOK_S = 1.0  # what another process did is seen within this


@dataclass(frozen=True, slots=True)
class Intake:
    """What taking a submission needs to know. `callback_prefix` None: no callback_url is sent
    upstream.
    """

    resources: Resources
    catalogue: Catalogue
    callback_prefix: str | None
    min_free_bytes: int
    log_prompts: bool

    async def accept(
        self, owner: str, body: JSON, idempotency_key: str | None, *, admin: bool = False
    ) -> tuple[str, bool]:
        """The task's id, durable, and whether it was there before. Raises ApiError 400, 409,
        503.
        """
        digest = hashlib.sha256(canonical_json(body)).hexdigest()
        if idempotency_key is not None:
            known = await self.resources.store.read(
                task_queries.task_by_key, owner, idempotency_key
            )
            if known is not None:
                return self._replayed(known["id"], known["idempotency_hash"], digest), True
        await self._check(owner, body)
        upstream_body = await self._translated(
            owner, {name: value for name, value in body.items() if name not in OURS}, admin=admin
        )
        free = await self.resources.blobs.free_bytes()
        if free is not None and free < self.min_free_bytes:
            raise ApiError(
                503, "no_space", "there is too little space left for new images", retry_after=60
            )
        task = self._task(owner, body, upstream_body, idempotency_key, digest)
        checkpoint("submit.checked")
        inserted = await self.resources.store.write(insert_tasks, task)
        checkpoint("submit.inserted")
        if not inserted.created:
            return self._replayed(inserted.task_id, inserted.idempotency_hash, digest), True
        prompt = {"prompt": task.prompt} if self.log_prompts else {}
        log.info(
            "task.queued", owner=owner, task_id=task.id, model=task.model, replayed=False, **prompt
        )
        return task.id, False

    def _replayed(self, task_id: str, known: str | None, digest: str) -> str:
        if known != digest:
            raise ApiError(
                409,
                "idempotency_conflict",
                "this Idempotency-Key was used with another body",
                param="Idempotency-Key",
                task_id=task_id,
            )
        log.info("task.queued", task_id=task_id, replayed=True)
        return task_id

    async def _check(self, owner: str, body: JSON) -> None:
        name = body.get("model")
        if not isinstance(name, str) or not 0 < len(name) <= MODEL_CHARS:
            raise ApiError(
                400,
                "invalid_request",
                f"model must be text of 1 to {MODEL_CHARS} characters",
                param="model",
            )
        check_metadata(body.get("metadata"))
        violation = self.catalogue.check(body)
        if violation is not None:
            raise ApiError(400, "invalid_parameter", violation.message, param=violation.param)
        url = body.get("callback_url")
        if url is not None:
            if not isinstance(url, str):
                raise ApiError(
                    400, "invalid_parameter", "callback_url must be text", param="callback_url"
                )
            try:
                with suppress(NotConnected):  # a name that does not resolve now may do so later
                    await self.resources.task_callbacks.check(url)
            except EgressRefused as error:
                raise ApiError(
                    400, "invalid_parameter", f"callback_url: {error}", param="callback_url"
                ) from error
            if (
                await self.resources.store.read(stored_secret, "owners", owner) is None
            ):  # as with DARKROOM_ADMIN_KEY alone
                secret = self.resources.keyring.encrypt(new_secret(os.urandom(32)))
                await self.resources.store.write(insert_owners, NewOwner(owner, secret))

    async def _translated(self, owner: str, body: JSON, *, admin: bool) -> JSON:
        """The body with an id of ours in `model_params.task_id` as the upstream's. It names a task
        of the owner's, by either id; only an admin may name any that is the upstream's: all owners
        share one account there. Raises ApiError 400, 409.
        """
        parameters = body.get("model_params")
        named = parameters.get("task_id") if isinstance(parameters, dict) else None
        if not isinstance(named, str):
            return body
        row = await self.resources.store.read(
            task_queries.task_row, named, None if admin else owner
        )
        if row is None and admin and not named.startswith(PREFIXES["task"]):
            return body  # from before us or from elsewhere
        param = "model_params.task_id"
        if row is None or (row.upstream_id is None and row.terminal):
            raise ApiError(
                400, "invalid_parameter", f"{param} names no submitted task of yours", param=param
            )
        if row.upstream_id is None:
            raise ApiError(
                409,
                "task_not_submitted",
                f"{param} names a task that the upstream does not have yet",
                param=param,
            )
        return {**body, "model_params": {**body["model_params"], "task_id": row.upstream_id}}

    def _task(
        self, owner: str, body: JSON, upstream_body: JSON, idempotency_key: str | None, digest: str
    ) -> NewTask:
        task_id, upstream = self.resources.id("task"), self.resources.upstream.name
        if self.callback_prefix is not None:
            token = self.resources.keyring.callback_token(upstream, task_id)
            upstream_body = {
                **upstream_body,
                "callback_url": f"{self.callback_prefix}/callbacks/{upstream}/{task_id}/{token}",
            }
        prompt = body.get("prompt")
        return NewTask(
            id=task_id,
            owner=owner,
            upstream=upstream,
            model=body["model"],
            prompt=prompt if isinstance(prompt, str) else None,
            request={
                name: value
                for name, value in body.items()
                if name not in ("prompt", "model", *OURS)
            },
            metadata=body.get("metadata") or {},
            body=json.dumps(upstream_body, ensure_ascii=False, separators=(",", ":")).encode(),
            callback_url=body.get("callback_url"),
            idempotency_key=idempotency_key,
            idempotency_hash=digest,
        )


def check_metadata(metadata: object) -> None:
    """Up to 16 pairs of text, 2 KiB in all (contract section 3)."""
    if metadata is None:
        return
    if not isinstance(metadata, Mapping) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ApiError(
            400, "invalid_parameter", "metadata must be an object of texts", param="metadata"
        )
    if len(metadata) > METADATA_PAIRS:
        raise ApiError(
            400,
            "invalid_parameter",
            f"metadata has at most {METADATA_PAIRS} pairs",
            param="metadata",
        )
    if (
        sum(len(name.encode()) + len(value.encode()) for name, value in metadata.items())
        > METADATA_BYTES
    ):
        raise ApiError(
            400,
            "invalid_parameter",
            f"metadata has at most {METADATA_BYTES} bytes",
            param="metadata",
        )


def attempted(row: TaskRow) -> bool:
    """Whether the first submission has an outcome."""
    return row.submit_outcomes > 0 or row.state not in (State.QUEUED, State.SUBMITTING)


def ended(row: TaskRow) -> bool:
    return row.terminal


async def wait_for(
    resources: Resources, task_id: str, done: Callable[[TaskRow], bool], seconds: float
) -> tuple[TaskRow, list[ImageRow]]:
    """The task once `done` says so, or as it is after the time or when the process stops."""
    signals = resources.store.signals
    clock = asyncio.get_running_loop().time
    deadline = clock() + seconds
    with signals.listen(task_id) as changed:
        while True:
            changed.clear()
            found = await resources.store.read(task_queries.task, task_id, None)
            if found is None:
                raise ApiError(404, "task_not_found", "the task was deleted meanwhile")
            left = deadline - clock()
            if done(found[0]) or left <= 0 or signals.stopping:
                return found
            await signals.wait(changed, min(left, LOOK_S))
