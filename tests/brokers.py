"""Brokers on loopback for tests, and readers of their messages. A test can kill a broker and start
it again with its data.

NATS, Redis and RabbitMQ are the installed servers. For Kafka there is librdkafka's mock cluster,
which speaks the protocol and stores nothing on disk.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aio_pika
import nats
import redis.asyncio
from confluent_kafka import Consumer, Producer, TopicPartition

from tests.servers import free_port, missing
from tests.waiting import wait_until

USER, PASSWORD = "darkroom", "p@ss:word/1"
KINDS = ("nats", "redis", "amqp", "kafka")
START_S = 120


@dataclass(slots=True)
class BrokerServer:
    """An installed server. `command` contains its port and folder."""

    kind: str
    folder: Path
    command: list[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Starts the server and does not wait until it listens."""
        with (self.folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=os.environ | self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Sends SIGKILL to the server and its children."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def up(self) -> bool:
        """Raises AssertionError with the end of the output when the server has ended."""
        if self.process and self.process.poll() is not None:
            output = (self.folder / "output").read_text(errors="replace")
            raise AssertionError(
                f"{self.kind} ended with {self.process.returncode}: {output[-2000:]}"
            )
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def restarted(self) -> None:
        self.start()
        await wait_until(self.up, START_S)


def program(name: str, server: str) -> str:
    """The program's path. Without the program the test skips or fails."""
    found = shutil.which(
        name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
    )
    return found or missing(server)


def server_of(kind: str, folder: Path) -> BrokerServer:
    port = free_port()
    if kind == "nats":
        store, known = ["-js", "-sd", str(folder / "data")], ["--user", USER, "--pass", PASSWORD]
        return BrokerServer(
            kind,
            folder,
            [program("nats-server", "NATS"), "-a", "127.0.0.1", "-p", str(port), *store, *known],
            port,
        )
    if kind == "redis":
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--requirepass", PASSWORD]
        where = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
        return BrokerServer(
            kind, folder, [program("redis-server", "Redis"), *where, *durable], port
        )
    (folder / "rabbitmq.conf").write_text(f"default_user = {USER}\ndefault_pass = {PASSWORD}\n")
    environment = {
        "HOME": str(folder),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_NODENAME": f"darkroom{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        "ERL_EPMD_PORT": str(free_port()),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }
    # Debian's wrapper in PATH switches to its own user and folder. The inner script accepts any.
    inside = next(
        iter(sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))),
        None,
    )
    return BrokerServer(
        kind, folder, [str(inside or program("rabbitmq-server", "RabbitMQ"))], port, environment
    )


@contextlib.contextmanager
def broker_running(kind: str) -> Iterator[BrokerServer]:
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix=f"darkroom-{kind}-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        server = server_of(kind, folder)
        if kind == "amqp":  # without this epmd the server starts one that outlives the test
            names = stack.enter_context(
                subprocess.Popen(["epmd"], env=os.environ | server.environment)
            )
            stack.callback(names.kill)
        server.start()
        stack.callback(server.kill)
        yield server


@contextlib.contextmanager
def kafka_running() -> Iterator[int]:
    """The port of a mock cluster with one broker."""
    cluster = Producer(
        {"bootstrap.servers": "127.0.0.1:1", "test.mock.num.brokers": 1, "log_level": 0}
    )
    (broker,) = cluster.list_topics(timeout=START_S).brokers.values()
    yield int(broker.port)
    del cluster


def address(kind: str, port: int, target: str, password: str = PASSWORD) -> str:
    """The sink's address. `target` is the test's own stream, queue or topic."""
    host, known = f"127.0.0.1:{port}", f"{USER}:{quote(password, safe='')}"
    return {
        "nats": f"nats://{known}@{host}/{target}?stream={target}",
        "redis": f"redis://:{quote(password, safe='')}@{host}/0?stream={target}",
        "amqp": f"amqp://{known}@{host}/?queue={target}",
        "kafka": f"kafka://{host}/{target}",
    }[kind]


