"""The sandbox upstream over real sockets: its wire format and its callbacks."""

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from PIL import Image

from tests.inputs import photo
from tests.sandbox import ORDER, QUICK, WAYS, Receiver, faulty, finished, receiving, sandbox, submit
from tests.waiting import wait_until


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


# --- the wire format
# -------------------------------------------------------------------------------------------------


async def test_a_submission_is_answered_as_documented() -> None:
    """The answer is 200 with a pending task and its reserved credits, and contains no image."""
    async with sandbox(replace(QUICK, delay_s=44.5)) as client:
        answer = await submit(client, n=2)
    task = answer.json()
    assert answer.status_code == 200
    assert task["id"].startswith(f"task-unified-{task['created']}-")
    assert task | {"id": "", "created": 0} == {
        "created": 0,
        "id": "",
        "model": "wan2.5-text-to-image",
        "object": "image.generation.task",
        "progress": 0,
        "status": "pending",
        "type": "image",
        "task_info": {"can_cancel": True, "estimated_time": 45},
        "usage": {"billing_rule": "per_call", "credits_reserved": 3, "user_group": "default"},
    }


async def test_a_completed_task_links_to_real_images_and_is_charged() -> None:
    """The task has the requested number of images in the requested size, and a decimal price. Its
    links use the address of the request.
    """
    async with sandbox() as client:
        task = await finished(client, n=3)
        files = [await client.get(url) for url in task["results"]]
        credits = (await client.get("/v1/credits")).json()
    assert (task["status"], task["progress"], task["usage"]["credits_used"]) == (
        "completed",
        100,
        4.5,
    )
    assert all(url.startswith(str(client.base_url)) for url in task["results"])
    assert [(file.status_code, file.headers["content-type"]) for file in files] == [
        (200, "image/png")
    ] * 3
    assert {Image.open(io.BytesIO(file.content)).size for file in files} == {(768, 768)}
    assert len({file.content for file in files}) == 3
    assert credits["success"] is True
    assert credits["data"]["token"]["remaining_credits"] == 10000 - 4.5


@pytest.mark.parametrize(
    ("fields", "price", "credits"),
    [
        ({"n": 3}, None, 6),
        ({"model": "krea-2-turbo", "size": "16:9"}, None, 0.05),
        ({"model": "mj-v7", "size": None, "model_params": {"speed": "draft"}}, None, 2.7),
        ({"model": "gpt-image-2-beta", "size": "1:1", "resolution": "4K"}, None, 2.652),
        ({"model": "gpt-image-2", "size": "1:1", "n": 2}, None, 3),
        ({"n": 3}, Decimal("0.7"), 2.1),
    ],
)
async def test_a_task_costs_the_price_of_the_catalogue(
    fields: dict[str, Any], price: Decimal | None, credits: float
) -> None:
    """A model without a price has one of the sandbox's own. The option `price` replaces both."""
    async with sandbox(replace(QUICK, price=price)) as client:
        reserved = (await submit(client, **fields)).json()["usage"]["credits_reserved"]
        task = await finished(client, **fields)
        charges = (await client.get("/sandbox/charges")).json()["data"]
    assert [reserved, task["usage"]["credits_used"]] == [credits, credits]
    assert charges[1]["used"] == credits
    assert charges[1]["images_requested"] == charges[1]["images"] == len(task["results"])


@pytest.mark.parametrize(
    ("size", "format", "word"),
    [
        ((383, 400), "PNG", "383x400"),
        ((400, 5000), "PNG", None),
        ((400, 400), "PNG with alpha", "alpha"),
    ],
)
async def test_an_uploaded_input_image_must_be_within_the_limits_of_the_model(
    size: tuple[int, int], format: str, word: str | None
) -> None:
    mode = "RGBA" if "alpha" in format else "RGB"
    content = photo(format.partition(" ")[0], size, mode)
    async with sandbox() as client:
        sent = {"file": ("a", content)}
        stored = (await client.post("/api/v1/files/upload/stream", files=sent)).json()["data"]
        edited = "wan2.5-image-to-image"
        answer = await submit(client, model=edited, image_urls=[stored["file_url"]])
    assert answer.status_code == (400 if word else 200), answer.text
    if word:
        error = answer.json()["error"]
        assert error["param"] == "image_urls"
        assert word in error["message"]


