"""Acts of operators and owners: each has an `admin.action` line and an entry of the audit."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request

from service.db.transaction import Transaction
from service.events.secrets import Write
from service.strict_json import JSON
from service.tasks.audit import ActEntry, Judge, acted, always, nothing
from service.web.auth import caller_of
from service.web.context import resources_of


async def perform(
    request: Request,
    action: str,
    target: str | None,
    operation: Callable[[Transaction, Sequence[Any]], Sequence[Any]] = nothing,
    item: Any = None,
    judge: Judge = always,
    *,
    reason: str | None = None,
    detail: JSON | None = None,
) -> Any:
    """The operation's result. The act and its entry are one transaction. `judge`: its outcome."""
    resources, caller = resources_of(request), caller_of(request)
    who = resources.id("act"), caller.owner, caller.key
    entry = ActEntry(*who, action, target, reason, request.scope.get("request_id"), detail=detail)
    return await acted(resources.store, entry, operation, item, judge)


def performing(
    request: Request,
    action: str,
    target: str | None,
    detail: JSON | None = None,
    judge: Judge = always,
) -> Write:
    """`perform` for a function that does the writing itself."""
    return partial(perform, request, action, target, judge=judge, detail=detail)
