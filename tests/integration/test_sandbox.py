"""The sandbox upstream over real sockets: its wire format, its callbacks and its faults."""

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from service.upstreams.sandbox import SandboxOptions, create_sandbox
from tests.waiting import wait_until

ORDER = {"model": "wan2.5-text-to-image", "prompt": "a lighthouse, 灯塔", "size": "768x768"}
QUICK = SandboxOptions(networks=(ip_network("127.0.0.0/8"),), delay_s=0, callback_delays_s=(0, 0, 0), seed=7)
KEY = {"authorization": "Bearer sk-test"}


class Server(uvicorn.Server):
    def __init__(self, app: ASGIApp) -> None:
        super().__init__(uvicorn.Config(app, log_config=None))
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[str]:
    """The application on a free port of loopback; its base URL."""
    server = Server(app)
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:  # asyncio turns Nagle's delay off only where it reads TCP
        listener.bind(("127.0.0.1", 0))
        running = asyncio.create_task(server.serve([listener]))
        await server.ready.wait()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running


@asynccontextmanager
async def sandbox(options: SandboxOptions = QUICK, clock: Callable[[], float] | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key, of a running sandbox."""
    app = create_sandbox(options) if clock is None else create_sandbox(options, clock)
    async with serving(app) as base, httpx.AsyncClient(base_url=base, headers=KEY, trust_env=False) as client:
        yield client


@dataclass
class Receiver:
    """Answers callbacks with `statuses` one after another, then 200; keeps what came."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    bodies: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    requests: list[Request] = field(default_factory=list)

    async def take(self, request: Request) -> Response:
        self.requests.append(request)
        self.bodies.put_nowait(await request.body())
        return Response(status_code=self.statuses.pop(0) if self.statuses else 200)

    async def next(self) -> Any:
        return json.loads(await asyncio.wait_for(self.bodies.get(), 10))


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with serving(Starlette(routes=[Route("/callbacks", receiver.take, methods=["POST"])])) as base:
        receiver.url = f"{base}/callbacks"
        yield receiver


async def submit(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return await client.post("/v1/images/generations", json=ORDER | fields, headers=headers)


async def finished(client: httpx.AsyncClient, **fields: Any) -> Any:
    """A task's terminal document: its answer is held until its end, so the first query tells it."""
    answer = await submit(client, sandbox={"callback_first": True} | fields.pop("sandbox", {}), **fields)
    return (await client.get(f"/v1/tasks/{answer.json()['id']}")).json()


# --- the wire format -------------------------------------------------------------------------------------------------


async def test_a_submission_is_answered_as_documented() -> None:
    """200, pending, with the reserved credits; never an image."""
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
    """As many images as asked for, of the asked size and a decimal price; the links live at the address that was called."""
    async with sandbox() as client:
        task = await finished(client, n=3)
        files = [await client.get(url) for url in task["results"]]
        credits = (await client.get("/v1/credits")).json()
    assert (task["status"], task["progress"], task["usage"]["credits_used"]) == ("completed", 100, 4.5)
    assert all(url.startswith(str(client.base_url)) for url in task["results"])
    assert [(file.status_code, file.headers["content-type"]) for file in files] == [(200, "image/png")] * 3
    assert {Image.open(io.BytesIO(file.content)).size for file in files} == {(768, 768)}
    assert len({file.content for file in files}) == 3
    assert credits["success"] is True
    assert credits["data"]["token"]["remaining_credits"] == 10000 - 4.5


async def test_models_are_listed() -> None:
    """The two documented ones."""
    async with sandbox() as client:
        models = (await client.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["wan2.5-text-to-image", "wan2.5-image-to-image"]


@pytest.mark.parametrize("header", ["", "Basic sk-test", "Bearer", "Bearer sk-wrong"])
async def test_a_missing_or_wrong_key_is_401(header: str) -> None:
    """On every path that wants one."""
    async with sandbox(replace(QUICK, api_key="sk-test")) as client:
        assert (await client.get("/v1/credits")).status_code == 200
        for path in ("/v1/credits", "/v1/models", "/v1/tasks/x", "/sandbox/tasks"):
            answer = await client.get(path, headers={"authorization": header})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")


async def test_errors_have_the_documented_shape() -> None:
    """Code, message and type always, the field where there is one; also for what no route answers."""
    async with sandbox() as client:
        refused = await submit(client, n=9)
        large = await client.post("/v1/images/generations", content=b" " * (1 << 20) + b"{}")
        lost = await client.get("/v1/tasks/task-unified-1-abcdefgh")
        nowhere = await client.get("/v1/nothing")
        wrong_method = await client.get("/v1/images/generations")
    assert refused.json() == {
        "error": {"code": "invalid_parameter", "message": "n must be an integer from 1 to 4", "type": "invalid_request_error", "param": "n"}
    }
    answers = [(answer.status_code, answer.json()["error"]["code"]) for answer in (large, lost, nowhere, wrong_method)]
    assert answers == [(413, "request_too_large"), (404, "task_not_found"), (404, "not_found"), (405, "method_not_allowed")]
    assert wrong_method.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "url", ["http://8.8.8.8/cb", "https://10.0.0.1/cb", "https://[::1]/cb", "https://169.254.169.254/cb", "ftp://8.8.8.8/", "", "//x"]
)
async def test_a_callback_url_must_be_https_and_public(url: str) -> None:
    """Plain http, private and link-local addresses are refused before anything is created."""
    async with sandbox() as client:
        answer = await submit(client, callback_url=url)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "callback_url")
        assert (await client.get("/sandbox/tasks")).json() == {"data": []}


async def test_loopback_is_refused_unless_it_is_allowed(receiver: Receiver) -> None:
    """The options' networks lift the rules, and nothing else does."""
    async with sandbox(replace(QUICK, networks=())) as client:
        assert (await submit(client, callback_url=receiver.url)).status_code == 400
        assert (await submit(client, callback_url="https://name.invalid/cb", sandbox={"drop_callback": True})).status_code == 200


async def test_an_empty_account_is_402_and_nothing_is_created() -> None:
    """The price of all n images is reserved first; what was not used comes back at the end."""
    async with sandbox(replace(QUICK, credits=Decimal(3))) as client:
        assert (await submit(client, n=3)).json()["error"]["code"] == "insufficient_quota"
        await finished(client, n=2, sandbox={"fail": "service_error"})
        await finished(client, n=2, sandbox={"images": 1})
        assert (await submit(client, n=2)).status_code == 402
        assert (await client.get("/v1/credits")).json()["data"]["token"]["remaining_credits"] == 1.5


async def test_an_idempotency_key_creates_one_task() -> None:
    """The same body is answered with the first task, whatever the order of its fields; another body is a conflict."""
    key = {"idempotency-key": "task_0123456789abcdef"}
    async with sandbox() as client:
        first = await submit(client, key)
        again = await client.post("/v1/images/generations", json=dict(reversed(ORDER.items())), headers=key)
        other = await submit(client, key, prompt="a dog")
        bad = await submit(client, {"idempotency-key": "short"})
        tasks = (await client.get("/sandbox/tasks")).json()["data"]
    assert again.json() == first.json()
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (None, "true")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert bad.status_code == 400
    assert [task["idempotency_key"] for task in tasks] == ["task_0123456789abcdef"]


async def test_tasks_and_links_die_in_their_time() -> None:
    """A link lives `result_ttl_s` after the end, a task `task_ttl_s` after its creation, its idempotency key with it."""
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


async def test_a_seed_makes_ids_repeatable() -> None:
    """Two sandboxes with one seed and one clock name their tasks alike."""
    ids = []
    for _ in range(2):
        async with sandbox(QUICK, lambda: 5.0) as client:
            ids.append((await submit(client)).json()["id"])
    assert ids[0] == ids[1]


async def test_the_links_carry_the_configured_base_url() -> None:
    """Behind a proxy the called address is not the public one."""
    async with sandbox(replace(QUICK, base_url="https://files.sandbox.example/")) as client:
        task = await finished(client)
    assert task["results"] == [f"https://files.sandbox.example/files/{task['id']}/0.png"]


async def test_a_running_task_is_pending_and_stops_with_the_sandbox() -> None:
    """The lifespan ends while tasks run: nothing is awaited to their end."""
    async with asyncio.timeout(10):
        async with sandbox() as client:
            task = (await submit(client, sandbox={"delay": 3600})).json()
            waiting = (await client.get(f"/v1/tasks/{task['id']}")).json()
    assert (waiting["status"], waiting["task_info"], "results" in waiting) == ("pending", {"can_cancel": True}, False)


# --- callbacks -------------------------------------------------------------------------------------------------------


async def test_a_callback_is_the_body_of_the_query(receiver: Receiver) -> None:
    """POST with JSON, once, when the task has ended."""
    async with sandbox() as client:
        task_id = (await submit(client, callback_url=receiver.url)).json()["id"]
        body = await receiver.next()
        assert body == (await client.get(f"/v1/tasks/{task_id}")).json()
    assert [request.headers["content-type"] for request in receiver.requests] == ["application/json"]


async def test_a_callback_is_retried_three_times_and_then_lost(receiver: Receiver) -> None:
    """Everything but 2xx is retried, redirects too; after the fourth attempt nothing more comes."""
    receiver.statuses = [500, 307, 404, 503]
    async with sandbox() as client:
        task = await finished(client, callback_url=receiver.url)
        assert [(await receiver.next())["id"] for _ in range(4)] == [task["id"]] * 4

        async def all_calls() -> list[dict[str, Any]] | None:
            calls: list[dict[str, Any]] = (await client.get("/sandbox/tasks")).json()["data"][0]["callbacks"]
            return calls if len(calls) == 4 else None

        calls = await wait_until(all_calls) or []
    assert [call["status"] for call in calls] == [500, 307, 404, 503]
    assert len(receiver.requests) == 4


async def test_a_callback_ends_with_the_first_success(receiver: Receiver) -> None:
    """Any 2xx is success."""
    receiver.statuses = [503, 204]
    async with sandbox() as client:
        await submit(client, callback_url=receiver.url)
        assert await receiver.next() == await receiver.next()
    assert len(receiver.requests) == 2


async def test_a_receiver_that_is_not_there_is_tried_as_often() -> None:
    """A refused connection is an attempt like any other, and is recorded."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with sandbox(replace(QUICK, callback_delays_s=())) as client:
            await finished(client, callback_url=f"http://127.0.0.1:{closed.getsockname()[1]}/cb")
            (task,) = (await client.get("/sandbox/tasks")).json()["data"]
    assert [(call["status"], call["problem"].split(":")[0]) for call in task["callbacks"]] == [(None, "NotConnected")]


# --- faults ----------------------------------------------------------------------------------------------------------


async def test_a_failed_task_says_why_and_is_not_charged() -> None:
    """The documented error object, no results."""
    async with sandbox() as client:
        task = await finished(client, sandbox={"fail": "content_policy_violation"})
        assert (await client.get("/v1/credits")).json()["data"]["token"]["remaining_credits"] == 10000
    assert (task["status"], task["error"]["code"], "results" in task) == ("failed", "content_policy_violation", False)


@pytest.mark.parametrize(("form", "status", "code"), [("status", "cancelled", None), ("code", "failed", "request_cancelled")])
async def test_a_task_is_cancelled_in_both_forms(form: str, status: str, code: str | None) -> None:
    """By a status nobody lists, or as failed with a code."""
    async with sandbox() as client:
        task = await finished(client, sandbox={"cancel": form})
    assert (task["status"], task.get("error", {}).get("code")) == (status, code)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
async def test_results_come_in_the_asked_format(format: str) -> None:
    """Content type and content agree."""
    async with sandbox() as client:
        task = await finished(client, sandbox={"format": format})
        file = await client.get(task["results"][0])
    assert file.headers["content-type"] == f"image/{format}"
    assert Image.open(io.BytesIO(file.content)).format == format.upper()


async def test_an_unknown_fault_is_refused_by_name() -> None:
    """400 that names it, also at the start for a default one."""
    async with sandbox() as client:
        answer = await submit(client, sandbox={"explode": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "sandbox")
    assert "explode" in answer.json()["error"]["message"]
    with pytest.raises(ValueError, match="explode"):
        create_sandbox(replace(QUICK, faults={"explode": 1}))


async def test_default_faults_hold_for_every_request() -> None:
    """Until a request says otherwise."""
    async with sandbox(replace(QUICK, faults={"fail": "service_error"})) as client:
        assert (await finished(client))["status"] == "failed"
        assert (await finished(client, sandbox={"fail": None}))["status"] == "completed"


async def test_the_callback_can_come_before_the_answer(receiver: Receiver) -> None:
    """The submission is answered only after the receiver has answered."""
    async with sandbox() as client:
        answer = await submit(client, callback_url=receiver.url, sandbox={"callback_first": True})
        assert len(receiver.requests) == 1
        assert (await receiver.next())["id"] == answer.json()["id"]
    assert answer.json()["status"] == "pending"


async def test_callbacks_can_be_dropped_repeated_contradicted_and_unreadable(receiver: Receiver) -> None:
    """What is sent is built in the table's order; the query keeps the truth."""
    async with sandbox() as client:
        await finished(client, callback_url=receiver.url, sandbox={"drop_callback": True})
        assert receiver.requests == []
        await submit(client, callback_url=receiver.url, sandbox={"repeat_callback": 3, "contradict": True, "garbage_callback": True})
        told = [await receiver.next() for _ in range(4)]
        assert [body["status"] for body in told] == ["completed"] * 3 + ["failed"]
        assert await receiver.bodies.get() == b"\x00{not json"
        assert (await client.get(f"/v1/tasks/{told[0]['id']}")).json() == told[0]
        switched_off = {"drop_callback": False, "contradict": False, "garbage_callback": False}
        await submit(client, callback_url=receiver.url, sandbox=switched_off)
        assert (await receiver.next())["status"] == "completed"
    assert len(receiver.requests) == 6


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (500, "internal_error"), (503, "service_unavailable")])
async def test_a_submission_can_be_refused_with_json(status: int, code: str) -> None:
    """Nothing is created."""
    async with sandbox() as client:
        answer = await submit(client, sandbox={"submit_status": status})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert (await client.get("/sandbox/tasks")).json() == {"data": []}