@dataclass(frozen=True, slots=True)
class Taken:
    """A message as the broker stores it."""

    id: str
    type: str
    body: bytes
    content_type: str
    traceparent: str | None = None


def reader(kind: str, port: int, target: str) -> Callable[[], Awaitable[list[Taken]]]:
    """A function that returns all messages of the broker, in order."""
    read = {"nats": nats_taken, "redis": redis_taken, "kafka": kafka_taken, "amqp": amqp_taken}[
        kind
    ]
    return partial(read, port, target)


async def nats_taken(port: int, target: str) -> list[Taken]:
    async with await nats.connect(
        f"nats://127.0.0.1:{port}", user=USER, password=PASSWORD
    ) as client:
        stream = client.jetstream(timeout=60)
        try:
            state = (await stream.stream_info(target)).state
        except nats.js.errors.NotFoundError:
            return []
        found = [
            await stream.get_msg(target, place)
            for place in range(state.first_seq, state.last_seq + 1)
            if state.messages
        ]
    known = [(message, message.headers or {}) for message in found]
    return [
        Taken(
            had["Nats-Msg-Id"],
            (message.subject or "").removeprefix(f"{target}."),
            message.data or b"",
            had["content-type"],
            had.get("traceparent"),
        )
        for message, had in known
    ]


async def made(server: BrokerServer, target: str) -> None:
    """Waits until a service has created its stream. The service then has its position in the outbox
    and publishes every later event.
    """

    async def there() -> bool:
        async with await nats.connect(
            f"nats://127.0.0.1:{server.port}", user=USER, password=PASSWORD
        ) as client:
            stream = client.jetstream(timeout=60)
            return target in [info.config.name for info in await stream.streams_info()]

    await wait_until(there, START_S)


async def redis_taken(port: int, target: str) -> list[Taken]:
    async with redis.asyncio.Redis(port=port, password=PASSWORD) as client:
        entries: Any = await client.xrange(target)
    return [
        Taken(
            had[b"id"].decode(),
            had[b"type"].decode(),
            had[b"event"],
            had[b"content-type"].decode(),
            had[b"traceparent"].decode() if b"traceparent" in had else None,
        )
        for _, had in entries
    ]


async def amqp_taken(port: int, target: str) -> list[Taken]:
    """All messages of the queue. None is acknowledged, so the broker puts them back."""
    found = []
    async with await aio_pika.connect(
        f"amqp://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/"
    ) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(target, durable=True)
        while (message := await queue.get(fail=False)) is not None:
            assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
            found.append(
                Taken(
                    message.message_id or "",
                    message.type or "",
                    message.body,
                    message.content_type or "",
                    str(message.headers["traceparent"]) if message.headers else None,
                )
            )
    return found


async def kafka_taken(port: int, target: str) -> list[Taken]:
    return await asyncio.to_thread(_kafka_taken, port, target)


def _kafka_taken(port: int, target: str) -> list[Taken]:
    consumer = Consumer(
        {
            "bootstrap.servers": f"127.0.0.1:{port}",
            "group.id": target,
            "enable.auto.commit": False,
            "log_level": 0,
        }
    )
    found = []
    try:
        for number in consumer.list_topics(target, timeout=START_S).topics[target].partitions:
            first, end = consumer.get_watermark_offsets(
                TopicPartition(target, number), timeout=START_S
            )
            consumer.assign([TopicPartition(target, number, first)])
            while first < end:
                if (record := consumer.poll(1)) is not None and record.error() is None:
                    found.append(record)
                    first = (record.offset() or 0) + 1
    finally:
        consumer.close()
    headers: Any = [record.headers() for record in found]
    known = [
        (record, {name: value.decode() for name, value in had})
        for record, had in zip(found, headers, strict=True)
    ]
    return [
        Taken(
            had["ce_id"],
            had["ce_type"],
            bytes(record.value() or b""),
            had["content-type"],
            had.get("traceparent"),
        )
        for record, had in known
    ]
