"""Levers of operators: the pause of submission, acts on many tasks, and the audit of all acts."""

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.db import operator_tables
from service.errors import invalid_request
from service.strict_json import JSON
from service.tasks.audit import entry_document
from service.tasks.bulk import MOST, BulkPage, BulkResult, TaskFilter, act_on_pages, count_tasks
from service.tasks.pause import PauseChange, change_pause, pause_document
from service.web.acts import perform
from service.web.auth import caller_of
from service.web.bodies import filter_of, query_owner, query_text, read_model
from service.web.context import context_of, resources_of
from service.web.list_page import numbered_list
from service.web.operator_schemas import (
    BulkAct,
    BulkBody,
    BulkDone,
    BulkResolution,
    Examination,
    RecordedActList,
    SubmissionChange,
    SubmissionState,
)
from service.web.parameters import ACT_ID
from service.web.routes.operation import row


async def submission(request: Request) -> Response:
    """Show whether submission is paused."""
    return JSONResponse(await resources_of(request).store.read(pause_document))


async def set_submission(request: Request) -> Response:
    """Pause or resume submission."""
    body = await read_model(request, SubmissionChange)
    change = PauseChange(body.paused, body.reason, caller_of(request).key)
    action = "submission.pause" if body.paused else "submission.resume"

    def judge(result: tuple[object, bool]) -> tuple[str, None]:
        return "done" if result[1] else "unchanged", None

    await perform(request, action, None, change_pause, change, judge, reason=body.reason)
    await context_of(request).pause.look()
    return await submission(request)


async def doctor(request: Request) -> Response:
    """Check the set-up, and say how to mend what is wrong."""
    return JSONResponse(await context_of(request).doctor())


async def audit(request: Request) -> Response:
    """List the acts of operators and owners, oldest first."""
    where = {name: query_text(request, name) for name in ("action", "target")}
    where["owner"] = query_owner(request)
    return await numbered_list(request, operator_tables.audit, ACT_ID, entry_document, **where)


async def reconcile(request: Request) -> Response:
    """Query the upstream about the tasks that match a filter, and retry their downloads, or count
    them.
    """
    return await _act(request, "reconcile", await read_model(request, BulkAct))


async def requeue(request: Request) -> Response:
    """Put the dead-lettered queries and downloads of the tasks that match a filter back into their
    queues, or count the tasks.
    """
    return await _act(request, "requeue", await read_model(request, BulkAct))


async def resolve(request: Request) -> Response:
    """Settle the uncertain submissions that match a filter by hand, or count them."""
    body = await read_model(request, BulkResolution)
    return await _act(request, "resolve", body, resubmit=body.decision == "resubmit")


async def _act(request: Request, act: str, body: BulkBody, *, resubmit: bool = False) -> Response:
    """Acts in pages. If the process dies in between, the same request goes on with the rest."""
    store, chosen = resources_of(request).store, TaskFilter(**filter_of(body.filter))
    count = await store.read(count_tasks, act, chosen)
    if count > MOST:
        message = f"filter: an act has at most {MOST} tasks, and more match: narrow it"
        raise invalid_request(message, "filter")
    if body.dry_run:
        return JSONResponse({"count": count, "done": None})
    given = body.filter.model_dump(mode="json", exclude_none=True)
    detail: JSON = {"filter": given, **({"resubmit": resubmit} if act == "resolve" else {})}
    page = partial(BulkPage, act, chosen, until=store.clock(), resubmit=resubmit)
    change = partial(perform, request, f"tasks.{act}", None, act_on_pages)
    done, after = 0, (0, "")
    while True:
        result: BulkResult = await change(
            page(after=after), judged, reason=body.reason, detail=detail
        )
        done += result.done
        if result.last is None:
            return JSONResponse({"count": count, "done": done})
        after = result.last


def judged(result: BulkResult) -> tuple[str, JSON]:
    return "done", {"done": result.done, "refused": result.refused}


OPERATIONS = (
    row("POST /v1/bulk/reconcile", reconcile, "admin", BulkDone, BulkAct),
    row("POST /v1/bulk/requeue", requeue, "admin", BulkDone, BulkAct),
    row("POST /v1/bulk/resolve", resolve, "admin", BulkDone, BulkResolution),
    row("GET /v1/submission", submission, "admin", SubmissionState),
    row("POST /v1/submission", set_submission, "admin", SubmissionState, SubmissionChange),
    row("GET /v1/doctor", doctor, "admin", Examination),
    row("GET /v1/audit?owner&action&target&after&limit", audit, "admin", RecordedActList),
)
