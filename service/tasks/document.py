"""The task as its owner and events see it."""

from dataclasses import dataclass, field

from service.credits import credits_number
from service.strict_json import JSON
from service.tasks.state import TERMINAL, State, status_of
from service.upstreams.base import Status


@dataclass(frozen=True, slots=True)
class Image:
    """One stored result."""

    id: str
    index: int
    blob: str
    media_type: str
    bytes: int
    sha256: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Task:
    """What is shown of a task to its owner and in events."""

    id: str
    owner: str
    created_at: int
    model: str
    state: State
    upstream: str
    upstream_id: str | None = None
    upstream_status: Status | None = None
    progress: int = 0
    can_cancel: bool = True
    estimated_time: int | None = None
    billing_rule: str | None = None
    user_group: str | None = None
    credits_reserved: int | None = None
    credits_used: int | None = None
    error: JSON | None = None
    metadata: JSON = field(default_factory=dict)
    request: JSON = field(default_factory=dict)
    prompt: str | None = None
    images: tuple[Image, ...] = ()

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


def task_document(task: Task) -> JSON:
    """The task of contract section 3 without its prompt and without links: `results` is empty,
    images have no `url`.

    This is what an event keeps; `with_links` completes it for a reader, so that links follow the
    settings.
    """
    return {
        "id": task.id,
        "object": "image.generation.task",
        "created": task.created_at // 1000,
        "model": task.model,
        "type": "image",
        "status": status_of(task.state, task.upstream_status).value,
        "progress": 100 if task.state is State.COMPLETED else task.progress,
        "task_info": {
            "can_cancel": task.can_cancel and not task.terminal,
            "estimated_time": task.estimated_time,
        },
        "usage": {
            "billing_rule": task.billing_rule,
            "credits_reserved": credits_number(task.credits_reserved),
            "credits_used": credits_number(task.credits_used),
            "user_group": task.user_group,
        },
        "results": [],
        "error": task.error,
        "state": task.state.value,
        "upstream": task.upstream,
        "upstream_id": task.upstream_id,
        "metadata": task.metadata,
        "request": task.request,
        "images": [
            {
                "id": image.id,
                "index": image.index,
                "url": None,
                "media_type": image.media_type,
                "bytes": image.bytes,
                "sha256": image.sha256,
                "width": image.width,
                "height": image.height,
            }
            for image in task.images
        ],
    }
