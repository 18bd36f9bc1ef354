"""Tasks as clients see them: their shape, lists, timelines, cancelling, and how a submission is answered."""

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.app import Role
from service.web import bodies
from tests.api import ASYNC, SUBMIT, TIME, UNTIL_DONE, an_id, got, order, refused, submitted
from tests.upstream import Upstream, document, error
from tests.waiting import wait_until
from tests.world import TEXT_TO_IMAGE, World, subscriber, world

JSON = dict[str, Any]
LATE = {"delay": 600}  # the task outlasts the test


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("here")) as made:
        yield made


@pytest.fixture(scope="module")
async def still(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world without workers: what is submitted stays as it is."""
    async with world(tmp_path_factory.mktemp("still"), role=Role(workers=False)) as made:
        yield made


# --- the shape -------------------------------------------------------------------------------------------------------


async def test_a_queued_task_has_every_key_and_null_for_what_is_unknown(still: World) -> None:
    """The task's shape is fixed: all keys are always there."""
    async with still.owner() as client:
        task = await submitted(client, n=2, metadata={"order": "7"}, callback_url="http://127.0.0.1:9/done")
    assert re.fullmatch(an_id("task"), task["id"])
    assert type(task["created"]) is int
    assert abs(task["created"] - time.time()) < 60
    assert task == {
        "id": task["id"],
        "object": "image.generation.task",
        "created": task["created"],
        "model": TEXT_TO_IMAGE,
        "type": "image",
        "status": "pending",
        "progress": 0,
        "task_info": {"can_cancel": True, "estimated_time": None},
        "usage": {"billing_rule": None, "credits_reserved": None, "credits_used": None, "user_group": None},
        "results": [],
        "error": None,
        "state": "queued",
        "upstream": "evolink",
        "upstream_id": None,
        "metadata": {"order": "7"},
        "request": {"size": "768x768", "n": 2},
        "images": [],
        "prompt": "a lighthouse",
    }
    assert got(await still.client.get(f"/v1/tasks/{task['id']}")) == task


async def test_a_completed_task_lists_its_images_in_order_and_their_links_as_results(here: World) -> None:
    """`results` are our own links, in the upstream's order; an image has every key."""
    task = await submitted(here.client, UNTIL_DONE, n=2)
    assert (task["status"], task["state"], task["progress"], task["error"]) == ("completed", "completed", 100, None)
    assert task["task_info"] == {"can_cancel": False, "estimated_time": 1}
    assert task["usage"] == {"billing_rule": "per_call", "credits_reserved": 3, "credits_used": 3, "user_group": "default"}
    assert [image["url"] for image in task["images"]] == task["results"]
    for index, image in enumerate(task["images"]):
        assert re.fullmatch(an_id("img"), image["id"])
        assert re.fullmatch("[0-9a-f]{64}", image["sha256"])
        assert image == {
            "id": image["id"],
            "index": index,
            "url": f"{here.url}/images/{image['id']}",
            "media_type": "image/png",
            "bytes": len((await here.stranger.get(image["url"])).content),
            "sha256": image["sha256"],
            "width": 768,
            "height": 768,
        }


async def test_a_failed_task_has_the_upstreams_error_and_no_results(here: World) -> None:
    """What the upstream says of a failure is the task's error."""
    task = await submitted(here.client, UNTIL_DONE, sandbox={"fail": "content_policy_violation"})
    assert (task["status"], task["state"], task["results"], task["images"]) == ("failed", "failed", [], [])
    assert task["error"]["code"] == "content_policy_violation"
    assert {"code", "message", "type"} <= task["error"].keys()


async def test_a_task_is_found_by_our_id_and_by_the_upstreams(here: World) -> None:
    """Both ids lead to the same task."""
    task = await submitted(here.client, headers={}, sandbox=LATE)
    assert task["upstream_id"].startswith("task-unified-")
    by_theirs = got(await here.client.get(f"/v1/tasks/{task['upstream_id']}"))
    assert by_theirs["id"] == task["id"]
    assert got(await here.client.get(f"/v1/tasks/{task['upstream_id']}/timeline"))["data"][0]["step"] == "task.queued"


@pytest.mark.parametrize("id", ["task_aaaaaaaaaaaaaaaaaaaaaaaaaa", "unknown", "a" * 300, "%00", "task_%00", "a%20b", "%ff", "task_%3f"])
async def test_an_unknown_id_is_not_found_whatever_it_looks_like(still: World, id: str) -> None:
    """404 in the one form, without a look at the upstream."""
    refused(await still.client.get(f"/v1/tasks/{id}"), 404)
    refused(await still.client.get(f"/v1/tasks/{id}/timeline"), 404)
    refused(await still.client.post(f"/v1/tasks/{id}/cancel"), 404)


async def test_an_unknown_id_of_the_upstreams_is_passed_through(here: World) -> None:
    """A task that was submitted past this service is the upstream's to show, its answer as it is; so is that there is none."""
    theirs = got_there(await here.sandbox.post(SUBMIT, json=order(sandbox=LATE)))
    answer = await here.client.get(f"/v1/tasks/{theirs['id']}")
    assert got(answer)["id"] == theirs["id"]
    assert "state" not in answer.json()
    for id in ("task-unified-1-unknown", "task-unified-%3fa=b", "task-unified-%2e%2e"):
        missing = await here.client.get(f"/v1/tasks/{id}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "task_not_found")
        assert missing.content == (await here.sandbox.get(f"/v1/tasks/{id}")).content


def got_there(answer: httpx.Response) -> JSON:
    task: JSON = answer.json()
    return task


async def test_credits_and_models_are_the_upstreams_own_answers(here: World) -> None:
    """What is passed through is passed through byte for byte."""
    for path in ("/v1/credits", "/v1/models"):
        answer = await here.client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.content == (await here.sandbox.get(path)).content


# --- lists -----------------------------------------------------------------------------------------------------------


async def listed(client: httpx.AsyncClient, **query: Any) -> list[str]:
    return [task["id"] for task in got(await client.get("/v1/tasks", params=query))["data"]]


async def test_a_list_is_filtered_by_state_model_and_metadata(still: World) -> None:
    """Filters are joined by and; metadata is compared as text, whatever its name."""
    async with still.owner() as client:
        red = (await submitted(client, metadata={"colour": "red", "a.b": "1"}))["id"]
        blue = (await submitted(client, metadata={"colour": "blue", "key": "да"}))["id"]
        other = (await submitted(client, model="another-model", metadata={"colour": "red", "size": ""}))["id"]
        got(await client.post(f"/v1/tasks/{red}/cancel"))
        assert await listed(client) == [other, blue, red]
        assert await listed(client, state="cancelled") == [red]
        assert await listed(client, state="queued") == [other, blue]
        assert await listed(client, model="another-model") == [other]
        assert await listed(client, **{"metadata.colour": "red"}) == [other, red]
        assert await listed(client, **{"metadata.colour": "red", "state": "queued"}) == [other]
        assert await listed(client, **{"metadata.a.b": "1"}) == [red]
        assert await listed(client, **{"metadata.key": "да"}) == [blue]
        assert await listed(client, **{"metadata.size": ""}) == [other]
        assert await listed(client, **{"metadata.missing": "x"}) == []
        assert await listed(client, model="") == []


async def test_metadata_names_are_data_in_a_filter_too(still: World) -> None:
    """A name with brackets or dots finds what it names and nothing else; one that JSON would escape is refused."""
    async with still.owner() as client:
        for name in ("a'b", "a[0]", "$", "a.b.c", "%", "*", " ", "?", "a=b&c"):
            task = await submitted(client, metadata={name: "1"})
            assert await listed(client, **{f"metadata.{name}": "1"}) == [task["id"]], name
    for name in ('a"b', "a\\b", "a\nb", "\0"):
        refused(await still.client.get("/v1/tasks", params={f"metadata.{name}": "1"}), 400, "invalid_request", param="metadata")


async def test_a_cursor_leads_through_all_pages_newest_first(still: World) -> None:
    """Every task comes once, and the last page says that it is the last."""
    async with still.owner() as client:
        ids = [(await submitted(client))["id"] for _ in range(6)]
        for limit in (1, 2, 3, 4, 6, 7):
            seen: list[str] = []
            pages, cursor = 0, None
            while pages == 0 or cursor:
                query = {"limit": limit} | ({"cursor": cursor} if cursor else {})
                page = got(await client.get("/v1/tasks", params=query))
                assert page.keys() == {"data", "next_cursor"}
                seen += [task["id"] for task in page["data"]]
                pages, cursor = pages + 1, page["next_cursor"]
            assert (seen, pages) == (ids[::-1], -(-6 // limit))


async def test_a_task_that_comes_meanwhile_does_not_move_the_pages(still: World) -> None:
    """A cursor is a place in the list, not a number of rows."""
    async with still.owner() as client:
        ids = [(await submitted(client))["id"] for _ in range(3)]
        first = got(await client.get("/v1/tasks", params={"limit": 2}))
        await submitted(client)
        second = got(await client.get("/v1/tasks", params={"limit": 2, "cursor": first["next_cursor"]}))
        assert [task["id"] for task in first["data"] + second["data"]] == ids[::-1]


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "1.5", "x", "", "1e2", "nan", "٣", "+5", "1_0", "9" * 400])
async def test_a_limit_is_a_whole_number_from_1_to_1000(still: World, limit: str) -> None:
    """Other limits are refused by name."""
    for path in ("/v1/tasks", "/v1/events", "/v1/endpoints", "/v1/deliveries", "/v1/keys"):
        refused(await still.client.get(path, params={"limit": limit}), 400, "invalid_request", param="limit")


async def test_the_limits_limits_are_allowed(still: World) -> None:
    """1 and 1000 are in."""
    for limit in (1, 1000):
        for path in ("/v1/tasks", "/v1/events", "/v1/endpoints", "/v1/deliveries", "/v1/keys"):
            got(await still.client.get(path, params={"limit": limit}))


def cursor(place: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


STRANGE: tuple[Any, ...] = (7, None, {}, [], [1], [None, "a"], ["1", "a"], [1, 2], [1e99, "a"], [2**63, "a"], [1, "\0"], [1, "a", "b"])
DEEP = base64.urlsafe_b64encode(b"[" * 3000).decode()


@pytest.mark.parametrize("cursor", ["", "x", "é", "e30", "e 30=", DEEP, *(cursor(place) for place in STRANGE)])
async def test_a_cursor_that_no_answer_gave_is_refused(still: World, cursor: str) -> None:
    """400, for every list."""
    for path in ("/v1/tasks", "/v1/endpoints", "/v1/deliveries", "/v1/keys"):
        refused(await still.client.get(path, params={"cursor": cursor}), 400, "invalid_request", param="cursor")


async def test_filters_that_nothing_can_match_are_refused_by_name(still: World) -> None:
    """A state that is none, and text that no store takes."""
    for query, param in (("state=done", "state"), ("state=", "state"), ("model=%00", "model"), ("metadata.a=%00", "metadata.a")):
        refused(await still.client.get(f"/v1/tasks?{query}"), 400, "invalid_request", param=param)


# --- the timeline ----------------------------------------------------------------------------------------------------


async def test_a_timeline_tells_every_step_in_order(here: World) -> None:
    """From `task.queued` to the delivery, each with its time and figures; a callback with verdict, count and last time seen."""
    async with here.owner() as client, subscriber() as takes:
        got(await client.post("/v1/endpoints", json={"url": takes.url, "types": ["image.task.completed"]}), 201)
        task = await submitted(client, UNTIL_DONE, sandbox={"repeat_callback": 3})
        path = f"/v1/tasks/{task['id']}/timeline"

        async def whole() -> list[JSON] | None:
            steps: list[JSON] = got(await client.get(path))["data"]
            told = {step["step"] for step in steps}
            counts = [step["count"] for step in steps if step["step"] == "callback.received"]
            return steps if "delivery.attempted" in told and counts == [3] else None

        steps = await wait_until(whole)
    names = [step["step"] for step in steps]
    spine = ["task.queued", "task.submitted", "task.confirmed", "task.settled", "delivery.attempted"]
    assert [name for name in names if name in spine] == spine
    assert set(names) == {*spine, "callback.received", "image.stored", "event.emitted"}
    assert [step["time"] for step in steps] == sorted(step["time"] for step in steps)
    assert all(re.fullmatch(TIME, step["time"]) for step in steps)
    told = {step["step"]: step for step in steps}
    callback = told["callback.received"]
    assert (callback["verdict"], callback["status"], callback["count"]) == ("accepted", "completed", 3)
    assert re.fullmatch(an_id("cb"), callback["callback_id"])
    assert callback["last_seen_at"] >= callback["time"]
    assert told["task.submitted"]["upstream_id"] == task["upstream_id"]
    assert told["image.stored"]["image_id"] == task["images"][0]["id"]
    assert told["task.settled"]["state"] == "completed"
    assert told["delivery.attempted"]["status"] == 204
    assert [step["type"] for step in steps if step["step"] == "event.emitted"] == ["image.task.submitted", "image.task.completed"]


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_a_cancelled_task_is_over_here_and_says_so_once(here: World) -> None:
    """Cancelling is local: the task with `cancel`, one terminal event; again is 409 with the task's id."""
    async with here.owner() as client:
        task = await submitted(client, headers={}, sandbox=LATE)
        cancelled = got(await client.post(f"/v1/tasks/{task['upstream_id']}/cancel"))
        assert (cancelled["cancel"], cancelled["id"], cancelled["state"], cancelled["status"]) == (
            "local",
            task["id"],
            "cancelled",
            "cancelled",
        )
        assert cancelled["error"]["code"] == "request_cancelled"
        assert not cancelled["task_info"]["can_cancel"]
        refused(await client.post(f"/v1/tasks/{task['id']}/cancel"), 409, "task_ended", task_id=task["id"])
        events = got(await client.get("/v1/events", params={"task": task["id"]}))["data"]
        assert [event["type"] for event in events] == ["image.task.submitted", "image.task.cancelled"]
        assert "cancel" not in events[-1]["data"]


async def test_nothing_that_comes_after_a_local_cancel_is_kept_but_the_charge(here: World) -> None:
    """The upstream's late success leaves the task cancelled, without images; what it cost is recorded."""
    task = await submitted(here.client, headers={}, sandbox={"delay": 0.6})
    cancelled = got(await here.client.post(f"/v1/tasks/{task['id']}/cancel"))
    assert cancelled["usage"]["credits_used"] is None

    async def charged() -> JSON | None:
        now = await here.task(task["id"])
        return now if now["usage"]["credits_used"] is not None else None

    now = await wait_until(charged)
    assert (now["state"], now["images"], now["results"], now["usage"]["credits_used"]) == ("cancelled", [], [], 1.5)


async def test_a_task_that_has_ended_cannot_be_cancelled(here: World) -> None:
    """409, and the task stays as it is."""
    task = await submitted(here.client, UNTIL_DONE)
    refused(await here.client.post(f"/v1/tasks/{task['id']}/cancel"), 409, "task_ended", task_id=task["id"])
    assert await here.task(task["id"]) == task


# --- idempotency -----------------------------------------------------------------------------------------------------


async def keyed(client: httpx.AsyncClient, key: str, body: JSON, **headers: str) -> httpx.Response:
    return await client.post(SUBMIT, json=body, headers=ASYNC | {"idempotency-key": key, **headers})


async def test_the_same_key_and_body_answer_the_first_task(still: World) -> None:
    """Replayed, and said so."""
    async with still.owner() as client:
        first = await keyed(client, "k", order(metadata={"a": "1"}))
        again = await keyed(client, "k", order(metadata={"a": "1"}))
        assert got(first) == got(again)
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        assert len(await listed(client)) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt":"p\\u0065ar","model":"m","n":1,"x":{"b":[1,2],"a":null}}',
        ' {"x" : {"a":null, "b":[1,2]}, "n":1, "model":"m", "prompt":"pear"}\n',
    ],
)
async def test_bodies_are_compared_as_json_not_as_bytes(still: World, text: str) -> None:
    """Order of fields, spaces and escapes are no difference."""
    async with still.owner() as client:
        first = got(await keyed(client, "k", {"model": "m", "prompt": "pear", "n": 1, "x": {"a": None, "b": [1, 2]}}))
        headers = ASYNC | {"idempotency-key": "k", "content-type": "application/json"}
        again = await client.post(SUBMIT, content=text, headers=headers)
        assert got(again)["id"] == first["id"]
        assert again.headers["idempotency-replayed"] == "true"


async def test_another_body_under_the_same_key_is_a_conflict(still: World) -> None:
    """409 names the header and the first task; order of a list, type and presence are differences."""
    async with still.owner() as client:
        task = got(await keyed(client, "k", order(x=[1, 2])))
        for body in (order(x=[2, 1]), order(x=[1, "2"]), order(), order(x=[1, 2], y=None) | {"y": None}):
            refused(await keyed(client, "k", body), 409, "idempotency_conflict", param="Idempotency-Key", task_id=task["id"])
        assert len(await listed(client)) == 1


async def test_a_key_is_looked_up_before_the_body_is_validated(still: World) -> None:
    """What would be refused is a conflict when its key is taken; a refused body takes no key."""
    async with still.owner() as client:
        refused(await keyed(client, "k", order(n=99)), 400, "invalid_parameter", param="n")
        task = got(await keyed(client, "k", order(n=1)))
        refused(await keyed(client, "k", order(n=99)), 409, "idempotency_conflict", param="Idempotency-Key", task_id=task["id"])
        refused(await keyed(client, "k", {"model": 7}), 409, "idempotency_conflict", param="Idempotency-Key", task_id=task["id"])


async def test_keys_belong_to_their_owner(still: World) -> None:
    """Two owners with one key have two tasks; two keys of one owner have one."""
    async with still.owner(name="kay") as one, still.owner(name="kay") as same, still.owner() as other:
        first = got(await keyed(one, "k", order()))
        assert got(await keyed(same, "k", order()))["id"] == first["id"]
        answer = await keyed(other, "k", order())
        assert got(answer)["id"] != first["id"]
        assert "idempotency-replayed" not in answer.headers


async def test_a_key_has_1_to_255_visible_ascii_characters(still: World) -> None:
    """Longer ones, empty ones, and those with spaces or other letters are refused by name."""
    async with still.owner() as client:
        for key in ("!", "~" * 255, 'a"b,c;d\\'):
            got(await keyed(client, key, order()))
        for bad in ("", "a" * 256, "a b", "a\tb"):
            refused(await keyed(client, bad, order()), 400, "invalid_request", param="Idempotency-Key")
        answer = await client.post(SUBMIT, json=order(), headers=[(b"idempotency-key", b"\xc3\xa9")])
        refused(answer, 400, "invalid_request", param="Idempotency-Key")


async def test_one_key_at_once_makes_one_task(still: World) -> None:
    """Of requests that come together one creates the task, the others replay it."""
    async with still.owner() as client:
        answers = await asyncio.gather(*(keyed(client, "k", order()) for _ in range(8)))
        assert len({got(answer)["id"] for answer in answers}) == 1
        assert sum("idempotency-replayed" in answer.headers for answer in answers) == 7


async def test_a_refusal_is_replayed_with_its_status(here: World) -> None:
    """The upstream's refusal comes with its status, error and our task's id, and again the same."""
    refusal = {"submit_status": {"status": 422, "code": "moderation_blocked", "times": 1}}
    async with here.owner() as client:
        first = await client.post(SUBMIT, json=order(sandbox=refusal), headers={"idempotency-key": "k"})
        task_id = first.json()["error"]["task_id"]
        error = refused(first, 422, "moderation_blocked", task_id=task_id)
        again = await client.post(SUBMIT, json=order(sandbox=refusal), headers={"idempotency-key": "k", "prefer": "wait=5"})
        assert refused(again, 422, "moderation_blocked", task_id=task_id) | {"request_id": None} == error | {"request_id": None}
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["preference-applied"] == "wait=5"
        task = got(await client.get(f"/v1/tasks/{task_id}"))
        assert (task["state"], task["error"]["code"], task["upstream_id"]) == ("failed", "moderation_blocked", None)


async def test_a_replay_waits_like_the_first(here: World) -> None:
    """`Prefer` counts for a replay as well."""
    async with here.owner() as client:
        headers = {"idempotency-key": "k"}
        first = got(await client.post(SUBMIT, json=order(), headers=headers | ASYNC))
        assert first["state"] != "completed"
        again = got(await client.post(SUBMIT, json=order(), headers=headers | UNTIL_DONE))
        assert (again["id"], again["state"]) == (first["id"], "completed")


# --- how a submission is answered ------------------------------------------------------------------------------------


async def test_without_a_preference_the_answer_waits_for_the_first_outcome(here: World) -> None:
    """The upstream's answer is in ours; no preference was applied."""
    answer = await here.client.post(SUBMIT, json=order(sandbox=LATE | {"submit_delay": 0.3}))
    task = got(answer)
    assert (task["state"], task["status"]) == ("submitted", "pending")
    assert task["upstream_id"] is not None
    assert "preference-applied" not in answer.headers


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        (["respond-async"], "respond-async"),
        (["Respond-Async"], "respond-async"),
        (["wait=0"], "wait=0"),
        (["wait=0, respond-async"], "wait=0"),
        (["respond-async, wait=0"], "wait=0"),
        (["respond-async", 'Wait = "0"'], "wait=0"),
        (["wait=0; foo=bar"], "wait=0"),
        (["handling=lenient, respond-async"], "respond-async"),
    ],
)
async def test_a_preference_is_applied_and_named(still: World, prefer: list[str], applied: str) -> None:
    """`wait` wins over `respond-async`; nothing moves here, so the task comes back as it was committed."""
    headers = [("prefer", value) for value in prefer]
    answer = await still.client.post(SUBMIT, json=order(), headers=headers)
    assert got(answer)["state"] == "queued"
    assert answer.headers["preference-applied"] == applied


