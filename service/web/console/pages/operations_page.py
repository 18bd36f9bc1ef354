"""The levers of operators, each with a question first, the audit of all acts, and the doctor."""

from typing import Any

from starlette.responses import Response

from service.errors import ApiError
from service.strict_json import JSON
from service.web.console.pages.tasks_page import PERIOD, STATES, chosen
from service.web.console.visits import View, Visit

HOME = "/console/operations"
# An act in bulk: its title, and what it does.
BULK = {
    "reconcile": (
        "Reconcile",
        """The service asks the upstream about each of these tasks and fetches missing pictures
        again, also lost ones. That costs no credits.""",
    ),
    "requeue": (
        "Requeue dead letters",
        """Queries and downloads that left their queue after too many faults or crashes start
        anew. Mend the cause first.""",
    ),
    "resolve": (
        "Resolve",
        """It is not known whether the upstream accepted these submissions. Failed ends the tasks.
        Submit again may pay twice.""",
    ),
}
CHOICE = ("owner", "state", "model", "error", "since", "until")
FIELDS: tuple[dict[str, Any], ...] = (
    {"name": "owner", "label": "Owner"},
    {"name": "state", "label": "State", "options": STATES},
    {"name": "model", "label": "Model"},
    {"name": "error", "label": "Error code"},
    *PERIOD,
)
AUDIT_FIELDS: tuple[dict[str, Any], ...] = (
    {"name": "owner", "label": "Owner"},
    {"name": "action", "label": "Action", "placeholder": "task.resolve"},
    {"name": "target", "label": "Target", "placeholder": "task_…"},
)
# The colours of the doctor's findings, as those of states.
TONES = {"ok": "delivered", "warning": "paused", "fault": "dead", "skipped": "queued"}


async def operations(visit: Visit) -> Response:
    return visit.render("operations.html", state=await visit.call("GET /v1/submission"), bulk=BULK)


async def ask_pause(visit: Visit, error: ApiError | None = None) -> Response:
    state = await visit.call("GET /v1/submission")
    return visit.render("pause.html", state=state, error=error)


async def change_pause(visit: Visit) -> Response:
    paused = visit.form.get("paused") == "true"
    body = {"paused": paused, "reason": visit.form.get("reason") or None}
    try:
        await visit.call("POST /v1/submission", body=body)
    except ApiError as error:
        return await ask_pause(visit, error)
    return visit.redirect(HOME, "Submission is paused." if paused else "Submission goes on.")


async def ask_bulk(visit: Visit, error: ApiError | None = None) -> Response:
    """The number of tasks that match the filter, and the question."""
    act, (title, about) = visit.act(BULK)
    choice, count = chosen(CHOICE, visit.query or dict(visit.form.pairs)), None
    body: JSON = {"filter": choice, "dry_run": True}
    try:
        if error is None:
            count = (await send(visit, act, body | decision(act, "failed")))["count"]
    except ApiError as refused:
        error = refused
    values: JSON = {"act": act, "title": title, "about": about, "choice": choice, "count": count}
    return visit.render("bulk_act.html", error=error, fields=FIELDS, **values)


async def act_in_bulk(visit: Visit) -> Response:
    (act, (title, _)), form = visit.act(BULK), visit.form
    body: JSON = {"filter": chosen(CHOICE, dict(form.pairs)), "reason": form.get("reason") or None}
    try:
        result = await send(visit, act, body | decision(act, form.get("as")))
    except ApiError as error:
        return await ask_bulk(visit, error)
    return visit.redirect(HOME, f"{title}: {result['done']} tasks.")


def decision(act: str, word: str) -> JSON:
    return {"as": word} if act == "resolve" else {}


async def send(visit: Visit, act: str, body: JSON) -> JSON:
    return await visit.call(f"POST /v1/bulk/{act}", body=body)


async def audit(visit: Visit) -> Response:
    filters = {name: visit.query.get(name) for name in ("owner", "action", "target", "after")}
    page, error = await visit.list_of("GET /v1/audit", {**filters, "limit": 100})
    return visit.render("audit.html", error=error, page=page, fields=AUDIT_FIELDS)


async def doctor(visit: Visit) -> Response:
    """The checks run when an operator asks for them."""
    report = await visit.call("GET /v1/doctor") if visit.query.get("run") else None
    return visit.render("doctor.html", report=report, tones=TONES)


VIEWS = (
    View(f"GET {HOME}", operations, "admin", "Operations", "operations"),
    View(f"GET {HOME}/submission", ask_pause, "admin"),
    View(f"POST {HOME}/submission", change_pause, "admin"),
    View(f"GET {HOME}/bulk/{{act}}", ask_bulk, "admin"),
    View(f"POST {HOME}/bulk/{{act}}", act_in_bulk, "admin"),
    View("GET /console/audit", audit, "admin", "Audit", "audit"),
    View("GET /console/doctor", doctor, "admin", "Doctor", "doctor"),
)
