"""Publishing events to brokers on real local servers. Kafka's protocol runs over librdkafka's mock
cluster.
"""

import asyncio
import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nats
import pytest
import redis
from aiormq.exceptions import AMQPError
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.app import Role
from service.backends import open_sinks
from service.db.transaction import Transaction
from service.errors import ConfigurationError
from service.events.outbox import emit_operators
from service.ops.tracing import recording
from service.settings import load_settings
from service.tasks import document
from tests.api import UNTIL_DONE, submitted
from tests.brokers import (
    KINDS,
    PASSWORD,
    START_S,
    BrokerServer,
    Taken,
    address,
    broker_running,
    kafka_running,
    reader,
)
from tests.integration.test_health import figures, ready
from tests.integration.test_traces import PARENT, TRACE
from tests.logs import logged
from tests.servers import free_port
from tests.waiting import wait_until
from tests.world import World, world

pytestmark = pytest.mark.timeout(300)
REAL = ("nats", "redis", "amqp")
SERIES = "darkroom_sink_lag"
READ_S = 30  # of one look at a broker
# What a broker that has just started may answer.
NOT_READY = (OSError, ExceptionGroup, AMQPError, nats.errors.Error, redis.RedisError)


@pytest.fixture(autouse=True)
def _dropped_connections() -> Iterator[None]:
    """A library may drop its connection to a broker that dies or starts, without closing it. The
    collector does, and warns in whatever test it runs.
    """
    yield
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