async def test_no_answer_is_held_longer_than_two_minutes(here: World) -> None:
    """What is applied is at most 120 seconds."""
    answer = await here.client.post(SUBMIT, json=order(), headers={"prefer": "wait=99999999999, wait=999999999"})
    assert got(answer)["state"] == "completed"
    assert answer.headers["preference-applied"] == "wait=120"


@pytest.mark.parametrize("prefer", ["wait", "wait=", "wait=x", "wait=-1", "wait=1.5", "wait=٣", "return=minimal", ",,;"])
async def test_preferences_that_say_nothing_are_ignored(here: World, prefer: str) -> None:
    """The answer is as without one, and names none."""
    answer = await here.client.post(SUBMIT, json=order(sandbox=LATE), headers=[(b"prefer", prefer.encode())])
    assert got(answer)["state"] == "submitted"
    assert "preference-applied" not in answer.headers


async def test_a_client_that_leaves_changes_nothing(here: World) -> None:
    """The task goes on when nobody waits for the answer any more."""
    async with here.owner() as client:
        waiting = asyncio.create_task(client.post(SUBMIT, json=order(sandbox={"delay": 0.3}), headers=UNTIL_DONE))
        task_id = (await wait_until(lambda: listed(client)))[0]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await here.ended(task_id))["state"] == "completed"


