"""Operators' actions on a task."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError
from service.tasks.admin import TaskResolution, reconcile_tasks, resolve_tasks
from service.tasks.audit import unless_refused
from service.web.acts import perform
from service.web.bodies import read_model
from service.web.routes.task_routes import known_task, shown
from service.web.task_schemas import Resolution


async def resolve(request: Request) -> Response:
    """Settle an uncertain submission by hand."""
    task, _ = await known_task(request)
    body = await read_model(request, Resolution)
    resolution = TaskResolution(task.id, body.upstream_id, resubmit=body.decision == "resubmit")
    act = "task.resolve", task.id, resolve_tasks, resolution, unless_refused
    refused = await perform(request, *act)
    if refused == "taken":
        message, param = "another task has this upstream_id", "upstream_id"
        raise ApiError(409, "id_taken", message, param=param, task_id=task.id)
    if refused is not None:
        message = (
            f"the task is {refused}: only an uncertain submission is resolved, or an id"
            " corrected that the upstream did not answer to"
        )
        raise ApiError(409, "task_not_uncertain", message, task_id=task.id)
    return JSONResponse(shown(request, *await known_task(request)))


async def reconcile(request: Request) -> Response:
    """Query the upstream and retry downloads now."""
    task, _ = await known_task(request)
    act = "task.reconcile", task.id, reconcile_tasks, task.id, unless_refused
    if await perform(request, *act) is not None:
        message = "the upstream's id of the task is not known yet: nothing to ask for"
        raise ApiError(409, "task_not_submitted", message, task_id=task.id)
    return JSONResponse(shown(request, *await known_task(request)))
