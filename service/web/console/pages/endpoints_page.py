"""Endpoints: their health, and everything that their owner does with them."""

import json

from starlette.responses import Response

from service.errors import ApiError, invalid_request
from service.strict_json import JSON
from service.web.console.submission_form import number_of
from service.web.console.visits import View, Visit
from service.web.event_schemas import EVENT_TYPES, TEST_TYPE

LIST = "/console/endpoints"
ONE = f"{LIST}/{{endpoint_id}}"
API = "/v1/endpoints/{endpoint_id}"
PAGE = 10
FIELDS, ALL_TASKS = ("url", "types", "description"), "image.task.*"
LINES = ("metadata", "headers")  # NAME=VALUE, one in a line
MORE = ("ordered", "ordered_by", "rate_per_s", *LINES)
# The acts. Each has its label, the question, what will happen, what was done.
ACTS = {
    "pause": (
        "Pause",
        "Pause this endpoint?",
        "New deliveries are kept and wait. Nothing is lost. They are sent when you enable it.",
        "The endpoint is paused.",
    ),
    "enable": (
        "Enable",
        "Enable this endpoint?",
        "Waiting deliveries are sent now. Then you see what it missed while it was disabled.",
        "The endpoint is enabled.",
    ),
    "rotate": (
        "Rotate secret",
        "Make a new secret?",
        "The new secret is shown once. Both secrets sign for 24 hours, so that no delivery fails.",
        "",
    ),
    "delete": (
        "Delete",
        "Delete this endpoint?",
        "Its pending deliveries are not sent any more, and its secret is gone. Events stay.",
        "The endpoint is deleted.",
    ),
}
SAMPLE: JSON = {
    "id": "task_sample",
    "status": "completed",
    "state": "completed",
    "model": "wan2.5-text-to-image",
    "results": ["https://example.com/picture.png"],
    "metadata": {"order": "42"},
}


async def with_health(visit: Visit, endpoint: JSON) -> JSON:
    return endpoint | {"health": await visit.call(f"GET {API}/health", endpoint_id=endpoint["id"])}


async def endpoints(visit: Visit) -> Response:
    query = {"cursor": visit.query.get("cursor"), "limit": PAGE}
    page = await visit.call("GET /v1/endpoints", query)
    shown = [await with_health(visit, each) for each in page["data"]]
    return visit.render("endpoints.html", endpoints=shown, cursor=page["next_cursor"])


async def endpoint(visit: Visit) -> Response:
    endpoint = await visit.call(f"GET {API}", endpoint_id=visit.path("endpoint_id"))
    first = "pause" if endpoint["status"] == "enabled" else "enable"
    acts = [(name, ACTS[name][0]) for name in (first, "rotate", "delete")]
    return visit.render("endpoint.html", endpoint=await with_health(visit, endpoint), acts=acts)


async def new(visit: Visit, error: ApiError | None = None) -> Response:
    given = {name: visit.form.get(name) for name in FIELDS + MORE}
    given["types"] = given["types"] or ALL_TASKS
    return visit.render("endpoint_new.html", given=given, error=error)


def body_of(visit: Visit) -> JSON:
    types = visit.form.get("types").replace(",", " ").split() or [ALL_TASKS]
    rate = visit.form.get("rate_per_s")
    return {
        **{name: visit.form.get(name) for name in FIELDS},
        **{name: pairs_of(name, visit.form.get(name)) for name in LINES},
        "types": types,
        "ordered": visit.form.get("ordered") == "on",
        "ordered_by": visit.form.get("ordered_by") or None,
        "rate_per_s": number_of("rate_per_s", rate, whole=False) if rate else None,
    }


def pairs_of(name: str, text: str) -> dict[str, str]:
    pairs = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise invalid_request(f"{name}: {line[:40]!r} is not NAME=VALUE", name)
        pairs[key.strip()] = value.strip()
    return pairs


async def create(visit: Visit) -> Response:
    try:
        endpoint = await visit.call("POST /v1/endpoints", body=body_of(visit))
    except ApiError as error:
        return await new(visit, error)
    return visit.render("endpoint_secret.html", 201, endpoint=endpoint, rotated=False)


