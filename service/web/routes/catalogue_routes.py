"""The catalogue of models, and estimates of the cost of submissions."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.credits import credits_number
from service.db.paging import Selection
from service.errors import ApiError
from service.tasks.budgets import budget_states
from service.web.auth import caller_of
from service.web.bodies import validated
from service.web.context import context_of
from service.web.money_schemas import EstimatedSubmission
from service.web.routes.task_routes import read_submission, without_data


async def models(request: Request) -> Response:
    """List the models of the catalogue, with limits and prices."""
    catalogue = context_of(request).intake.catalogue
    data = [catalogue.document(name) for name in catalogue.models]
    return JSONResponse({"data": data, "next_cursor": None})


async def model(request: Request) -> Response:
    """Show a model of the catalogue."""
    name, catalogue = request.path_params["model"], context_of(request).intake.catalogue
    if name not in catalogue.models:
        raise ApiError(404, "model_not_found", "the catalogue has no model of that name")
    return JSONResponse(catalogue.document(name))


async def estimate(request: Request) -> Response:
    """Estimate the cost of a submission, without storing or sending it."""
    intake, (body, _) = context_of(request).intake, await read_submission(request)
    body = without_data(body)
    intake.check_limits(body, whole=False)
    validated(EstimatedSubmission, body)
    intake.check_own_fields(body)
    cost = intake.catalogue.estimate(body)
    resources, owner = context_of(request).resources, caller_of(request).owner
    selection, now = Selection(owner, 1), resources.store.clock()
    states = await resources.store.read(budget_states, selection, now)
    budget = states[0].figures() if states else None
    return JSONResponse(
        {
            "credits": credits_number(cost.credits),
            "unit": "credits",
            "price": credits_number(cost.price),
            "n": cost.n,
            "per": cost.per,
            "basis": "unknown" if cost.price is None else "catalogue",
            "budget": budget,
        }
    )