async def test_the_upstream_gets_the_clients_fields_and_nothing_of_ours(tmp_path: Path) -> None:
    """Unknown fields are passed on; `metadata` and the client's `callback_url` stay here; the key is our task's id."""
    upstream = Upstream()
    async with world(tmp_path, upstream=upstream.app) as here, here.owner() as client:
        fields = {"seed": 7, "image_urls": ["https://x.test/1.png"], "deep": {"a": [None, 1.5, "ü"]}}
        task = await submitted(
            client, {}, prompt="plain", size=None, metadata={"a": "b"}, callback_url="http://127.0.0.1:9/x?y=z", **fields
        )
        (sent,) = upstream.received["plain"]
        ours = here.callback_url(task["id"])
        assert json.loads(sent.body) == {"model": TEXT_TO_IMAGE, "prompt": "plain", **fields, "callback_url": ours}
        assert sent.headers["idempotency-key"] == task["id"]
        assert sent.headers["authorization"] == "Bearer sandbox"
        assert task["request"] == fields
        task_two = await submitted(client, {}, prompt="two", model_params={"task_id": task["id"], "k": 1})
        assert json.loads(upstream.received["two"][0].body)["model_params"] == {"task_id": task["upstream_id"], "k": 1}
        assert task_two["request"]["model_params"] == {"task_id": task["id"], "k": 1}