async def edit(visit: Visit, error: ApiError | None = None) -> Response:
    endpoint = await visit.call(f"GET {API}", endpoint_id=visit.path("endpoint_id"))
    given = {**endpoint, "types": " ".join(endpoint["types"])}
    for name in LINES:
        given[name] = "\n".join(f"{key}={value}" for key, value in (endpoint[name] or {}).items())
    if error:
        given |= {name: visit.form.get(name) for name in FIELDS + MORE}
    return visit.render("endpoint_edit.html", given=given, error=error, endpoint=endpoint)


async def change(visit: Visit) -> Response:
    id = visit.path("endpoint_id")
    endpoint = await visit.call(f"GET {API}", endpoint_id=id)
    try:
        body = body_of(visit)
        if endpoint["headers"] is None and not body["headers"]:
            del body["headers"]  # the form cannot show them, and keeps them
        await visit.call(f"PATCH {API}", body=body, endpoint_id=id)
    except ApiError as error:
        return await edit(visit, error)
    return visit.redirect(f"{LIST}/{id}", "The endpoint is changed.")


async def ask(visit: Visit) -> Response:
    name, texts = visit.act(ACTS)
    endpoint = await visit.call(f"GET {API}", endpoint_id=visit.path("endpoint_id"))
    return visit.render("endpoint_act.html", endpoint=endpoint, name=name, act=texts)


async def act(visit: Visit) -> Response:
    id, (name, texts) = visit.path("endpoint_id"), visit.act(ACTS)
    if name == "rotate":
        endpoint = await visit.call(f"POST {API}/rotate", endpoint_id=id)
        return visit.render("endpoint_secret.html", endpoint=endpoint, rotated=True)
    if name == "delete":
        await visit.call(f"DELETE {API}", endpoint_id=id)
        return visit.redirect(LIST, texts[3])
    body = {"status": "paused" if name == "pause" else "enabled"}
    changed = await visit.call(f"PATCH {API}", body=body, endpoint_id=id)
    if changed["replay"] and changed["replay"]["count"]:
        return visit.render("endpoint_missed.html", endpoint=changed, missed=changed["replay"])
    return visit.redirect(f"{LIST}/{id}", texts[3])


async def replay_missed(visit: Visit) -> Response:
    id = visit.path("endpoint_id")
    body = {"since": visit.form.get("since")}
    replay = await visit.call(f"POST {API}/replay", body=body, endpoint_id=id)
    text = f"{replay['count']} missed events are sent."
    return visit.redirect(f"/console/deliveries/replays/{replay['id']}", text)


async def sample(visit: Visit, error: ApiError | None = None, sent: JSON | None = None) -> Response:
    endpoint = await visit.call(f"GET {API}", endpoint_id=visit.path("endpoint_id"))
    data = visit.form.get("data") or json.dumps(SAMPLE, indent=2)
    return visit.render(
        "endpoint_test.html",
        error=error,
        endpoint=endpoint,
        data=data,
        attempt=sent,
        types=(TEST_TYPE, *EVENT_TYPES),
        type=visit.form.get("type") or TEST_TYPE,
    )


async def send_sample(visit: Visit) -> Response:
    try:
        body = {"type": visit.form.get("type"), "data": json.loads(visit.form.get("data") or "{}")}
        id = visit.path("endpoint_id")
        attempt = await visit.call(f"POST {API}/test", body=body, endpoint_id=id)
    except (ValueError, RecursionError) as error:
        return await sample(visit, invalid_request(f"The sample is no JSON: {error}"))
    except ApiError as error:
        return await sample(visit, error)
    return await sample(visit, sent=attempt)


VIEWS = (
    View(f"GET {LIST}", endpoints, "subscribe", "Endpoints", "endpoints"),
    View(f"GET {LIST}/new", new, "subscribe"),
    View(f"POST {LIST}/new", create, "subscribe"),
    View(f"GET {ONE}", endpoint, "subscribe"),
    View(f"GET {ONE}/edit", edit, "subscribe"),
    View(f"POST {ONE}/edit", change, "subscribe"),
    View(f"GET {ONE}/test", sample, "subscribe"),
    View(f"POST {ONE}/test", send_sample, "subscribe"),
    View(f"POST {ONE}/missed", replay_missed, "subscribe"),
    View(f"GET {ONE}/{{act}}", ask, "subscribe"),
    View(f"POST {ONE}/{{act}}", act, "subscribe"),
)
