"""The sandbox's faults in tasks, submissions, queries and callbacks. A flag or a
request sets them.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.upstreams.sandbox.effects import TASK_ERRORS
from tests.sandbox import ORDER, WAYS, Receiver, faulty, receiving, taken

pytestmark = pytest.mark.slow

KEYED = {"idempotency-key": "task_0123456789abcdef"}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


# --- how a task ends
# -------------------------------------------------------------------------------------------------


async def test_delay_is_how_long_a_task_takes(way: str) -> None:
    async with faulty(way, delay=3600) as here:
        task_id = (await here.submit()).json()["id"]
        assert (await here.client.get(f"/v1/tasks/{task_id}")).json()["status"] == "pending"
        assert (await here.finished(sandbox={"delay": 0}))["status"] == "completed"


async def test_images_is_how_many_a_task_brings(way: str) -> None:
    """The task completes with fewer images than requested and is charged for these. A task without
    images completes too.
    """
    async with faulty(way, images=1) as here:
        task = await here.finished(n=3)
        none = await here.finished(sandbox={"images": 0})
    assert (task["status"], len(task["results"]), task["usage"]["credits_used"]) == (
        "completed",
        1,
        1.5,
    )
    assert (none["status"], none["results"], none["usage"]["credits_used"]) == ("completed", [], 0)


async def test_fail_ends_a_task_with_each_documented_code(way: str) -> None:
    """A failed task has the documented error object, no results and no charge."""
    async with faulty(way, fail="service_error") as here:
        for code in ("service_error", *TASK_ERRORS):
            task = await here.finished(sandbox={} if code == "service_error" else {"fail": code})
            assert task["error"] == {
                "code": code,
                "message": TASK_ERRORS[code],
                "type": "task_error",
            }
            assert (task["status"], "results" in task) == ("failed", False)
        assert (await here.client.get("/v1/credits")).json()["data"]["token"][
            "remaining_credits"
        ] == 10000


@pytest.mark.parametrize(
    ("form", "status", "code"),
    [("status", "cancelled", None), ("code", "failed", "request_cancelled")],
)
async def test_cancel_ends_a_task_in_both_forms(
    way: str, form: str, status: str, code: str | None
) -> None:
    """The task ends with an undocumented status, or as failed with a code."""
    async with faulty(way, cancel=form) as here:
        task = await here.finished()
    assert (task["status"], task.get("error", {}).get("code"), "results" in task) == (
        status,
        code,
        False,
    )


async def test_results_can_be_objects_or_result_data(way: str, receiver: Receiver) -> None:
    """Both forms appear in queries and callbacks, and their links work. The upstream's pages do not
    document these forms. Published clients read them.
    """
    async with faulty(way, results="objects") as here:
        objects = await here.finished(n=2, callback_url=receiver.url)
        data = await here.finished(n=2, sandbox={"results": "result_data"})
        links = [entry["url"] for entry in objects["results"]] + [
            entry["image_url"] for entry in data["result_data"]
        ]
        assert [(await here.client.get(link)).status_code for link in links] == [200] * 4
        assert await receiver.next() == objects
    assert "results" not in data


async def test_usage_can_be_absent_or_any_decimal(way: str) -> None:
    """`absent` also removes the usage from the answer to the submission. A number sets the charged
    credits of a completed task.
    """
    async with faulty(way, usage="absent") as here:
        assert "usage" not in (await here.submit()).json()
        assert "usage" not in await here.finished()
        assert (await here.finished(n=2, sandbox={"usage": 8.7}))["usage"]["credits_used"] == 8.7
        assert "usage" not in await here.finished(sandbox={"usage": 8.7, "fail": "service_error"})


# --- submissions
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (402, "insufficient_quota"),
        (429, "rate_limit_exceeded"),
        (500, "internal_error"),
        (503, "service_unavailable"),
    ],
)
async def test_submit_status_refuses_with_json(way: str, status: int, code: str) -> None:
    """The answer is the documented error, and no task is created."""
    async with faulty(way, submit_status=status) as here:
        answer = await here.submit()
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert await here.created() == []


@pytest.mark.parametrize("status", [502, 503, 524])
async def test_submit_status_refuses_with_a_page_so_many_times(way: str, status: int) -> None:
    """The answer is a gateway's page of several kilobytes. `times` counts the submissions with the
    same key, or with the same body if there is no key.
    """
    async with faulty(
        way, submit_status={"status": status, "html": True, "retry_after": 2, "times": 1}
    ) as here:
        first, second, third = await here.submit(), await here.submit(), await here.submit(KEYED)
    assert (first.status_code, first.headers["retry-after"], first.text[:15]) == (
        status,
        "2",
        "<!DOCTYPE html>",
    )
    assert len(first.content) > 2048
    assert (second.status_code, third.status_code) == (200, status)


async def test_lose_submission_cuts_the_connection_before_anything_is_created(way: str) -> None:
    """The sandbox closes the connection without an answer for the given number of submissions. It
    accepts the next one.
    """
    async with faulty(way, lose_submission=2) as here:
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
                await here.submit(KEYED)
        assert await here.created() == []
        assert (await here.submit(KEYED)).status_code == 200


async def test_lose_answer_cuts_the_connection_after_the_task_was_created(way: str) -> None:
    """The client gets no answer, but the task exists. A submission under the same key finds it."""
    async with faulty(way, lose_answer=True) as here:
        with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
            await here.submit(KEYED)
        again = await here.submit(KEYED)
        (task,) = await here.created()
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (task["id"], "true")


async def test_submit_cut_breaks_the_answer_off_in_the_middle(way: str) -> None:
    """The head and the given number of bytes arrive, and the task exists."""
    async with faulty(way, submit_cut=30) as here:
        body, whole = await taken(
            here.client, "POST", "/v1/images/generations", json=ORDER | {"sandbox": here.asked}
        )
        (task,) = await here.created()
    assert (len(body), whole) == (30, False)
    assert body.startswith(f'{{"created":{task["created"]},'.encode())


async def test_submit_delay_lets_a_submission_time_out(way: str) -> None:
    """The task is created before the delay. Refusals are delayed too. A client that gave up does
    not keep the sandbox from stopping.
    """
    async with asyncio.timeout(60), faulty(way, submit_delay=3600) as here:
        here.client.timeout = httpx.Timeout(20, read=0.2)  # a busy machine connects slowly
        with pytest.raises(httpx.ReadTimeout):
            await here.submit()
        with pytest.raises(httpx.ReadTimeout):
            await here.submit(sandbox={"submit_status": 503})
        here.client.timeout = httpx.Timeout(20)
        assert len(await here.created()) == 1
        assert (await here.submit(sandbox={"submit_delay": 0.01})).status_code == 200


async def test_callback_first_answers_a_submission_after_its_callback(
    way: str, receiver: Receiver
) -> None:
    """The sandbox answers the submission only after the receiver has answered the callback."""
    async with faulty(way, callback_first=True) as here:
        answer = await here.submit(callback_url=receiver.url)
        assert len(receiver.requests) == 1
        assert (await receiver.next())["id"] == answer.json()["id"]
    assert answer.json()["status"] == "pending"


# --- queries
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("html", [True, False])
async def test_query_status_fails_queries_for_a_while(way: str, html: bool) -> None:
    """The first queries get the upstream's error or a gateway's page. Later queries get
    the task.
    """
    async with faulty(way, query_status={"status": 502, "html": html, "times": 2}) as here:
        url = f"/v1/tasks/{(await here.submit()).json()['id']}"
        answers = [await here.client.get(url) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [502, 502, 200]
    assert (answers[0].text[:15] == "<!DOCTYPE html>") is html
    assert html or answers[0].json()["error"]["code"] == "upstream_error"


async def test_query_delay_lets_a_query_time_out(way: str) -> None:
    """A client with a longer timeout gets the answer."""
    async with asyncio.timeout(60), faulty(way, query_delay=3600) as here:
        url = f"/v1/tasks/{(await here.submit()).json()['id']}"
        with pytest.raises(httpx.ReadTimeout):
            await here.client.get(url, timeout=httpx.Timeout(20, read=0.2))
        assert (await here.finished(sandbox={"query_delay": 0.01}))["status"] == "completed"


async def test_query_cut_breaks_answers_off(way: str) -> None:
    """The connection ends after the given number of bytes."""
    async with faulty(way, query_cut=40) as here:
        url = f"/v1/tasks/{(await here.submit()).json()['id']}"
        body, whole = await taken(here.client, "GET", url)
        assert (len(body), body[:11], whole) == (40, b'{"created":', False)
        assert (await here.finished(sandbox={"query_cut": None}))["status"] == "completed"


async def test_query_times_ends_the_faults_of_queries(way: str) -> None:
    """Only the first `query_times` queries of each task fail."""
    async with faulty(way, query_status=503, query_times=1) as here:
        for _ in range(2):
            url = f"/v1/tasks/{(await here.submit()).json()['id']}"
            assert [(await here.client.get(url)).status_code for _ in range(3)] == [503, 200, 200]


# --- callbacks
# --------------------------------------------------------------------------------------------------


async def test_drop_callback_sends_none(way: str, receiver: Receiver) -> None:
    """The task itself ends as usual."""
    async with faulty(way, drop_callback=True) as here:
        assert (await here.finished(callback_url=receiver.url))["status"] == "completed"
        assert (await here.created())[0]["callbacks"] == []
        assert receiver.requests == []
        await here.finished(callback_url=receiver.url, sandbox={"drop_callback": False})
    assert len(receiver.requests) == 1


async def test_repeat_callback_sends_it_so_many_times(way: str, receiver: Receiver) -> None:
    async with faulty(way, repeat_callback=5) as here:
        task = await here.finished(callback_url=receiver.url)
        assert [await receiver.next() for _ in range(5)] == [task] * 5
    assert receiver.bodies.empty()


@pytest.mark.parametrize(
    ("fault", "told"),
    [({}, ["completed", "failed"]), ({"fail": "service_error"}, ["failed", "completed"])],
)
async def test_contradict_sends_the_opposite_after_the_truth(
    way: str, receiver: Receiver, fault: dict[str, Any], told: list[str]
) -> None:
    """The query keeps the true status."""
    async with faulty(way, contradict=True) as here:
        task = await here.finished(callback_url=receiver.url, sandbox=fault)
        bodies = [await receiver.next() for _ in range(2)]
    assert [body["status"] for body in bodies] == told
    assert (bodies[0], bodies[1]["id"]) == (task, task["id"])


async def test_garbage_callback_sends_what_nobody_can_read(way: str, receiver: Receiver) -> None:
    """After the true callback the sandbox sends bytes that are not JSON to the same address."""
    async with faulty(way, garbage_callback=True) as here:
        assert (await here.finished(callback_url=receiver.url)) == await receiver.next()
        body = await asyncio.wait_for(receiver.bodies.get(), 30)
    with pytest.raises(ValueError):
        json.loads(body)
