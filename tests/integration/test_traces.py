"""Spans of OpenTelemetry: recorded by the SDK's exporter in memory, and those of two processes by a
collector.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.responses import Response

from service.ops.tracing import recording, wanted
from tests.environment import ROOT
from tests.processes import ADMIN_KEY, Running, sandbox, service_settings
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber, world

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
TASK = {"model": "wan2.5-text-to-image", "prompt": "p", "size": "768x768"}


@dataclass(slots=True)
class Recorded:
    here: World
    subscriber: Subscriber
    exporter: InMemorySpanExporter
    task_id: str = ""

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name.startswith(name)]


@pytest.fixture(scope="module")
async def recorded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Recorded]:
    """A task that went its whole way. Its first delivery failed and its second did not."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with recording(provider):
        async with subscriber() as told, world(tmp_path_factory.mktemp("otel")) as here:
            told.answer = lambda n, _: Response(status_code=204 if n else 500)
            endpoint = {"url": told.url, "types": ["image.task.completed"]}
            assert (await here.client.post("/v1/endpoints", json=endpoint)).status_code == 201
            made = Recorded(here, told, exporter)
            headers = {"traceparent": PARENT, "prefer": "wait=20"}
            made.task_id = (await here.submit(headers=headers))["id"]

            async def sent() -> bool:
                return len(made.named("send")) >= 2

            await wait_until(sent)
            yield made


def trace_of(span: ReadableSpan) -> str:
    assert span.context
    return f"{span.context.trace_id:032x}"


STEPS = {
    "POST /v1/images/generations": "SERVER",
    "submit": "INTERNAL",
    "callback": "SERVER",
    "confirm": "INTERNAL",
    "download": "INTERNAL",
    "send ep_": "PRODUCER",
}


@pytest.mark.parametrize("name", list(STEPS))
async def test_every_step_of_a_task_is_in_the_trace_of_its_request(
    recorded: Recorded, name: str
) -> None:
    """From the client's request to the delivery."""
    first = recorded.named(name)[0]
    assert (trace_of(first), first.kind.name) == (TRACE, STEPS[name])
    assert first.parent
    if name.startswith("POST"):
        assert f"{first.parent.span_id:016x}" == "b7ad6b7169203331"
    else:
        request = recorded.named("POST /v1/images/generations")[0].context
        assert request
        assert first.parent.span_id == request.span_id


async def test_a_retry_is_linked_and_no_child(recorded: Recorded) -> None:
    """It begins a trace of its own, which names the task's as its cause."""
    first, later = recorded.named("send ep_")[:2]
    assert trace_of(later) != TRACE
    assert later.parent is None
    assert [f"{link.context.trace_id:032x}" for link in later.links] == [TRACE]
    told = [got.headers["traceparent"][3:35] for got in recorded.subscriber.received[:2]]
    assert told == [trace_of(first), trace_of(later)]


async def test_a_replay_is_linked_too(recorded: Recorded) -> None:
    """Also an attempt by hand, although its event is seconds old."""
    deliveries = (await recorded.here.client.get("/v1/deliveries")).json()["data"]
    before = len(recorded.named("send ep_"))
    answer = await recorded.here.client.post(f"/v1/deliveries/{deliveries[0]['id']}/retry")
    assert answer.status_code < 300, answer.text
    span = recorded.named("send ep_")[before]
    assert span.parent is None
    assert [f"{link.context.trace_id:032x}" for link in span.links] == [TRACE]


async def test_attributes_follow_the_conventions_and_name_no_secret(recorded: Recorded) -> None:
    """HTTP, messaging and CloudEvents. No path or query is in a span: they may contain tokens."""
    request = recorded.named("POST /v1/images/generations")[0]
    send = recorded.named("send ep_")[0]
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/images/generations",
        "http.response.status_code": 200,
        "url.scheme": "http",
    }
    sent = send.attributes or {}
    assert sent["messaging.system"] == "webhook"
    assert sent["messaging.operation.type"] == "send"
    assert sent["messaging.message.id"] == sent["cloudevents.event_id"]
    assert sent["cloudevents.event_type"] == "image.task.completed"
    assert sent["cloudevents.event_subject"] == recorded.task_id
    assert not send.status.is_ok
    assert sent["error.type"] == "500"
    calls = [each for each in recorded.exporter.get_finished_spans() if each.kind.name == "CLIENT"]
    assert {each.name for each in calls} >= {"GET", "POST"}
    text = " ".join(each.to_json() for each in recorded.exporter.get_finished_spans())
    token = recorded.here.context.resources.keyring.callback_token("evolink", recorded.task_id)
    for secret in (token, "sandbox", "webhook-signature", "?"):
        assert secret not in text


@pytest.mark.parametrize(
    ("variables", "on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
        ({"OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
    ],
)
def test_the_standard_variables_switch_traces_on(variables: dict[str, str], on: bool) -> None:
    assert wanted(variables) is on


# --- two processes


@dataclass(slots=True)
class Collector:
    """An OTLP collector over HTTP. `spans`: service's name, span's name and trace. `of_tasks`: the
    span's name and trace by the task that it names.
    """

    url: str = ""
    spans: list[tuple[str, str, str]] = field(default_factory=list)
    of_tasks: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    known = named["service.name"], span.name, span.trace_id.hex()
                    self.spans.append(known)
                    attributes = {each.key: each.value.string_value for each in span.attributes}
                    if (task := attributes.get("darkroom.task.id")) is not None:
                        self.of_tasks.setdefault(task, []).append(known[1:])


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@asynccontextmanager
async def serving(name: str, folder: Path, upstream: str, collector: str) -> AsyncIterator[str]:
    """A process that exports its traces, until SIGTERM, at which it exports the rest."""
    settings = service_settings(upstream, folder, SUBMIT_SCHEDULE="0.1", CALLBACK_URL="")
    settings |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector, "OTEL_SERVICE_NAME": name}
    process = Running("serve", folder=folder, PYTHONPATH=str(ROOT), **settings)
    try:
        yield await asyncio.to_thread(lambda: process.address)
    finally:
        process.signal(15)
        await asyncio.to_thread(process.ended)


async def test_one_trace_goes_through_two_processes(tmp_path: Path, collector: Collector) -> None:
    """The first process takes the task and stops. The second one, on the same store, finishes it.
    Both export to a collector.
    """
    key = {"authorization": f"Bearer {ADMIN_KEY}"}
    with sandbox("--delay", "1", folder=tmp_path) as upstream:
        async with (
            serving("first", tmp_path, upstream.address, collector.url) as url,
            httpx.AsyncClient(base_url=url, headers=key, timeout=30) as client,
        ):
            headers = {"traceparent": PARENT}
            answer = await client.post("/v1/images/generations", json=TASK, headers=headers)
            task_id = answer.json()["id"]
        async with (
            serving("second", tmp_path, upstream.address, collector.url) as url,
            httpx.AsyncClient(base_url=url, headers=key, timeout=30) as client,
        ):

            async def ended() -> bool:
                task = (await client.get(f"/v1/tasks/{task_id}")).json()
                return bool(task["state"] == "completed")

            await wait_until(ended, 60)
    ours = {(service, name) for service, name, trace in collector.spans if trace == TRACE}
    assert ours >= {("first", "POST /v1/images/generations"), ("first", "submit")}
    assert ours >= {("second", "confirm"), ("second", "download")}
    assert os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") is None
