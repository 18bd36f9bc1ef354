"""The log of a whole run with many failures."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from service import VERSION
from service.images import downloads
from service.web.routes import task_routes
from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, order, refused, submitted
from tests.docs.log_lines import ALWAYS, LINES, WHERE_KNOWN
from tests.docs.render import documented
from tests.integration.test_console_security import signed_in
from tests.logs import logged
from tests.upstream import Upstream, document, error, page, picture
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, subscriber, world

JSON = dict[str, Any]

UPSTREAM_KEY = "upstream-key-of-the-test"
SECRET_KEY = "secret-key-of-the-test-0123456789-abc"
PROMPT = "a lighthouse that nobody may read of"
SIGNATURE = "c2lnbmF0dXJl"
TOKEN = "token-of-an-address"


def made_trouble(upstream: Upstream, url: str) -> None:
    """Sets up tasks that the upstream refuses, delays, leaves unanswered or completes after errors,
    and results that are no images or have a forbidden address.
    """
    pictures = {
        "good": f"{url}/files/good?Signature={SIGNATURE}",
        "bad": f"{url}/files/bad?Signature={SIGNATURE}",
    }
    upstream.submits = {
        f"{PROMPT} refused": [error(422, "moderation_blocked")],
        f"{PROMPT} busy": [error(429, "rate_limit_exceeded"), page(502)],
        f"{PROMPT} account": [error(401, "unauthorized"), document("pending", id="account")],
        **{f"{PROMPT} {name}": [document("pending", id=name)] for name in ("good", "bad", "away")},
    }
    upstream.queries = {
        "good": [page(500), document("completed", pictures["good"])],
        "bad": [document("completed", pictures["bad"])],
        "away": [document("completed", f"https://10.0.0.1/x.png?Signature={SIGNATURE}")],
    }
    upstream.files = {
        "good": [error(503, "busy"), Response(picture(), media_type="image/png")],
        "bad": [page(200)],
    }


async def trouble(here: World, client: httpx.AsyncClient, takes: str) -> list[str]:
    """Causes all of these failures, and sends wrong tokens and keys. Returns the secrets of the
    run.
    """
    urls = (f"{takes}/x?token={TOKEN}", f"http://127.0.0.1:9/{TOKEN}?token={TOKEN}")
    secrets = [
        got(await client.post("/v1/endpoints", json={"url": url}), 201)["secret"] for url in urls
    ]
    refused(
        await client.post("/v1/endpoints", json={"url": f"https://10.0.0.1/{TOKEN}?token={TOKEN}"}),
        400,
        param="url",
    )
    no = await client.post(SUBMIT, json=order(prompt=f"{PROMPT} refused"))
    refused(no, 422, param="size", task_id=no.json()["error"]["task_id"])
    ids = {}
    for name in ("busy", "account", "good", "bad", "away"):
        task = await submitted(
            client, {}, prompt=f"{PROMPT} {name}", callback_url=f"http://127.0.0.1:9/?token={TOKEN}"
        )
        ids[name] = task["id"]
        secrets.append(here.callback_url(task["id"]).rpartition("/")[2])
    for name in ("good", "bad", "away"):
        told = {
            "id": name,
            "status": "completed",
            "results": [f"{here.sandbox_url}/files/{name}?Signature={SIGNATURE}"],
        }
        for said in (told, told, {**told, "status": "failed"}, "nothing"):
            await here.stranger.post(here.callback_url(ids[name]), json=said)
    right = here.callback_url(ids["good"])
    await here.stranger.post(here.callback_url(ids["good"], "abcdefghijklmnop"), json={})
    await here.stranger.post(right, content=b"x" * (1 << 19))
    await here.stranger.post(f"{right}/more", json={})
    await here.stranger.get("/v1/tasks", headers={"authorization": f"Bearer {secrets[0]}"})
    async with signed_in(here):
        pass
    for path in ("/v1/credits", "/v1/tasks/task-unified-unknown", "/v1/nothing", "/healthz"):
        await client.get(path)
    await garbage(here.url, right)
    for name in ("good", "bad", "away"):
        await here.ended(ids[name])

    async def exhausted() -> bool:
        return bool(got(await client.get("/v1/deliveries", params={"state": "dead"}))["data"])

    await wait_until(exhausted)
    return secrets


async def garbage(url: str, path: str) -> None:
    """Sends a request that is not HTTP, so that uvicorn logs a line."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{path} is what I want\r\n\r\n".encode())
    await reader.read()
    writer.close()