async def test_an_upstream_that_refuses_says_so_through_us(tmp_path: Path) -> None:
    """The refusal's status, code, message, type and param are the upstream's; what proves nothing is 200."""
    upstream = Upstream({"no": [error(400, "invalid_parameter")], "odd": [document("pending")]})
    async with world(tmp_path, upstream=upstream.app, callback_url=None, uncertain="fail") as here:
        answer = await here.client.post(SUBMIT, json=order(prompt="no"))
        said = refused(answer, 400, "invalid_parameter", param="size", task_id=answer.json()["error"]["task_id"])
        assert (said["message"], said["type"]) == ("said invalid_parameter", "some_error")
        odd = await submitted(here.client, {}, prompt="odd")
        assert odd["state"] in ("uncertain", "failed")


# --- what is refused -------------------------------------------------------------------------------------------------

SURROGATE = b'{"model": "m", "prompt": "a\\ud800b"}'


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_request"),
        (b"not json", 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
        (b'"text"', 400, "invalid_request"),
        (b"null", 400, "invalid_request"),
        (b'{"model": "m"', 400, "invalid_request"),
        (b'{"model": "m"} {}', 400, "invalid_request"),
        (b"\xef\xbb\xbf{}", 400, "invalid_request"),
        ('{"model": "m"}'.encode("utf-16"), 400, "invalid_request"),
        (b'{"model": "\xff"}', 400, "invalid_request"),
        (b'{"model": "a\\u0000"}', 400, "invalid_request"),
        (b'{"model": "m", "a\\u0000": 1}', 400, "invalid_request"),
        (SURROGATE, 400, "invalid_request"),
        (b'{"model": "m", "x": [{"\\udfff": 1}]}', 400, "invalid_request"),
        (b'{"model": "m", "model": "m"}', 400, "invalid_request"),
        (b'{"model": "m", "x": {"a": 1, "a": 1}}', 400, "invalid_request"),
        (b'{"model": "m", "x": NaN}', 400, "invalid_request"),
        (b'{"model": "m", "x": -Infinity}', 400, "invalid_request"),
        (b'{"model": "m", "x": 1e400}', 400, "invalid_request"),
        (b'{"model": "m", "x": ' + b"9" * 5000 + b"}", 400, "invalid_request"),
        (b'{"model": "m", "x": ' + b"[" * 101 + b"]" * 101 + b"}", 400, "invalid_request"),
        (b'{"x":' * 100_000, 400, "invalid_request"),
        (b'{"model": "m", "x": "' + b"a" * (1 << 20) + b'"}', 413, "body_too_large"),
    ],
)
async def test_a_body_that_is_no_plain_json_object_is_refused(still: World, content: bytes, status: int, code: str) -> None:
    """Whatever JSON leaves open is refused: nothing is guessed, stored or sent on."""
    for path in (SUBMIT, "/v1/endpoints"):
        answer = await still.client.post(path, content=content, headers=ASYNC | {"content-type": "application/json"})
        refused(answer, status, code)


