"""The objects that all routes share. The application's lifespan yields them as state."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from service.events.tail import Tail
from service.events.webhooks import WebhookSender
from service.images.input_files import InputFiles
from service.queue.stopping import Stopping
from service.recent_look import RecentLook
from service.resources import Resources
from service.strict_json import JSON
from service.tasks.accept import TaskIntake
from service.tasks.account_breaker import AccountBreaker
from service.tasks.inbox_worker import InboxWorker
from service.tasks.pause import PauseWatch
from service.web.auth import Access
from service.web.key_limits import KeyLimits
from service.web.overload import LoadShedder, PriorityGate


@dataclass(frozen=True, slots=True)
class Context:
    """`sinks`: brokers by name with their event types. `workers_alive` None: the process has no
    workers, and `workers_missing` looks for those of other processes.
    """

    resources: Resources
    sender: WebhookSender
    intake: TaskIntake
    files: InputFiles
    tail: Tail
    gate: PriorityGate
    breaker: AccountBreaker
    pause: PauseWatch
    access: Access
    limits: KeyLimits
    shedder: LoadShedder
    readiness: RecentLook[tuple[str, list[str]]]
    inbox: InboxWorker
    max_endpoints: int  # of one owner
    sinks: Mapping[str, Sequence[str]]
    sinks_failing: Callable[[], bool]
    stopping: Stopping
    doctor: Callable[[], Awaitable[JSON]]
    workers_alive: Callable[[], bool] | None
    workers_missing: Callable[[], Awaitable[bool]] | None


def context_of(request: Request) -> Context:
    context: Context = request.state.context
    return context


def resources_of(request: Request) -> Resources:
    return context_of(request).resources
