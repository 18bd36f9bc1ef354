"""The playground: a form for a task, its cost, its result, and the last tasks of one's own."""

import json
import pprint
import re
import secrets
import shlex
from typing import Any

from starlette.responses import Response

from service.errors import ApiError, invalid_request
from service.images.downloads import shown_image
from service.images.input_sources import FILE_ID, IMAGE_ID
from service.strict_json import JSON
from service.web.console.submission_form import CUSTOM, Draft, body_of, field_of, others, presets
from service.web.console.visits import View, Visit
from service.web.context import context_of

HERE = "/console/playground"
LAST, PICKS = 20, 12
RUNNING = ("queued", "submitting", "uncertain", "submitted", "storing")


async def playground(visit: Visit) -> Response:
    """The form, with the request of the task `from` or `task`, or a picture as its reference."""
    task = await known_task(visit, visit.query.get("task"))
    earlier = await known_task(visit, visit.query.get("from")) or task
    documents = models(visit)
    draft = Draft.of_task(earlier) if earlier else Draft(next(iter(documents)))
    draft.model = visit.query.get("model", draft.model)
    if reference := visit.query.get("reference"):
        draft.images.append(reference)
        if not takes_images(documents.get(draft.model)):
            draft.model = next(name for name, each in documents.items() if takes_images(each))
    return await form_page(visit, draft, task=task)


async def act(visit: Visit) -> Response:
    """Sends the form, or changes its references, or only checks it."""
    draft, (deed, _, what) = Draft.of_form(visit.form), visit.form.get("act").partition(":")
    key = visit.form.get("idempotency_key") or new_key()
    error = next(iter(visit.form.refused), None)
    if added := visit.form.get("image_link"):
        draft.images.append(added)
    if deed in ("up", "down", "remove") and what.isdecimal():
        if deed == "remove":
            draft.images[int(what) : int(what) + 1] = []
        else:
            draft.move(int(what), 1 if deed == "down" else -1)
    elif deed == "add" and what:
        draft.images.append(what)
    elif deed == "send" and error is None:
        try:
            return sent(visit, await send(visit, draft, key))
        except ApiError as refusal:
            error, key = refusal, new_key()
    return await form_page(
        visit,
        draft,
        key=key,
        error=error,
        status=error.status if error and not visit.fragment else 200,
    )


async def again(visit: Visit) -> Response:
    earlier = await visit.call("GET /v1/tasks/{task_id}", task_id=visit.form.get("task"))
    if earlier["prompt"] is None:
        return visit.redirect(HERE, "The prompt of that task is no longer kept.", "bad")
    try:
        task = await send(visit, Draft.of_task(earlier), visit.form.get("idempotency_key"))
    except ApiError as error:
        return visit.redirect(f"{HERE}?from={earlier['id']}", error.message, "bad")
    return visit.redirect(f"{HERE}?task={task['id']}")


def sent(visit: Visit, task: JSON) -> Response:
    if may_read(visit):
        return visit.redirect(f"{HERE}?task={task['id']}")
    return visit.redirect(HERE, f"{task['id']} was sent. A key with the scope read shows it.")


def may_read(visit: Visit) -> bool:
    """Without the scope, a key sends tasks and sees none."""
    return visit.caller.has({"read"})


async def send(visit: Visit, draft: Draft, key: str) -> JSON:
    """The accepted task. Raises ApiError."""
    document = models(visit).get(draft.model)
    if document is None:
        raise invalid_request(f"model: the catalogue has no model {draft.model[:100]!r}", "model")
    headers, body = {"idempotency-key": key}, body_of(draft, document)
    return await visit.call("POST /v1/images/generations", body=body, headers=headers)