async def test_what_json_does_allow_is_taken_and_comes_back(still: World) -> None:
    """Depth within the limit, large numbers, pairs of surrogates, escapes, and a body just under the limit."""
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    odd = {"deep": deep, "large": 10**300, "small": 5e-324, "emoji": "😀", "control": "\x01\x7f\u2028"}
    assert (await submitted(still.client, model="m", **odd))["request"] == {"size": "768x768", **odd}
    body = json.dumps({"model": "m", "x": ""})
    whole = body.replace('""', '"' + "a" * ((1 << 20) - len(body)) + '"')
    answer = await still.client.post(SUBMIT, content=whole, headers=ASYNC | {"content-type": "application/json; charset=utf-8"})
    assert len(got(answer)["request"]["x"]) == (1 << 20) - len(body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"model": "m" * 201}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a" * 2001}, "prompt"),
        ({"n": 5}, "n"),
        ({"size": "10x10"}, "size"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": "ü" * 1024}}, "metadata"),
        ({"callback_url": 7}, "callback_url"),
        ({"callback_url": "ftp://x.test/"}, "callback_url"),
        ({"callback_url": "http://8.8.8.8/"}, "callback_url"),
        ({"callback_url": "https://10.0.0.1/"}, "callback_url"),
        ({"callback_url": "https://user@x.test/"}, "callback_url"),
        ({"model_params": {"task_id": "task_aaaaaaaaaaaaaaaaaaaaaaaaaa"}}, "model_params.task_id"),
    ],
)
async def test_a_field_over_its_limit_is_refused_by_name_and_leaves_no_task(still: World, fields: JSON, param: str) -> None:
    """400 names the field; nothing was committed."""
    async with still.owner() as client:
        answer = await client.post(SUBMIT, json=order(**fields), headers=ASYNC)
        said = refused(answer, 400, param=param)
        assert param.rsplit(".", maxsplit=1)[-1] in said["message"]
        assert await listed(client) == []