class Brokers:
    """The servers of this file. Each starts on first use."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._servers: dict[str, BrokerServer] = {}
        self._kafka = 0

    def server(self, kind: str) -> BrokerServer:
        if kind not in self._servers:
            self._servers[kind] = self._stack.enter_context(broker_running(kind))
        return self._servers[kind]

    async def port(self, kind: str) -> int:
        if kind == "kafka":
            self._kafka = self._kafka or self._stack.enter_context(kafka_running())
            return self._kafka
        server = self.server(kind)
        await wait_until(server.up, START_S)
        return server.port


@pytest.fixture(scope="module")
def brokers() -> Iterator[Brokers]:
    with ExitStack() as stack:
        yield Brokers(stack)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> str:
    """The name of a stream, queue or topic that only this test uses."""
    return f"t{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def emit_some(tx: Transaction, items: Sequence[int]) -> list[None]:
    for item in items:
        emit_operators(tx, "callback.conflict", {"key": f"n{item}"})
    return [None] * len(items)


async def emit(here: World, numbers: Sequence[int]) -> None:
    for number in numbers:
        await here.context.resources.store.write(emit_some, number)


async def caught_up(
    taken: Callable[[], Any], ids: Sequence[str], timeout: float = START_S
) -> list[Taken]:
    """Waits until the broker has all events, and returns its messages."""

    seen = "nothing was read"

    async def look() -> list[Taken] | None:
        nonlocal seen
        try:
            async with asyncio.timeout(READ_S):
                got: list[Taken] = await taken()
        except NOT_READY as error:
            seen = repr(error)
            return None
        lacking = set(ids) - {message.id for message in got}
        seen = f"{len(got)} messages, without {len(lacking)} of the events"
        return None if lacking else got

    try:
        found: list[Taken] = await wait_until(look, timeout)
    except AssertionError as error:
        raise AssertionError(f"after {timeout} s: {seen}") from error
    return found


async def holding(here: World) -> None:
    """Waits until the sink has its position in the outbox. Earlier events are not sent to it."""

    async def held() -> bool:
        return (await ready(here))["status"] == "ok" and bool(
            await here.context.resources.store.read(places)
        )

    await wait_until(held, START_S)


async def nothing_lags(here: World) -> None:
    """Waits until the sink has recorded that the broker has every event."""

    async def zero() -> bool:
        known = await figures(here)
        return [value for name, value in known.items() if name.startswith(SERIES)] == [0]

    await wait_until(zero)


async def degraded(here: World) -> None:
    """Waits until brokers are the reason why the service is degraded."""

    async def is_so() -> bool:
        return await ready(here) == {"status": "degraded", "causes": ["brokers"]}

    await wait_until(is_so, START_S)


def places(connection: Any) -> list[Any]:
    return list(connection.exec_driver_sql("SELECT name, position, lease_owner FROM sinks"))


# --- what arrives
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_every_event_arrives_as_webhooks_send_it_under_its_id(
    kind: str, brokers: Brokers, target: str, tmp_path: Path, stack: ExitStack
) -> None:
    """Each event arrives once and in sequence (Kafka: in a task's sequence), with its type and
    content type. The body is the CloudEvent, byte for byte as in the event stream. The message
    carries the span of its publishing, which is in the trace of its task.
    """
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    port = await brokers.port(kind)
    taken = reader(kind, port, target)
    async with world(tmp_path, sinks=address(kind, port, target)) as here:
        await holding(here)
        stack.enter_context(recording(provider))
        with_trace = UNTIL_DONE | {"traceparent": PARENT}
        tasks = [await submitted(here.client, with_trace) for _ in range(3)]
        await emit(here, range(5))
        events = await here.events()
        got = await caught_up(taken, [event["id"] for event in events])
        await nothing_lags(here)
    assert len(got) == len(events) == 2 * len(tasks) + 5
    order = [message.id for message in got]
    if kind != "kafka":
        assert order == [event["id"] for event in events]
    for task in tasks:
        own = [event["id"] for event in events if event["subject"] == task["id"]]
        assert [id for id in order if id in own] == own
    documents = {event["id"]: event for event in events}
    for message in got:
        assert (json.loads(message.body), message.content_type) == (
            documents[message.id],
            "application/cloudevents+json",
        )
        assert message.type == documents[message.id]["type"]
        assert message.body.startswith(b'{"specversion":"1.0","id":"evt_')
    spans = {
        str((span.attributes or {})["messaging.message.id"]): span
        for span in exporter.get_finished_spans()
        if span.name.startswith("send ")
    }
    for message in got:
        span = spans[message.id]
        assert span.context
        trace, place = f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"
        assert (message.traceparent or "").startswith(f"00-{trace}-{place}-")
        assert span.kind.name == "PRODUCER"
        assert (trace == TRACE) is (documents[message.id]["subject"] in {t["id"] for t in tasks})


@pytest.mark.parametrize("kind", REAL)
async def test_a_sink_gets_the_types_it_asks_for(
    kind: str, brokers: Brokers, target: str, tmp_path: Path
) -> None:
    """`types=` takes patterns. A skipped event does not count as lag, and events from before the
    sink was new are not sent.
    """
    port = await brokers.port(kind)
    async with world(tmp_path) as here:
        await emit(here, range(3))
    sink = f"{address(kind, port, target)}&types=image.task.completed,callback.*"
    taken = reader(kind, port, target)
    async with world(tmp_path, sinks=sink) as here:
        await holding(here)
        await submitted(here.client, UNTIL_DONE)
        await emit(here, [3])
        wanted = [
            event["id"]
            for event in (await here.events())[3:]
            if event["type"] != "image.task.submitted"
        ]
        assert [message.id for message in await caught_up(taken, wanted)] == wanted
        await here.context.resources.store.write(emit_some, 4)
        await nothing_lags(here)


# --- when a broker is away
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REAL)
async def test_a_broker_that_is_killed_in_the_middle_loses_nothing(
    kind: str, brokers: Brokers, target: str, tmp_path: Path
) -> None:
    """The broker gets SIGKILL during 300 events. All arrive, in sequence. JetStream and a Redis
    stream drop the repeated ones.
    """
    server, port = brokers.server(kind), await brokers.port(kind)
    taken = reader(kind, port, target)
    async with world(tmp_path, sinks=address(kind, port, target)) as here:
        await holding(here)
        emitting = asyncio.create_task(emit(here, range(200)))

        async def some() -> bool:
            return bool((await here.context.resources.store.read(places))[0][1] >= 50)

        await wait_until(some, START_S)
        server.kill()
        await emitting
        await emit(here, range(200, 300))  # some are published after the kill for certain
        await degraded(here)
        await server.restarted()
        ids = [event["id"] for event in await here.events()]
        got = [message.id for message in await caught_up(taken, ids)]
        assert len(ids) == 300
        assert list(dict.fromkeys(got)) == ids
        assert kind == "amqp" or got == ids
        await holding(here)


@pytest.mark.parametrize("kind", REAL)
async def test_a_broker_that_is_away_at_the_start_gets_everything_later(
    kind: str, brokers: Brokers, target: str, tmp_path: Path
) -> None:
    """The service starts, works, logs the outage once, is degraded and shows the broker's lag. No
    log line has the password.
    """
    server, port = brokers.server(kind), await brokers.port(kind)
    server.kill()
    taken = reader(kind, port, target)
    with logged() as stream:
        async with world(tmp_path, sinks=address(kind, port, target)) as here:
            await degraded(here)
            await submitted(here.client, UNTIL_DONE)
            events = await here.events()

            async def behind() -> bool:
                return any(
                    value > 0.2
                    for name, value in (await figures(here)).items()
                    if name.startswith(SERIES)
                )

            await wait_until(behind)
            await server.restarted()
            got = await caught_up(taken, [event["id"] for event in events])
            assert [message.id for message in got] == [event["id"] for event in events]
            await holding(here)
        lines = stream.getvalue().splitlines()
    parsed = [json.loads(line) for line in lines]
    assert [
        line["event"] for line in parsed if line["event"] in ("sink.failed", "sink.restored")
    ] == ["sink.failed", "sink.restored"]
    assert "library.message" not in {line["event"] for line in parsed}
    assert not [line for line in lines if PASSWORD in line or "p%40ss" in line]


@pytest.mark.parametrize("kind", REAL)
async def test_a_wrong_password_is_a_broker_that_is_away(
    kind: str, brokers: Brokers, target: str, tmp_path: Path
) -> None:
    """An operator may correct the password at the broker. The service is degraded and logs it once,
    without the password.
    """
    port = await brokers.port(kind)
    with logged() as stream:
        async with world(tmp_path, sinks=address(kind, port, target, "wr@ng-password")) as here:
            await degraded(here)
        lines = stream.getvalue().splitlines()
    (failed,) = [json.loads(line) for line in lines if '"sink.failed"' in line]
    assert target in failed["sink"]
    assert not [line for line in lines if "ng-password" in line]


async def test_a_broker_that_stops_answering_holds_up_nothing_else(
    brokers: Brokers, tmp_path: Path
) -> None:
    """A call to a broker that accepts connections and does not answer times out. Tasks end, and the
    other broker gets its events.
    """
    port, target = await brokers.port("nats"), "beside"
    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _reader, writer: held.append(writer), "127.0.0.1", 0)
    other = silent.sockets[0].getsockname()[1]
    sinks = f"redis://127.0.0.1:{other}/0?stream=x&name=silent,{address('nats', port, target)}"
    taken = reader("nats", port, target)
    async with world(tmp_path, sinks=sinks) as here:

        async def both() -> bool:
            return len(await here.context.resources.store.read(places)) == 2

        await wait_until(both)
        await submitted(here.client, UNTIL_DONE)
        events = await here.events()
        assert len(await caught_up(taken, [event["id"] for event in events])) == 2

        await degraded(here)
    silent.close()
    for writer in held:
        writer.close()
        await writer.wait_closed()


async def test_an_event_that_no_queue_takes_holds_up_no_other(
    brokers: Brokers, tmp_path: Path, target: str
) -> None:
    """The exchange must exist. An event for whose type it has no queue is refused three times and
    then skipped for this sink, logged and counted. A queue that is bound later gets later events.
    """
    import aio_pika

    port = await brokers.port("amqp")
    sink = address("amqp", port, target).replace("queue=", "exchange=")
    taken = reader("amqp", port, target)
    with logged() as stream:
        async with world(tmp_path, sinks=sink) as here:
            await degraded(here)
            url = sink.partition("?")[0]
            async with await aio_pika.connect(url) as connection:
                channel = await connection.channel()
                exchange = await channel.declare_exchange(target, "topic", durable=True)
                queue = await channel.declare_queue(target, durable=True)
                await queue.bind(exchange, "image.task.completed")
                await holding(here)
                await emit(here, range(2))
                await submitted(here.client, UNTIL_DONE)
                await emit(here, [2])
                await submitted(here.client, UNTIL_DONE)
                events = await here.events()
                wanted = [each["id"] for each in events if each["type"] == "image.task.completed"]
                assert [each.id for each in await caught_up(taken, wanted)] == wanted
                await queue.bind(exchange, "callback.#")
                await emit(here, [3])
                last = (await here.events())[-1]["id"]
                assert [each.id for each in await caught_up(taken, [last])] == [*wanted, last]
            counter = here.context.resources.metrics.sink_skipped
            (family,) = counter.collect()
            assert [each.value for each in family.samples] == [5]
    told = [json.loads(line) for line in stream.getvalue().splitlines() if "sink.skipped" in line]
    skipped = [each["id"] for each in events if each["id"] not in wanted]
    assert [line["event_id"] for line in told] == skipped


async def test_an_event_too_large_for_the_broker_holds_up_no_other(
    brokers: Brokers, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event goes without its `request`, the part that the client made too long, as events of an
    earlier version may have it. A log line says so.
    """
    monkeypatch.setattr(document, "OTHER_BYTES", 2 << 20)
    port = await brokers.port("nats")
    taken = reader("nats", port, target)
    with logged() as stream:
        async with world(tmp_path, sinks=address("nats", port, target)) as here:
            await holding(here)
            task = await submitted(here.client, UNTIL_DONE, note="x" * 1_048_000)
            events = await here.events()
            got = await caught_up(taken, [event["id"] for event in events])
        lines = [
            json.loads(line)
            for line in stream.getvalue().splitlines()
            if '"sink.shortened"' in line
        ]
    assert (
        [message.id for message in got]
        == [event["id"] for event in events]
        == [line["event_id"] for line in lines]
    )
    for message, event in zip(got, events, strict=True):
        assert len(event["data"]["request"]["note"]) == 1_048_000
        assert json.loads(message.body) == {**event, "data": {**event["data"], "request": {}}}
        assert event["subject"] == task["id"]


async def test_a_stream_that_is_there_is_left_as_it_is(
    brokers: Brokers, tmp_path: Path, target: str
) -> None:
    """A missing stream is created with an hour of deduplication."""
    from nats.js.api import StreamConfig

    from tests.brokers import USER

    port = await brokers.port("nats")
    async with await nats.connect(
        f"nats://127.0.0.1:{port}", user=USER, password=PASSWORD
    ) as client:
        stream = client.jetstream()
        await stream.add_stream(
            StreamConfig(target, subjects=[f"{target}.>", "more"], max_msgs=50, duplicate_window=60)
        )
        for name in (target, f"{target}new"):
            async with world(tmp_path / name, sinks=address("nats", port, name)) as here:
                await holding(here)
        config = (await stream.stream_info(target)).config
        assert (config.subjects, config.max_msgs, config.duplicate_window) == (
            [f"{target}.>", "more"],
            50,
            60,
        )
        config = (await stream.stream_info(f"{target}new")).config
        assert (config.subjects, config.duplicate_window) == ([f"{target}new.>"], 3600)


# --- settings
# --------------------------------------------------------------------------------------------------


async def test_a_type_that_nobody_emits_stops_the_start() -> None:
    """One line names the variable and the known types."""
    sink = f"redis://127.0.0.1:{free_port()}/0?stream=x&types=image.tasks.*"
    with pytest.raises(
        ConfigurationError, match=r"DARKROOM_SINKS: types= must be .*image\.task\.completed"
    ):
        open_sinks(load_settings({"DARKROOM_SINKS": sink}, None))


async def test_without_the_extra_a_sink_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the extra. A process without workers does not need it."""
    monkeypatch.setitem(sys.modules, "faststream", None)
    monkeypatch.delitem(sys.modules, "service.events.brokers", raising=False)
    sink = f"redis://127.0.0.1:{free_port()}/0?stream=x"
    with pytest.raises(
        ConfigurationError, match=r"^DARKROOM_SINKS: .*darkroom-service\[brokers\]$"
    ):
        open_sinks(load_settings({"DARKROOM_SINKS": sink}, None))
    async with world(tmp_path, sinks=sink, role=Role(workers=False)) as here:
        assert (await ready(here))["status"] == "ok"
        assert (await figures(here))[f"{SERIES},sink={sink}"] == 0
