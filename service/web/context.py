"""What the routes share; the application's lifespan makes it and yields it as state."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from service.events.tail import Tail
from service.events.webhooks import WebhookSender
from service.resources import Resources
from service.tasks.accept import Intake
from service.tasks.account_breaker import Account
from service.web.auth import Access
from service.web.overload import Admission, KeyLimits
from service.web.precedence import Precedence


@dataclass(frozen=True, slots=True)
class Context:
    """`workers_alive` None: this process has no workers."""

    resources: Resources
    sender: WebhookSender
    intake: Intake
    tail: Tail
    precedence: Precedence
    account: Account
    access: Access
    limits: KeyLimits
    admission: Admission
    result_ttl_s: float
    sinks: Mapping[str, Sequence[str]]  # brokers by name, with the types that each gets
    sinks_failing: Callable[[], bool]  # in this process
    quiesce: Callable[[], None]  # a stop was asked for: no new work is started
    drained: Callable[
        [], Awaitable[float]
    ]  # waits for work in flight, within the stop's limit; how many seconds are left of that
    workers_alive: Callable[[], bool] | None


def context_of(request: Request) -> Context:
    context: Context = request.state.context
    return context