async def test_metadata_up_to_its_limits_is_taken(still: World) -> None:
    """16 pairs and 2 KiB, counted as bytes; null is none."""
    metadata = {f"{number:02}": "ü" * 63 for number in range(16)}  # 16 × (2 + 126) = 2048
    assert (await submitted(still.client, metadata=metadata))["metadata"] == metadata
    answer = await still.client.post(SUBMIT, json=order() | {"metadata": None, "callback_url": None}, headers=ASYNC)
    assert got(answer)["metadata"] == {}


FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", FORM, "application/jsonp", ""])
async def test_another_media_type_is_refused(still: World, kind: str) -> None:
    """415, before the body is looked at."""
    for path in (SUBMIT, "/v1/endpoints", "/v1/keys"):
        answer = await still.client.post(path, content=b"{}", headers={"content-type": kind})
        refused(answer, 415, "unsupported_media_type")


async def test_json_under_another_of_its_names_is_taken(still: World) -> None:
    """No media type at all counts as JSON, so does a kind of JSON."""
    for headers in ({}, {"content-type": "Application/JSON"}, {"content-type": "application/vnd.x+json"}):
        got(await still.client.post(SUBMIT, content=json.dumps(order()), headers=ASYNC | headers))


async def test_a_body_that_does_not_come_is_given_up(still: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """408 after the limit; a sender that leaves is no defect of ours."""
    monkeypatch.setattr(bodies, "BODY_S", 0.05)
    host, port = still.url.removeprefix("http://").split(":")
    wanted = f"content-type: application/json\r\ncontent-length: 10\r\n{key_of(still.client)}"
    head = f"POST {SUBMIT} HTTP/1.1\r\nhost: x\r\n{wanted}\r\n{{".encode()
    with capture_logs() as lines:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()
        monkeypatch.setattr(bodies, "BODY_S", 20)
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        await writer.drain()
        writer.close()

        def both() -> bool:
            return [line["status"] for line in lines if line["event"] == "http.request"] == [408, 408]

        await wait_until(both)
    assert [line["event"] for line in lines] == ["http.request", "http.request"]


def key_of(client: httpx.AsyncClient) -> str:
    return f"authorization: {client.headers['authorization']}\r\n"


async def test_a_method_that_a_path_does_not_have_is_refused_with_those_it_has(still: World) -> None:
    """405 names every method of the path."""
    for method, path, allowed in (
        ("GET", SUBMIT, {"POST"}),
        ("PUT", "/v1/endpoints", {"GET", "HEAD", "POST"}),
        ("POST", "/v1/endpoints/ep_x", {"GET", "HEAD", "PATCH", "DELETE"}),
        ("DELETE", "/healthz", {"GET", "HEAD"}),
    ):
        answer = await still.client.request(method, path)
        refused(answer, 405, "method_not_allowed")
        assert set(answer.headers["allow"].split(", ")) == allowed


async def test_an_unknown_path_is_not_found(still: World) -> None:
    """404 in the one form, with a key and without."""
    for client in (still.client, still.stranger):
        for path in ("/", "/v1", "/v1/nothing", "/v2/tasks", "/callbacks/evolink"):
            refused(await client.get(path), 404, "not_found")


async def test_without_room_for_images_nothing_new_is_taken(tmp_path: Path) -> None:
    """503 with `Retry-After`, and no task; what is there can still be read."""
    async with world(tmp_path, role=Role(workers=False), min_free_bytes=2**62) as here:
        refused(await here.client.post(SUBMIT, json=order(), headers=ASYNC), 503, "no_space")
        assert await listed(here.client) == []


# --- request ids -----------------------------------------------------------------------------------------------------


async def test_a_plain_request_id_of_the_clients_is_kept(still: World) -> None:
    """It comes back in the header and in the error."""
    for given in ("abc", "A.b_c-9", "x" * 64):
        answer = await still.client.get("/v1/tasks/unknown", headers={"x-request-id": given})
        assert refused(answer, 404)["request_id"] == given


async def test_any_other_request_id_is_replaced_by_one_of_ours(still: World) -> None:
    """What could break a log line or a header is not taken over."""
    for given in ("", "x" * 65, "a b", 'a"b', "a;b"):
        answer = await still.client.get("/healthz", headers={"x-request-id": given})
        assert re.fullmatch(an_id("req"), answer.headers["x-request-id"])
