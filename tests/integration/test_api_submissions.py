"""Answers to a submission: idempotency keys, preferences, and rejections by the upstream."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, listed, order, refused, submitted
from tests.upstream import Upstream
from tests.waiting import wait_until
from tests.world import TEXT_TO_IMAGE, World, world

JSON = dict[str, Any]
LATE = {"delay": 600}  # the task outlasts the test


# --- idempotency
# --------------------------------------------------------------------------------------------------


async def keyed(client: httpx.AsyncClient, key: str, body: JSON, **headers: str) -> httpx.Response:
    return await client.post(SUBMIT, json=body, headers=ASYNC | {"idempotency-key": key, **headers})


async def test_the_same_key_and_body_answer_the_first_task(still: World) -> None:
    """A header marks the answer as replayed."""
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
    """The order of fields, spaces and escapes do not matter."""
    async with still.owner() as client:
        first = got(
            await keyed(
                client, "k", {"model": "m", "prompt": "pear", "n": 1, "x": {"a": None, "b": [1, 2]}}
            )
        )
        headers = ASYNC | {"idempotency-key": "k", "content-type": "application/json"}
        again = await client.post(SUBMIT, content=text, headers=headers)
        assert got(again)["id"] == first["id"]
        assert again.headers["idempotency-replayed"] == "true"


async def test_another_body_under_the_same_key_is_a_conflict(still: World) -> None:
    """409 names the header and the first task. The order of a list, types, and missing fields count
    as differences.
    """
    async with still.owner() as client:
        task = got(await keyed(client, "k", order(x=[1, 2])))
        for body in (
            order(x=[2, 1]),
            order(x=[1, "2"]),
            order(),
            order(x=[1, 2], y=None) | {"y": None},
        ):
            refused(
                await keyed(client, "k", body),
                409,
                "idempotency_conflict",
                param="Idempotency-Key",
                task_id=task["id"],
            )
        assert len(await listed(client)) == 1


async def test_a_key_is_looked_up_before_the_body_is_validated(still: World) -> None:
    """An invalid body is a conflict when its key is taken. A rejected body takes no key."""
    async with still.owner() as client:
        refused(await keyed(client, "k", order(n=99)), 400, "invalid_parameter", param="n")
        task = got(await keyed(client, "k", order(n=1)))
        refused(
            await keyed(client, "k", order(n=99)),
            409,
            "idempotency_conflict",
            param="Idempotency-Key",
            task_id=task["id"],
        )
        refused(
            await keyed(client, "k", {"model": 7}),
            409,
            "idempotency_conflict",
            param="Idempotency-Key",
            task_id=task["id"],
        )


async def test_keys_belong_to_their_owner(still: World) -> None:
    """Two owners with one key have two tasks, and two API keys of one owner have one."""
    async with (
        still.owner(name="kay") as one,
        still.owner(name="kay") as same,
        still.owner() as other,
    ):
        first = got(await keyed(one, "k", order()))
        assert got(await keyed(same, "k", order()))["id"] == first["id"]
        answer = await keyed(other, "k", order())
        assert got(answer)["id"] != first["id"]
        assert "idempotency-replayed" not in answer.headers


async def test_a_key_has_1_to_255_visible_ascii_characters(still: World) -> None:
    """Longer keys, empty keys, and keys with spaces or other characters are rejected by name."""
    async with still.owner() as client:
        for key in ("!", "~" * 255, 'a"b,c;d\\'):
            got(await keyed(client, key, order()))
        for bad in ("", "a" * 256, "a b", "a\tb"):
            refused(
                await keyed(client, bad, order()), 400, "invalid_request", param="Idempotency-Key"
            )
        for values in ([b"\xc3\xa9"], [b"one", b"two"]):
            headers = [(b"idempotency-key", value) for value in values]
            answer = await client.post(SUBMIT, json=order(), headers=headers)
            refused(answer, 400, "invalid_request", param="Idempotency-Key")


async def test_one_key_at_once_makes_one_task(still: World) -> None:
    """One of several concurrent requests creates the task, and the rest replay it."""
    async with still.owner() as client:
        answers = await asyncio.gather(*(keyed(client, "k", order()) for _ in range(8)))
        assert len({got(answer)["id"] for answer in answers}) == 1
        assert sum("idempotency-replayed" in answer.headers for answer in answers) == 7


async def test_a_refusal_is_replayed_with_its_status(here: World) -> None:
    """The answer has the upstream's status and error and our task's id. A repeated request gets the
    same.
    """
    refusal = {"submit_status": {"status": 422, "code": "moderation_blocked", "times": 1}}
    async with here.owner() as client:
        first = await client.post(
            SUBMIT, json=order(sandbox=refusal), headers={"idempotency-key": "k"}
        )
        task_id = first.json()["error"]["task_id"]
        error = refused(first, 422, "moderation_blocked", task_id=task_id)
        again = await client.post(
            SUBMIT,
            json=order(sandbox=refusal),
            headers={"idempotency-key": "k", "prefer": "wait=5"},
        )
        assert refused(again, 422, "moderation_blocked", task_id=task_id) | {
            "request_id": None
        } == error | {"request_id": None}
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["preference-applied"] == "wait=5"
        task = got(await client.get(f"/v1/tasks/{task_id}"))
        assert (task["state"], task["error"]["code"], task["upstream_id"]) == (
            "failed",
            "moderation_blocked",
            None,
        )


async def test_a_replay_waits_like_the_first(here: World) -> None:
    """`Prefer` applies to a replayed request too. The first task is held until its answer."""
    async with here.owner() as client:
        headers = {"idempotency-key": "k"}
        pause = {"paused": True, "reason": "a test"}
        got(await here.client.post("/v1/submission", json=pause))
        first = got(await client.post(SUBMIT, json=order(), headers=headers | ASYNC))
        assert first["state"] == "queued"
        got(await here.client.post("/v1/submission", json={"paused": False}))
        again = got(await client.post(SUBMIT, json=order(), headers=headers | UNTIL_DONE))
        assert (again["id"], again["state"]) == (first["id"], "completed")


# --- how a submission is answered
# ------------------------------------------------------------------------------------


async def test_without_a_preference_the_answer_waits_for_the_first_outcome(here: World) -> None:
    """The answer contains the upstream's result, and it names no applied preference."""
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
        (["wait=0, wait=60"], "wait=0"),
        (["wait=0", "wait=60"], "wait=0"),
    ],
)
async def test_a_preference_is_applied_and_named(
    still: World, prefer: list[str], applied: str
) -> None:
    """`wait` wins over `respond-async`. No worker runs here, so the task comes back as it was
    committed.
    """
    headers = [("prefer", value) for value in prefer]
    answer = await still.client.post(SUBMIT, json=order(), headers=headers)
    assert got(answer)["state"] == "queued"
    assert answer.headers["preference-applied"] == applied


