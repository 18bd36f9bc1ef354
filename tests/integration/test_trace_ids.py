"""A task keeps the request that submitted it and that request's trace. Each of its ids alone finds
all lines of its log, and every call in its name passes the trace on.
"""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.ops.tracing import valid_traceparent
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from tests.logs import logged
from tests.waiting import wait_until
from tests.world import LOOPBACK, Received, World, subscriber, world

pytestmark = pytest.mark.usefixtures("quick_workers")

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
JSON = dict[str, Any]


@dataclass(slots=True)
class Noting:
    """An upstream that notes the trace of each request."""

    app: ASGIApp
    traces: list[tuple[str, str | None]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"traceparent", b"").decode()
            self.traces.append((f"{scope['method']} {scope['path'].split('/')[1]}", given or None))
        await self.app(scope, receive, send)


@dataclass(slots=True)
class Story:
    """Three tasks that have ended, their log, and what the others were told."""

    here: World
    asked: list[tuple[str, str | None]]  # of the upstream, with the trace
    received: list[Received]
    lines: list[JSON]
    tasks: Mapping[str, JSON]


TROUBLE: Mapping[str, JSON] = {
    "a failing picture": {"file_status": 500, "file_times": 1},
    "a lost submission": {"lose_submission": 1},
    "a refused account": {"submit_status": 401},
}


@pytest.fixture(scope="module")
async def story(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Story]:
    networks = (ip_network(LOOPBACK),)
    options = SandboxOptions(networks=networks, delay_s=0.05, callback_delays_s=(0.05, 0.05, 0.05))
    upstream, settings = Noting(create_sandbox(options)), dict[str, Any](uncertain="resubmit")
    settings |= {"uncertain_after_s": "0.1", "submit_give_up_s": "3"}
    with logged("info") as log:
        async with (
            subscriber() as told,
            world(tmp_path_factory.mktemp("t"), upstream=upstream, **settings) as here,
        ):
            told.answer = lambda n, _: Response(status_code=204 if n % 2 else 500)
            made = await here.client.post(
                "/v1/endpoints", json={"url": told.url, "types": ["image.task.completed"]}
            )
            assert made.status_code == 201, made.text
            tasks = {}
            for number, (name, faults) in enumerate(TROUBLE.items()):
                headers = {"prefer": "wait=20", "x-request-id": f"req-{number}"}
                headers["traceparent"] = PARENT
                tasks[name] = await here.submit(sandbox=faults, headers=headers)
            states = {name: task["state"] for name, task in tasks.items()}
            assert states == dict(
                zip(TROUBLE, ("completed", "completed", "failed"), strict=True)
            ), tasks

            async def delivered() -> bool:
                return log.getvalue().count('"result": "delivered"') == 2

            await wait_until(delivered)
            lines = [json.loads(line) for line in log.getvalue().splitlines()]
            yield Story(here, list(upstream.traces), list(told.received), lines, tasks)


EXPECTED = {
    "a failing picture": {"image.retry", "image.stored", "delivery.attempted", "callback.received"},
    "a lost submission": {"task.submission_uncertain", "task.confirmed", "ledger.entered"},
    "a refused account": {"task.submission_retried", "task.settled", "event.emitted"},
}


@pytest.mark.parametrize("name", list(TROUBLE))
async def test_each_id_of_a_task_alone_finds_all_lines_of_its_log(story: Story, name: str) -> None:
    """The upstream's id finds them from the moment on at which the service knows it."""
    task, number = story.tasks[name], list(TROUBLE).index(name)

    def found(key: str, id: str) -> list[JSON]:
        return [line for line in story.lines if line.get(key) == id]

    mine = found("task_id", task["id"])
    assert {line["event"] for line in mine} >= {*EXPECTED[name], "task.queued", "upstream.called"}
    assert found("request_id", f"req-{number}") == mine
    assert {line.get("trace_id") for line in mine} == {TRACE}
    if task["upstream_id"] is not None:
        named = found("upstream_id", task["upstream_id"])
        assert named[0]["event"] in ("task.submitted", "event.emitted", "callback.received")
        later = [line for line in mine if line in named or mine.index(line) > mine.index(named[0])]
        unnamed = {line["event"] for line in later if line not in named}
        assert unnamed == set(), unnamed


async def test_the_trace_is_passed_on_to_the_upstream_and_the_delivery(story: Story) -> None:
    """Without an SDK the client's own `traceparent` goes on as it came. A call in nobody's name,
    such as the look at the account's credits, has none.
    """
    for call in ("POST v1", "GET files"):
        assert {trace for made, trace in story.asked if made == call} == {PARENT}
    assert {trace for made, trace in story.asked if made == "GET v1"} == {PARENT, None}
    assert {got.headers.get("traceparent") for got in story.received} == {PARENT}
    assert {json.loads(got.body)["traceparent"] for got in story.received} == {PARENT}


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        (PARENT, PARENT),
        (f" {PARENT}\t", PARENT),
        (f"00-{TRACE}-b7ad6b7169203331-00", f"00-{TRACE}-b7ad6b7169203331-00"),
        (f"cc-{TRACE}-b7ad6b7169203331-ff-new", PARENT),
        (f"cc-{TRACE}-b7ad6b7169203331-00", f"00-{TRACE}-b7ad6b7169203331-00"),
        (f"cc-{TRACE}-b7ad6b7169203331-01.new", None),
        (f"{PARENT}-more", None),
        (f"ff-{TRACE}-b7ad6b7169203331-01", None),
        (PARENT.upper(), None),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (PARENT[:-1], None),
        (f"00-{TRACE}-b7ad6b7169203331", None),
        ("", None),
        (None, None),
    ],
)
def test_a_traceparent_that_breaks_the_rules_is_ignored(
    header: str | None, kept: str | None
) -> None:
    """By W3C Trace Context. Later versions may add fields, which are left out."""
    assert valid_traceparent(header) == kept


@pytest.mark.parametrize("headers", [[("traceparent", "00-junk")], [("traceparent", PARENT)] * 2])
async def test_a_submission_with_a_bad_trace_is_accepted_without_it(
    story: Story, headers: list[tuple[str, str]]
) -> None:
    """Two of them are a bad one too. The event of such a task names none."""
    body = {"model": "wan2.5-text-to-image", "prompt": "p", "size": "768x768"}
    headers = [*headers, ("prefer", "wait=20")]
    answer = await story.here.client.post("/v1/images/generations", json=body, headers=headers)
    assert answer.json()["state"] == "completed", answer.text
    events = await story.here.events(task=answer.json()["id"])
    assert events
    assert all("traceparent" not in event for event in events)