@pytest.mark.parametrize("header", ["", "Basic sk-test", "Bearer", "Bearer sk-wrong"])
async def test_a_missing_or_wrong_key_is_401(header: str) -> None:
    """Every path that needs a key checks it."""
    async with sandbox(replace(QUICK, api_key="sk-test")) as client:
        assert (await client.get("/v1/credits")).status_code == 200
        for path in ("/v1/credits", "/v1/models", "/v1/tasks/x", "/sandbox/tasks"):
            answer = await client.get(path, headers={"authorization": header})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")


async def test_errors_have_the_documented_shape() -> None:
    """An error has a code, a message and a type, and names the field where there is one. Unknown
    paths and methods get the same shape.
    """
    async with sandbox() as client:
        refused = await submit(client, n=9)
        large = await client.post("/v1/images/generations", content=b" " * (1 << 20) + b"{}")
        lost = await client.get("/v1/tasks/task-unified-1-abcdefgh")
        nowhere = await client.get("/v1/nothing")
        wrong_method = await client.get("/v1/images/generations")
    assert refused.json() == {
        "error": {
            "code": "invalid_parameter",
            "message": "n must be a whole number from 1 to 4, not 9",
            "type": "invalid_request_error",
            "param": "n",
        }
    }
    answers = [
        (answer.status_code, answer.json()["error"]["code"])
        for answer in (large, lost, nowhere, wrong_method)
    ]
    assert answers == [
        (413, "request_too_large"),
        (404, "task_not_found"),
        (404, "not_found"),
        (405, "method_not_allowed"),
    ]
    assert wrong_method.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "url",
    [
        "http://8.8.8.8/cb",
        "https://10.0.0.1/cb",
        "https://[::1]/cb",
        "https://169.254.169.254/cb",
        "ftp://8.8.8.8/",
        "",
        "//x",
    ],
)
async def test_a_callback_url_must_be_https_and_public(url: str) -> None:
    """The sandbox refuses plain http, private and link-local addresses before it creates a task."""
    async with sandbox() as client:
        answer = await submit(client, callback_url=url)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "callback_url")
        assert (await client.get("/sandbox/tasks")).json() == {"data": []}


async def test_loopback_is_refused_unless_it_is_allowed(receiver: Receiver) -> None:
    """Only the `networks` option allows a callback to loopback. The sandbox does not resolve names
    at submission.
    """
    async with sandbox(replace(QUICK, networks=())) as client:
        assert (await submit(client, callback_url=receiver.url)).status_code == 400
        assert (
            await submit(
                client, callback_url="https://name.invalid/cb", sandbox={"drop_callback": True}
            )
        ).status_code == 200


async def test_an_empty_account_is_402_and_nothing_is_created() -> None:
    """The sandbox reserves the price of all n images first and returns the unused credits at the
    end.
    """
    async with sandbox(replace(QUICK, credits=Decimal(3))) as client:
        assert (await submit(client, n=3)).json()["error"]["code"] == "insufficient_quota"
        await finished(client, n=2, sandbox={"fail": "service_error"})
        await finished(client, n=2, sandbox={"images": 1})
        assert (await submit(client, n=2)).status_code == 402
        assert (await client.get("/v1/credits")).json()["data"]["token"]["remaining_credits"] == 1.5


async def test_an_idempotency_key_creates_one_task() -> None:
    """The same body gets the first task again, in any order of fields. Another body under the same
    key is a conflict.
    """
    key = {"idempotency-key": "task_0123456789abcdef"}
    async with sandbox() as client:
        first = await submit(client, key)
        again = await client.post(
            "/v1/images/generations", json=dict(reversed(ORDER.items())), headers=key
        )
        other = await submit(client, key, prompt="a dog")
        bad = await submit(client, {"idempotency-key": "short"})
        tasks = (await client.get("/sandbox/tasks")).json()["data"]
    assert again.json() == first.json()
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (
        None,
        "true",
    )
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert bad.status_code == 400
    assert [task["idempotency_key"] for task in tasks] == ["task_0123456789abcdef"]


async def test_tasks_and_links_die_in_their_time() -> None:
    """A link lives `result_ttl_s` after the end of its task. A task and its idempotency key live
    `task_ttl_s` after creation.
    """
    now = [1000.0]
    async with sandbox(replace(QUICK, result_ttl_s=60, task_ttl_s=120), lambda: now[0]) as client:
        task = await finished(client)
        early = await finished(client, sandbox={"link_ttl": 5})
        now[0] = 1005
        assert (await client.get(early["results"][0])).status_code == 404
        now[0] = 1059
        assert (await client.get(task["results"][0])).status_code == 200
        assert (await client.get(task["results"][0].replace("0.png", "1.png"))).status_code == 404
        now[0] = 1060
        assert (await client.get(task["results"][0])).status_code == 404
        assert (await client.get(f"/v1/tasks/{task['id']}")).status_code == 200
        key = {"idempotency-key": "k" * 16}
        kept = (await submit(client, key)).json()["id"]
        now[0] = 1180
        assert (await client.get(f"/v1/tasks/{task['id']}")).status_code == 404
        assert (await submit(client, key)).json()["id"] != kept