async def test_no_answer_is_held_longer_than_two_minutes(here: World) -> None:
    """The applied wait is at most 120 seconds."""
    answer = await here.client.post(SUBMIT, json=order(), headers={"prefer": "wait=99999999999"})
    assert got(answer)["state"] == "completed"
    assert answer.headers["preference-applied"] == "wait=120"


@pytest.mark.parametrize(
    "prefer", ["wait", "wait=", "wait=x", "wait=-1", "wait=1.5", "wait=٣", "return=minimal", ",,;"]
)
async def test_preferences_that_say_nothing_are_ignored(here: World, prefer: str) -> None:
    """The answer is the same as without a preference, and it names none."""
    answer = await here.client.post(
        SUBMIT, json=order(sandbox=LATE), headers=[(b"prefer", prefer.encode())]
    )
    assert got(answer)["state"] == "submitted"
    assert "preference-applied" not in answer.headers


async def test_a_client_that_leaves_changes_nothing(here: World) -> None:
    """The task continues after the client has disconnected."""
    async with here.owner() as client:
        waiting = asyncio.create_task(
            client.post(SUBMIT, json=order(sandbox={"delay": 0.3}), headers=UNTIL_DONE)
        )
        task_id = (await wait_until(lambda: listed(client)))[0]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await here.ended(task_id))["state"] == "completed"


async def test_the_upstream_gets_the_clients_fields_and_nothing_of_ours(tmp_path: Path) -> None:
    """Unknown fields are passed on. `metadata` and the client's `callback_url` are not. The
    upstream's idempotency key is our task's id.
    """
    upstream = Upstream()
    async with world(tmp_path, upstream=upstream.app) as here, here.owner() as client:
        fields = {
            "seed": 7,
            "image_urls": ["https://x.test/1.png"],
            "deep": {"a": [None, 1.5, "ü"]},
        }
        task = await submitted(
            client,
            {},
            prompt="plain",
            size=None,
            metadata={"a": "b"},
            callback_url="http://127.0.0.1:9/x?y=z",
            **fields,
        )
        (sent,) = upstream.received["plain"]
        ours = here.callback_url(task["id"])
        assert json.loads(sent.body) == {
            "model": TEXT_TO_IMAGE,
            "prompt": "plain",
            **fields,
            "callback_url": ours,
        }
        assert sent.headers["idempotency-key"] == task["id"]
        assert sent.headers["authorization"] == "Bearer sandbox"
        assert task["request"] == fields
        task_two = await submitted(
            client, {}, prompt="two", model_params={"task_id": task["id"], "k": 1}
        )
        assert json.loads(upstream.received["two"][0].body)["model_params"] == {
            "task_id": task["upstream_id"],
            "k": 1,
        }
        assert task_two["request"]["model_params"] == {"task_id": task["id"], "k": 1}