async def form_page(
    visit: Visit,
    draft: Draft,
    *,
    task: JSON | None = None,
    key: str = "",
    error: ApiError | None = None,
    status: int = 200,
) -> Response:
    documents, body, cost = models(visit), dict[str, Any](), None
    if draft.model not in documents:
        draft.model = next(iter(documents))
    document, key = documents[draft.model], key or new_key()
    try:
        body = body_of(draft, document)
        cost = await visit.call("POST /v1/estimates", body=body)
    except ApiError as refusal:
        error = error or refusal
    size = draft.texts.get("size") or (document["sizes"] or {}).get("default") or ""
    sizes = presets(document["sizes"])
    free = bool(document["sizes"]) and "pixels" in document["sizes"]["forms"]
    if free and size not in dict(sizes):
        size = CUSTOM if size else ""
    recent = await last_tasks(visit)
    return visit.render(
        "playground.html",
        status,
        models=list(documents),
        document=document,
        draft=draft,
        others=others(document),
        sizes=sizes,
        size=size,
        free=free,
        CUSTOM=CUSTOM,
        references=[await reference(visit, each) for each in draft.images],
        error=error,
        error_at=field_of(error, document) if error else "",
        cost=cost,
        key=key,
        again_key=new_key(),
        task=task,
        running=RUNNING,
        samples=samples(body, visit.context.resources.links.base_url, key) if body else [],
        recent=recent,
        picks=[image for task in recent for image in task["images"]][:PICKS],
        may_read=may_read(visit),
    )


def models(visit: Visit) -> dict[str, JSON]:
    """The documents of the catalogue's models, as `GET /v1/catalogue` has them."""
    catalogue = context_of(visit.request).intake.catalogue
    return {name: catalogue.document(name) for name in catalogue.models}


def takes_images(document: JSON | None) -> bool:
    return bool(document and document["input_images"])


async def known_task(visit: Visit, task_id: str | None) -> JSON | None:
    if not task_id or not may_read(visit):
        return None
    return await visit.call("GET /v1/tasks/{task_id}", task_id=task_id)


async def last_tasks(visit: Visit) -> list[JSON]:
    if not may_read(visit):
        return []
    page = await visit.call("GET /v1/tasks", {"owner": visit.caller.owner, "limit": LAST})
    return list(page["data"])


async def reference(visit: Visit, value: str) -> JSON:
    """A reference as the page shows it. A link is not loaded: it is another host's."""
    if re.fullmatch(FILE_ID, value):
        return {"value": value, "src": f"/v1/files/{value}/content"}
    resources, row = visit.context.resources, None
    if re.fullmatch(IMAGE_ID, value):
        row = await resources.store.look_up(shown_image, value)
    mine = row is not None and row.owner == visit.caller.owner
    return {"value": value, "src": resources.links.image_path(value) if mine else None}


def new_key() -> str:
    return secrets.token_urlsafe(18)


def samples(body: JSON, base_url: str, key: str) -> list[tuple[str, str, str]]:
    """The submission as programs: name, title and text of each. `key`: the idempotency key."""
    url, text = f"{base_url}/v1/images/generations", json.dumps(body, ensure_ascii=False, indent=2)
    curl = (
        f'curl {shlex.quote(url)} \\\n  -H "Authorization: Bearer $DARKROOM_API_KEY" \\\n'
        f"  -H 'Content-Type: application/json' \\\n  -H 'Idempotency-Key: {key}' \\\n"
        f"  -d {shlex.quote(text)}"
    )
    python = (
        "import os\nimport httpx\n\n"
        f"answer = httpx.post(\n    {url!r},\n    headers={{\n"
        '        "Authorization": f"Bearer {os.environ[\'DARKROOM_API_KEY\']}",\n'
        f'        "Idempotency-Key": "{key}",\n    }},\n'
        f"    json={indented(pprint.pformat(body, sort_dicts=False, width=72), 9)},\n"
        "    timeout=30,\n)\nanswer.raise_for_status()\nprint(answer.json())"
    )
    javascript = (
        f"const answer = await fetch({json.dumps(url)}, {{\n"
        '  method: "POST",\n  headers: {\n'
        "    Authorization: `Bearer ${process.env.DARKROOM_API_KEY}`,\n"
        f'    "Content-Type": "application/json",\n    "Idempotency-Key": "{key}",\n  }},\n'
        f"  body: JSON.stringify({indented(text, 2)}),\n}});\n"
        "console.log(answer.status, await answer.json());"
    )
    return [
        ("curl", "curl", curl),
        ("python", "Python", python),
        ("javascript", "JavaScript", javascript),
    ]


def indented(text: str, by: int) -> str:
    """Every line but the first."""
    return text.replace("\n", "\n" + " " * by)


VIEWS = (
    View(f"GET {HERE}", playground, "submit", "Playground", "playground"),
    View(f"POST {HERE}", act, "submit"),
    View(f"POST {HERE}/again", again, "submit"),
)