async def test_a_submission_can_be_refused_once_with_a_page() -> None:
    """`times` counts what comes under one key, or with one body."""
    fault = {"submit_status": {"status": 503, "html": True, "retry_after": 2, "times": 1}}
    async with sandbox() as client:
        first = await submit(client, sandbox=fault)
        second = await submit(client, sandbox=fault)
    assert (first.status_code, first.headers["retry-after"], first.text[:15]) == (503, "2", "<!DOCTYPE html>")
    assert second.status_code == 200


async def test_an_answer_can_get_lost_after_the_task_was_created() -> None:
    """The connection breaks, the task lives; the same key finds it again."""
    key = {"idempotency-key": "task_0123456789abcdef"}
    async with sandbox() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await submit(client, key, sandbox={"lose_answer": True})
        again = await submit(client, key, sandbox={"lose_answer": True})
        (task,) = (await client.get("/sandbox/tasks")).json()["data"]
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (task["id"], "true")


async def test_queries_and_files_can_fail_for_a_while() -> None:
    """Each counts for itself, files one by one."""
    fault = {"query_status": {"status": 404, "times": 1}, "file_status": {"status": 403, "code": "access_denied", "times": 1}}
    async with sandbox() as client:
        assert "error" in await finished(client, n=2, sandbox=fault)
        (task,) = (await client.get("/sandbox/tasks")).json()["data"]
        assert (await client.get(f"/v1/tasks/{task['id']}")).json()["status"] == "completed"
        for url in task["results"]:
            assert [(await client.get(url)).status_code for _ in range(2)] == [403, 200]


async def test_answers_can_come_late_and_wait_for_nobody_who_left() -> None:
    """A client that gave up does not keep the sandbox from stopping."""
    async with asyncio.timeout(10):
        async with sandbox() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/images/generations", json=ORDER | {"sandbox": {"submit_delay": 3600}}, timeout=0.05)
            task = await finished(client, sandbox={"submit_delay": 0.01, "query_delay": 0.01})
    assert task["status"] == "completed"
