"""Deliveries: failures by endpoint and cause, attempts with request and response, replays."""

import shlex
from datetime import datetime, timedelta
from typing import Any

from starlette.responses import Response

from service.errors import ApiError
from service.strict_json import JSON
from service.web.console.pages.tasks_page import PERIOD, chosen, optional, pretty
from service.web.console.templating import link
from service.web.console.visits import View, Visit

LIST, REPLAY = "/console/deliveries", "/console/deliveries/replays"
PAGE, CURL, ANSWER, ATTEMPTS = 30, 16_000, 1000, 20
CHOICE = ("endpoint", "state", "error", "status", "since", "until")
FIELDS: tuple[dict[str, Any], ...] = (
    {"name": "endpoint", "label": "Endpoint", "placeholder": "ep_…"},
    {"name": "state", "label": "State", "options": ("pending", "delivered", "dead")},
    {"name": "error", "label": "Cause", "placeholder": "answered 503"},
    {"name": "status", "label": "HTTP status", "placeholder": "503"},
    *PERIOD,
)


def choice_of(values: dict[str, str]) -> JSON:
    """The filter of a replay, from a query or a form. Raises ApiError 400 from the API."""
    choice = chosen(CHOICE, values)
    if choice.get("status", "").isdigit():
        choice["status"] = int(choice["status"])
    return choice


def what(choice: JSON) -> str:
    return str(choice.get("state", "failed"))


async def count_of(visit: Visit, choice: JSON) -> int:
    body = {"filter": choice, "dry_run": True}
    count: int = (await visit.call("POST /v1/replays", body=body))["count"]
    return count


async def deliveries(visit: Visit) -> Response:
    query, error, count = visit.query, None, 0
    choice = choice_of(query)
    filters = {name: choice.get(name) for name in CHOICE}
    filters |= {name: query.get(name) for name in ("task", "event", "cursor")}
    part, page = visit.fragment, JSON(data=[], next_cursor=None)
    try:
        if part in (None, "list"):
            page = await visit.call("GET /v1/deliveries", {**filters, "limit": PAGE})
        if part in (None, "again") and not filters["task"] and not filters["event"]:
            count = await count_of(visit, choice)
    except ApiError as refused:
        error = refused
    return visit.render(
        "deliveries.html",
        groups=(await optional(visit, "GET /v1/deliveries/groups"))[:20]
        if part in (None, "groups")
        else [],
        page=page,
        count=count,
        what=what(choice),
        ask=link(f"{REPLAY}/new", {name: query.get(name) for name in CHOICE}),
        fields=FIELDS,
        error=error,
    )


async def delivery(visit: Visit) -> Response:
    id = visit.path("delivery_id")
    delivery = await visit.call("GET /v1/deliveries/{delivery_id}", delivery_id=id)
    try:
        sent = await visit.call("GET /v1/deliveries/{delivery_id}/request", delivery_id=id)
    except ApiError:
        sent = None
    attempts = [
        {**each, "sent": started(each), "answer": (each["answer"] or "")[:ANSWER]}
        for each in reversed(delivery["attempts"][-ATTEMPTS:])
    ]
    return visit.render(
        "delivery.html",
        delivery=delivery,
        attempts=attempts,
        sent=sent and {**sent, "body": pretty(sent["body"])},
        curl=curl_of(sent),
    )


def started(attempt: JSON) -> str:
    """When the request of an attempt was sent: its time is that of the response."""
    time = datetime.fromisoformat(attempt["time"])
    begin = time - timedelta(milliseconds=attempt["duration_ms"])
    return begin.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def curl_of(sent: JSON | None) -> str | None:
    """A command that sends the request, unless the body is long."""
    if sent is None or len(sent["body"]) > CURL:
        return None
    headers = " ".join(f"-H {shlex.quote(f'{n}: {v}')}" for n, v in sent["headers"].items())
    body = shlex.quote(sent["body"])
    return f"curl -X POST {headers} --data-binary {body} {shlex.quote(sent['url'])}"


async def retry(visit: Visit) -> Response:
    id = visit.path("delivery_id")
    path = f"{LIST}/{id}"
    try:
        done = await visit.call("POST /v1/deliveries/{delivery_id}/retry", delivery_id=id)
    except ApiError as error:
        return visit.redirect(path, str(error), "bad")
    last = done["attempts"][-1] if done["attempts"] else {"error": "no attempt", "status": None}
    if last["error"] is None:
        return visit.redirect(path, f"Delivered: the endpoint answered {last['status']}.")
    return visit.redirect(path, f"The attempt failed: {last['error']}", "bad")


async def ask_replay(visit: Visit) -> Response:
    choice = choice_of(visit.query)
    count = await count_of(visit, choice)
    return visit.render("replay_new.html", choice=choice, count=count, what=what(choice))


async def start_replay(visit: Visit) -> Response:
    choice = choice_of({name: visit.form.get(name) for name in CHOICE})
    try:
        started = await visit.call("POST /v1/replays", body={"filter": choice})
    except ApiError as error:
        return visit.redirect(link(LIST, choice), str(error), "bad")
    return visit.redirect(
        f"{REPLAY}/{started['id']}", f"{started['count']} deliveries are sent again."
    )


async def replay(visit: Visit) -> Response:
    replay = await visit.call("GET /v1/replays/{replay_id}", replay_id=visit.path("replay_id"))
    return visit.render("replay.html", replay=replay)


async def cancel_replay(visit: Visit) -> Response:
    id = visit.path("replay_id")
    await visit.call("DELETE /v1/replays/{replay_id}", replay_id=id)
    return visit.redirect(f"{REPLAY}/{id}", "The replay is cancelled. What has arrived stays.")


VIEWS = (
    View(f"GET {LIST}", deliveries, "subscribe", "Deliveries", "deliveries"),
    View(f"GET {REPLAY}/new", ask_replay, "subscribe"),
    View(f"POST {REPLAY}/new", start_replay, "subscribe"),
    View(f"GET {REPLAY}/{{replay_id}}", replay, "subscribe"),
    View(f"POST {REPLAY}/{{replay_id}}/cancel", cancel_replay, "subscribe"),
    View(f"GET {LIST}/{{delivery_id}}", delivery, "subscribe"),
    View(f"POST {LIST}/{{delivery_id}}/retry", retry, "subscribe"),
)
