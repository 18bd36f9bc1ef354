"""The task as its owner and events see it."""

from collections.abc import Sequence

from service.credits import credits_number
from service.ids import rfc3339_or_none
from service.strict_json import JSON, compact_json
from service.tasks.rows import ImageRow, TaskRow
from service.tasks.state import State, status_of

# The fields of a request that the upstream documents, and how many bytes events keep of them and of
# all other fields. An event is sent to every subscriber and is in every page that has it.
DOCUMENTED = ("size", "n", "negative_prompt", "prompt_extend", "image_urls")
DOCUMENTED_BYTES, OTHER_BYTES = 64 << 10, 16 << 10
SHOWN = ("id", "media_type", "bytes", "sha256", "width", "height")  # of an image


def event_task(row: TaskRow, images: Sequence[ImageRow]) -> JSON:
    return {**task_document(row, images), "request": shortened(row.request)}


def shortened(request: JSON) -> JSON:
    """The request without the fields that do not fit."""
    left = {True: DOCUMENTED_BYTES, False: OTHER_BYTES}
    kept: JSON = {}
    for name, value in request.items():
        documented, size = name in DOCUMENTED, len(compact_json({name: value}).encode())
        if size <= left[documented]:
            left[documented] -= size
            kept[name] = value
    return kept


def task_document(row: TaskRow, images: Sequence[ImageRow] = ()) -> JSON:
    """The task of docs/api.md, without its prompt and without links: `results` is empty and images
    have no `url`.

    `with_links` completes it for a reader, so that links follow the settings.
    """
    return {
        "id": row.id,
        "owner": row.owner,
        "object": "image.generation.task",
        "created": row.created_at // 1000,
        "ended_at": rfc3339_or_none(row.terminal_at),
        "erased_at": rfc3339_or_none(row.erased_at),
        "model": row.model,
        "type": "image",
        "status": status_of(row.state, row.upstream_status).value,
        "progress": 100 if row.state is State.COMPLETED else row.progress,
        "task_info": {
            "can_cancel": row.can_cancel and not row.terminal,
            "estimated_time": row.estimated_time,
        },
        "usage": {
            "billing_rule": row.billing_rule,
            "credits_reserved": credits_number(row.credits_reserved),
            "credits_used": credits_number(row.credits_used),
            "user_group": row.user_group,
        },
        "results": [],
        "error": row.error,
        "state": row.state.value,
        "upstream": row.upstream,
        "upstream_id": row.upstream_id,
        "metadata": row.metadata,
        "request": row.request,
        "warnings": row.warnings or [],
        "inputs": row.inputs or [],
        "images": [
            {"index": image.position, "url": None, **{name: getattr(image, name) for name in SHOWN}}
            for image in images
        ],
    }
