"""Under overload the service sheds client requests before it sheds callbacks."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.web import overload
from service.web.overload import LogSampler, PriorityGate
from service.web.routes import callback_route
from tests.api import SUBMIT, UNTIL_DONE, got, order, refused, submitted
from tests.callbacks import connected
from tests.waiting import wait_until
from tests.world import JSON, World, world


async def called(here: World, task: JSON) -> int:
    body = json.dumps({"id": task["upstream_id"], "status": "processing"})
    return (await here.stranger.post(here.callback_url(task["id"]), content=body)).status_code


async def test_clients_are_shed_before_callbacks(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a flood of callbacks is in hand, every client request gets 503 with `Retry-After`, also
    a read. Callbacks, probes and metrics still get their answers.
    """
    task = await submitted(here.client, UNTIL_DONE)
    monkeypatch.setattr(overload, "SHED_AT", 1)
    monkeypatch.setattr(overload, "LOG_EVERY_S", 1e9)
    monkeypatch.setattr(
        here.context.shedder, "log_sampler", LogSampler()
    )  # no request was shed before
    shed = here.context.resources.metrics.requests_shed._value.get
    before = shed()
    with capture_logs() as lines, here.context.gate.callback():
        for _ in range(3):
            answer = await here.client.post(SUBMIT, json=order())
            refused(answer, 503, "overloaded")
            assert answer.headers["retry-after"] == "1"
        refused(await here.client.get(f"/v1/tasks/{task['id']}"), 503, "overloaded")
        assert await called(here, task) == 200
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await here.client.get(path)).status_code == 200
    assert shed() - before == 4
    (line,) = [line for line in lines if line["event"] == "http.shed"]
    assert line["callbacks"] == 1
    got(await here.client.get(f"/v1/tasks/{task['id']}"))


async def test_callbacks_that_wait_to_be_begun_count_as_a_flood(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate recognizes a waiting callback by the first bytes of its request. Waiting client
    requests do not count, so a thousand clients may open streams at once.
    """
    task = await submitted(here.client, UNTIL_DONE)
    monkeypatch.setattr(overload, "BEGIN_PER_TURN", 1)
    gate = here.context.gate
    waited = list[int]()
    next_ = PriorityGate._next_turn

    def watched(self: PriorityGate) -> None:
        waited.append(self.queued_callbacks)
        next_(self)

    monkeypatch.setattr(PriorityGate, "_next_turn", watched)
    body = json.dumps({"id": task["upstream_id"], "status": "processing"}).encode()
    head = (
        f"POST {here.callback_url(task['id']).removeprefix(here.url)} HTTP/1.1\r\nhost:"
        f" x\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    for request, most in (
        (head.encode() + body, 20),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 0),
    ):
        waited.clear()
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(connected(here.url)) for _ in range(20)]
            for _, writer in opened:
                writer.write(request)
            for reader, _ in opened:
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert (max(waited) > 5, max(waited) <= most, gate.queued_callbacks) == (most > 0, True, 0)
    monkeypatch.setattr(overload, "SHED_AT", 1)
    with monkeypatch.context() as full:
        full.setattr(PriorityGate, "queued_callbacks", 1)
        refused(await here.client.get("/v1/tasks"), 503, "overloaded")
    got(await here.client.get("/v1/tasks"))


async def test_clients_requests_in_hand_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that wait for an event take no place of those at work. Callbacks never count."""
    async with world(tmp_path) as here:
        task = await submitted(here.client, UNTIL_DONE)
        last = got(await here.client.get("/v1/events"))["next_after"]
        requests = here.context.shedder.requests
        monkeypatch.setattr(requests, "total", 0)
        refused(await here.client.get("/v1/tasks"), 503, "overloaded")
        assert await called(here, task) == 200
        monkeypatch.setattr(requests, "total", 1)
        held = asyncio.create_task(
            here.client.get("/v1/events", params={"after": last, "wait": 30})
        )
        await wait_until(lambda: here.context.shedder.waiting == 1)
        got(await here.client.get("/v1/tasks"))
        await submitted(here.client)
        assert got(await held)["data"]
        shedder = here.context.shedder
        await wait_until(lambda: (shedder.active, shedder.waiting) == (0, 0))


async def test_callbacks_that_are_told_to_come_again_are_logged_together(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first refused callback gets its log line at once, and later lines sum up the refusals of
    an interval. Every refusal is counted.
    """
    task = await submitted(here.client, UNTIL_DONE)
    monkeypatch.setattr(callback_route, "MAX_QUEUED", -1)
    monkeypatch.setattr(overload, "LOG_EVERY_S", 0.2)
    counted = here.context.resources.metrics.callbacks.labels("overloaded")._value.get
    before = counted()
    with capture_logs() as lines:
        assert [await called(here, task) for _ in range(3)] == [503] * 3
        monkeypatch.undo()
        told = [line for line in lines if line["event"] == "callback.overloaded"]
        await wait_until(
            lambda: (
                sum(line["refused"] for line in lines if line["event"] == "callback.overloaded")
                == 3
            )
        )
    assert (told[0]["refused"], told[0]["callbacks"]) == (1, 1)
    assert counted() - before == 3
    assert await called(here, task) == 200