@pytest.mark.slow
async def test_no_line_of_a_troubled_run_tells_a_secret_and_each_is_as_the_list_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line, of the service and of its libraries, is one JSON object with a documented name and
    fields. No line has a token, key, secret, prompt or signature.
    """
    monkeypatch.setattr(downloads, "WRONG_MS", 200)
    upstream = Upstream()
    secrets = [ADMIN_KEY, UPSTREAM_KEY, SECRET_KEY, PROMPT, SIGNATURE, TOKEN]
    settings: dict[str, Any] = {
        "evolink_api_key": UPSTREAM_KEY,
        "secret_key": SECRET_KEY,
        "delivery_schedule": "0.05",
    }
    with logged() as stream:
        async with (
            world(tmp_path, upstream=upstream.app, **settings) as here,
            subscriber() as takes,
        ):
            made_trouble(upstream, here.sandbox_url)
            body = {"owner": "ann", "scopes": ["submit", "read", "subscribe"]}
            key = got(await here.client.post("/v1/keys", json=body), 201)
            secrets += [key["key"], key["callback_secret"]]
            async with here.with_key(key["key"]) as client:
                secrets += await trouble(here, client, takes.url)
                late = ('"account.restored"', '"task.submission_uncertain"')
                await wait_until(lambda: all(name in stream.getvalue() for name in late))
                monkeypatch.setattr(task_routes, "page", None)
                refused(await client.get("/v1/tasks"), 500, "internal_error")
            await here.client.delete(f"/v1/keys/{key['id']}")
        told = stream.getvalue().splitlines()
    assert not [line for line in told for secret in secrets if secret in line]
    parsed = [json.loads(line) for line in told]
    for line in parsed:
        assert set(ALWAYS) <= line.keys()
        assert (line["service"], line["version"]) == ("darkroom", VERSION)
        assert line.keys() - {*ALWAYS, *WHERE_KNOWN} <= documented(LINES[line["event"]]) | {
            "image_id"
        }, line
    seldom = {
        "endpoint.disabled",
        "store.failed",
        "blobs.failed",
        "blobs.full",
        "worker.failed",
        "task.parked",
        "reconcile.queried",
        "callback.overloaded",
        "secrets.rekeyed",
        "secrets.unreadable",
        "store.freed",
        "store.parameters_ignored",
        "upstream.unusable",
        "upstream.unreadable",
        "task.results_awaited",
        "budget.refused",
        "events.position_empty",
    }
    seldom |= {name for name in LINES if name.startswith("sink.")}  # test_brokers
    seldom |= {name for name in LINES if name.startswith(("file.", "input."))}  # test_input_images
    seldom |= {
        "blobs.swept",
        "retention.applied",
        "task.erased",
        "http.shed",
        "store.damaged",
        "store.unsafe",
        "store.waiting",
        "traces.unavailable",
    }
    assert {line["event"] for line in parsed} >= LINES.keys() - seldom


async def test_a_defect_of_ours_is_one_line_and_an_answer_in_the_one_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is 500 with the request's id, and the log has the traceback under that id. The
    next request succeeds.
    """
    with logged() as stream:
        async with world(tmp_path) as here:
            with monkeypatch.context() as broken:
                broken.setattr(task_routes, "page", None)
                answer = await here.client.get("/v1/tasks")
            said = refused(answer, 500, "internal_error")
            got(await here.client.get("/v1/tasks"))
        parsed = [json.loads(line) for line in stream.getvalue().splitlines()]
    (failed,) = [line for line in parsed if line["event"] == "http.failed"]
    assert (failed["request_id"], failed["route"], failed["method"]) == (
        said["request_id"],
        "/v1/tasks",
        "GET",
    )
    assert "TypeError" in failed["exception"]
    assert "TypeError" not in answer.text


async def test_a_requests_line_tells_who_asked_for_what(tmp_path: Path) -> None:
    """The line has the route's pattern and never the path, the caller's owner, and the task. Probes
    and callbacks are logged at debug only.
    """
    with logged("info") as stream:
        async with world(tmp_path) as here, here.owner(name="ann") as client:
            task = await submitted(client, UNTIL_DONE)
            answer = await client.get(f"/v1/tasks/{task['upstream_id']}")
            await here.stranger.get("/readyz")
            await here.stranger.get("/v1/nothing")
            erasure = await client.delete(f"/v1/tasks/{task['id']}")
        parsed = [json.loads(line) for line in stream.getvalue().splitlines()]
    requests = {line["request_id"]: line for line in parsed if line["event"] == "http.request"}
    line = requests[answer.headers["x-request-id"]]
    assert (line["owner"], line["task_id"], line["route"], line["status"]) == (
        "ann",
        task["id"],
        "/v1/tasks/{task_id}",
        200,
    )
    assert line["bytes"] == len(answer.content)
    erased = [line for line in parsed if line.get("request_id") == erasure.headers["x-request-id"]]
    assert {line["event"] for line in erased} >= {"task.erased", "http.request"}
    assert {line["upstream_id"] for line in erased} == {task["upstream_id"]}
    routes = [line["route"] for line in requests.values()]
    assert {None, "/v1/keys", "/v1/images/generations"} <= set(routes)
    assert not [route for route in routes if route and route.startswith(("/readyz", "/callbacks"))]


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_prompt_is_logged_only_if_it_is_wanted(tmp_path: Path, wanted: bool) -> None:
    """With `LOG_PROMPTS` the prompt is in `task.queued`, once."""
    with logged() as stream:
        async with world(tmp_path, log_prompts=wanted) as here:
            await submitted(here.client, ASYNC, prompt=PROMPT)
        told = [json.loads(line) for line in stream.getvalue().splitlines() if PROMPT in line]
    assert [(line["event"], line["prompt"]) for line in told] == [("task.queued", PROMPT)] * wanted


async def test_the_lines_of_a_task_come_in_the_order_of_what_happened(tmp_path: Path) -> None:
    """A cause comes before its effect, also where one transaction has both. The query and the
    download go on side by side.
    """
    with logged("info") as stream:
        async with world(tmp_path) as here:
            task = await submitted(here.client, UNTIL_DONE, sandbox={"delay": 1})
        parsed = [json.loads(line) for line in stream.getvalue().splitlines()]
    names = [
        line.get("type", line["event"])
        for line in parsed
        if line.get("task_id") == task["id"]
        and line["event"] not in ("upstream.called", "ledger.entered")
    ]
    assert names[4:6] in (["task.confirmed", "image.stored"], ["image.stored", "task.confirmed"])
    assert names[:4] + names[6:] == [
        "task.queued",
        "task.submitted",
        "image.task.submitted",
        "callback.received",
        "task.settled",
        "image.task.completed",
        "http.request",
    ]