async def test_the_links_carry_the_configured_base_url() -> None:
    """Behind a proxy the address of the request is not the public address."""
    async with sandbox(replace(QUICK, base_url="https://files.sandbox.example/")) as client:
        task = await finished(client)
    assert task["results"] == [f"https://files.sandbox.example/files/{task['id']}/0.png"]


async def test_a_running_task_is_pending_and_stops_with_the_sandbox() -> None:
    """The lifespan ends at once although a task still runs."""
    async with asyncio.timeout(60):
        async with sandbox() as client:
            task = (await submit(client, sandbox={"delay": 3600})).json()
            waiting = (await client.get(f"/v1/tasks/{task['id']}")).json()
    assert (waiting["status"], waiting["task_info"], "results" in waiting) == (
        "pending",
        {"can_cancel": True},
        False,
    )


# --- callbacks
# --------------------------------------------------------------------------------------------------


async def test_a_callback_is_the_body_of_the_query(receiver: Receiver) -> None:
    """The sandbox posts the JSON once, when the task has ended."""
    async with sandbox() as client:
        task_id = (await submit(client, callback_url=receiver.url)).json()["id"]
        body = await receiver.next()
        assert body == (await client.get(f"/v1/tasks/{task_id}")).json()
    assert [request.headers["content-type"] for request in receiver.requests] == [
        "application/json"
    ]


async def test_a_callback_is_retried_three_times_and_then_lost(receiver: Receiver) -> None:
    """The sandbox retries after every status but 2xx, also after a redirect. It gives up after the
    fourth attempt.
    """
    receiver.statuses = [500, 307, 404, 503]
    async with sandbox() as client:
        task = await finished(client, callback_url=receiver.url)
        assert [(await receiver.next())["id"] for _ in range(4)] == [task["id"]] * 4

        async def all_calls() -> list[dict[str, Any]] | None:
            calls: list[dict[str, Any]] = (await client.get("/sandbox/tasks")).json()["data"][0][
                "callbacks"
            ]
            return calls if len(calls) == 4 else None

        calls = await wait_until(all_calls) or []
    assert [call["status"] for call in calls] == [500, 307, 404, 503]
    assert len(receiver.requests) == 4


async def test_a_callback_ends_with_the_first_success(receiver: Receiver) -> None:
    """Every 2xx status is a success."""
    receiver.statuses = [503, 204]
    async with sandbox() as client:
        await submit(client, callback_url=receiver.url)
        assert await receiver.next() == await receiver.next()
    assert len(receiver.requests) == 2


async def test_a_receiver_that_is_not_there_is_tried_as_often() -> None:
    """A refused connection counts and is recorded as an attempt."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with sandbox(replace(QUICK, callback_delays_s=())) as client:
            await finished(client, callback_url=f"http://127.0.0.1:{closed.getsockname()[1]}/cb")
            (task,) = (await client.get("/sandbox/tasks")).json()["data"]
    assert [(call["status"], call["problem"].split(":")[0]) for call in task["callbacks"]] == [
        (None, "NotConnected")
    ]


@pytest.mark.parametrize("way", WAYS)
async def test_slow_callback_dribbles_its_body(way: str, receiver: Receiver) -> None:
    """The head and one byte come at once, and the rest comes later. A stopping sandbox does not
    wait for the rest.
    """
    heads: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.put_nowait((await reader.readuntil(b"\r\n\r\n"), await reader.readexactly(1)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        heads.put_nowait((b"", b""))
        writer.close()

    async with (
        asyncio.timeout(60),
        await asyncio.start_server(take, "127.0.0.1", 0) as stalled,
        faulty(way, slow_callback=0.2) as here,
    ):
        assert await here.finished(callback_url=receiver.url) == await receiver.next()
        url = f"http://127.0.0.1:{stalled.sockets[0].getsockname()[1]}/"
        await here.submit(callback_url=url, sandbox={"slow_callback": 86400})
        head, first = await heads.get()
        assert await heads.get() == (b"", b"")
    assert (b"content-length: " in head.lower(), first) == (True, b"{")
