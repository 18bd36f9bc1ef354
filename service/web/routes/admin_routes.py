"""What operators do to a task by hand."""

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError
from service.tasks.admin import Resolution, reconcile_tasks, resolve_tasks
from service.web import schemas
from service.web.bodies import read_json, validated
from service.web.context import context_of
from service.web.routes.task_routes import known_task, shown

log = structlog.get_logger()


async def resolve(request: Request) -> Response:
    context, (task, _) = context_of(request), await known_task(request)
    body = validated(schemas.Resolution, await read_json(request))
    resolution = Resolution(task.id, body.upstream_id, resubmit=body.decision == "resubmit")
    refused = await context.resources.store.write(resolve_tasks, resolution)
    if refused == "taken":
        raise ApiError(
            409,
            "id_taken",
            "another task has this upstream_id",
            param="upstream_id",
            task_id=task.id,
        )
    if refused is not None:
        message = (
            f"the task is {refused}: only an uncertain submission is resolved, or an id"
            " corrected that the upstream did not answer to"
        )
        raise ApiError(409, "task_not_uncertain", message, task_id=task.id)
    log.info("admin.action", action="task.resolve", subject=task.id)
    return JSONResponse(shown(context, *await known_task(request)))


async def reconcile(request: Request) -> Response:
    context, (task, _) = context_of(request), await known_task(request)
    if await context.resources.store.write(reconcile_tasks, task.id) is not None:
        raise ApiError(
            409,
            "task_not_submitted",
            "the upstream's id of the task is not known yet: nothing to ask for",
            task_id=task.id,
        )
    log.info("admin.action", action="task.reconcile", subject=task.id)
    return JSONResponse(shown(context, *await known_task(request)))
