"""Brokers through FastStream: each event is one message, confirmed by the broker before the next
one goes, under the event's id.

After any fault the connection is given up and made anew by whoever publishes: the libraries' own
reconnecting, which would keep messages or send them twice unseen, is off or ended. What they log is
silenced (`ops.logging`); a fault's words are in its SinkUnavailable.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Protocol
from urllib.parse import quote

import faststream

from service.errors import MessageTooLarge, SinkUnavailable
from service.events.broker_addresses import SinkAddress
from service.events.sinks import Message

TIMEOUT_S = 5.0  # for a broker to confirm a message, to answer, to be connected to
CLOSE_S = 2.0
CONTENT_TYPE = "application/cloudevents+json"
DUPLICATES_S = 3600  # for so long a stream that is made here knows the ids it has
KEPT_S = 30 * 86_400  # and its messages
REMEMBERED = 1000  # entries of a Redis stream whose ids are looked at
TOO_LARGE = (
    "MaxPayloadError",
    "MessageSizeTooLargeError",
)  # JetStream's and Kafka's, whose limit is 1 MiB unless it is set
LARGEST = 64 << 20  # bytes of a message: the broker's own limit is to be met first

logging.getLogger(
    faststream.__name__
).handlers.clear()  # it would write to standard error by itself


class Channel(Protocol):
    """One connection to one kind of broker: `broker` is FastStream's, not connected yet."""

    broker: Any

    async def prepare(self, connection: Any) -> None:
        """Sees to it that there is something that takes messages; what is there is left as it
        is.
        """

    async def send(self, message: Message) -> None: ...


class Nats:
    """JetStream. The subject is the address's and the event's type; `Nats-Msg-Id` is the event's
    id.
    """

    def __init__(self, address: SinkAddress) -> None:
        from faststream.nats import NatsBroker
        from faststream.nats.security import NatsSecurity, NatsToken, NatsUserPassword
        from nats.aio.client import Client

        class Closing(NatsBroker):
            """Leaves no socket behind when a server takes the connection and refuses the
            password.
            """

            async def _connect(self) -> Client:
                client = Client()
                try:
                    await client.connect(**self._connection_kwargs)
                except BaseException:
                    await client.close()
                    raise
                self.config.connect(client)
                return client

        security: NatsSecurity | None = None
        if address.user is not None:
            known = (address.user, address.password)
            security = (
                NatsToken(known[0]) if known[1] is None else NatsUserPassword(known[0], known[1])
            )
        self._address = address
        self.broker = Closing(
            [f"{'tls' if address.tls else 'nats'}://{host}" for host in address.hosts],
            security=security,
            name="darkroom",
            allow_reconnect=False,
            # unless it is limited, the first connection is tried for ever
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=round(TIMEOUT_S),
            drain_timeout=round(CLOSE_S),
            logger=None,
        )

    async def prepare(self, connection: Any) -> None:
        from nats.js.api import StreamConfig
        from nats.js.errors import NotFoundError

        stream = connection.jetstream(timeout=TIMEOUT_S)
        try:
            await stream.stream_info(self._address.target)
        except NotFoundError:
            subjects = [f"{self._address.path}.>"]
            await stream.add_stream(
                StreamConfig(
                    self._address.target,
                    subjects=subjects,
                    duplicate_window=DUPLICATES_S,
                    max_age=KEPT_S,
                )
            )

    async def send(self, message: Message) -> None:
        await self.broker.publish(
            message.body,
            f"{self._address.path}.{message.type}",
            headers={"Nats-Msg-Id": message.id, "content-type": CONTENT_TYPE},
            correlation_id=message.id,
            stream=self._address.target,
            timeout=TIMEOUT_S,
        )


class Kafka:
    """An idempotent producer with `acks=all`. The key is the event's task, or its own id; the
    header `ce_id` is its id.
    """

    def __init__(self, address: SinkAddress) -> None:
        from faststream.kafka import KafkaBroker
        from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512

        context = ssl.create_default_context() if address.tls else None
        security = BaseSecurity(ssl_context=context, use_ssl=address.tls)
        if address.user is not None:
            made = dict(
                zip(
                    ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
                    (SASLPlaintext, SASLScram256, SASLScram512),
                    strict=True,
                )
            )
            known = {"username": address.user, "password": address.password or ""}
            security = made[address.sasl](**known, ssl_context=context, use_ssl=address.tls)
        self._topic = address.path
        self.broker = KafkaBroker(
            list(address.hosts),
            security=security,
            client_id="darkroom",
            acks="all",
            enable_idempotence=True,
            request_timeout_ms=round(TIMEOUT_S * 1000),
            max_request_size=LARGEST,
            logger=None,
        )

    async def prepare(self, connection: Any) -> None:
        pass

    async def send(self, message: Message) -> None:
        headers = {"ce_id": message.id, "ce_type": message.type, "content-type": CONTENT_TYPE}
        await self.broker.publish(
            message.body,
            self._topic,
            key=message.key.encode(),
            headers=headers,
            correlation_id=message.id,
        )


class Amqp:
    """Publisher confirms; messages are persistent and must reach a queue. `message_id` is the
    event's id, `type` its type.
    """

    def __init__(self, address: SinkAddress) -> None:
        from aio_pika import RobustConnection
        from faststream.rabbit import Channel as Options
        from faststream.rabbit import RabbitBroker

        class Closing(RabbitBroker):
            """Leaves no connection behind that was not made to its end."""

            async def _connect(self) -> RobustConnection:
                begun: list[RobustConnection] = []

                def connection(*arguments: Any, **options: Any) -> RobustConnection:
                    begun.append(RobustConnection(*arguments, **options))
                    return begun[-1]

                self._connection_kwargs["connection_class"] = connection
                try:
                    return await super()._connect()
                except BaseException:
                    for each in begun:
                        await each.close()
                    raise

        user, password = (
            quote(address.user or "guest", safe=""),
            quote(address.password or "guest", safe=""),
        )
        self._address = address
        self._queue = address.target if address.option == "queue" else None
        self.broker = Closing(
            f"amqp{'s' * address.tls}://{user}:{password}@{address.hosts[0]}"
            f"/{quote(address.path, safe='')}",
            timeout=TIMEOUT_S,
            default_channel=Options(publisher_confirms=True, on_return_raises=True),
            app_id="darkroom",
            logger=None,
        )

    async def prepare(self, connection: Any) -> None:
        from aio_pika.exceptions import ChannelNotFoundEntity

        async with connection.channel() as channel:
            if self._queue is None:
                await channel.get_exchange(self._address.target, ensure=True)
                return
            try:
                await channel.declare_queue(self._queue, passive=True)
            except ChannelNotFoundEntity:
                async with connection.channel() as another:
                    await another.declare_queue(self._queue, durable=True)

    async def send(self, message: Message) -> None:
        await self.broker.publish(
            message.body,
            routing_key=self._queue or message.type,
            exchange=self._address.target if self._queue is None else None,
            mandatory=True,
            persist=True,
            timeout=TIMEOUT_S,
            content_type=CONTENT_TYPE,
            message_id=message.id,
            message_type=message.type,
            correlation_id=message.id,
        )


class Redis:
    """A stream's entry has the fields `id`, `type`, `content-type` and `event`. An id among the
    last entries is not added again.

    FastStream would wrap the bytes in a form of its own, so entries go through the client it
    connects.
    """

    def __init__(self, address: SinkAddress) -> None:
        from faststream.redis import RedisBroker

        known = (
            f"{quote(address.user or '', safe='')}:{quote(address.password, safe='')}@"
            if address.password is not None
            else ""
        )
        self._stream = address.target
        self._client: Any = None
        self._there = set[bytes]()
        url = f"redis{'s' * address.tls}://{known}{address.hosts[0]}/{address.path or 0}"
        quiet: Any = None  # the annotation lacks what the documentation has
        self.broker = RedisBroker(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, logger=quiet
        )

    async def prepare(self, connection: Any) -> None:
        self._client = connection
        self._there = {
            fields.get(b"id", b"")
            for _, fields in await connection.xrevrange(self._stream, count=REMEMBERED)
        }

    async def send(self, message: Message) -> None:
        if message.id.encode() not in self._there:
            fields = {
                "id": message.id,
                "type": message.type,
                "content-type": CONTENT_TYPE,
                "event": message.body,
            }
            await self._client.xadd(self._stream, fields)


class BrokerSink:
    """`Broker` at an address. ImportError: the extra is not installed."""

    KINDS: ClassVar[Mapping[str, Callable[[SinkAddress], Channel]]] = {
        "nats": Nats,
        "kafka": Kafka,
        "amqp": Amqp,
        "redis": Redis,
    }

    def __init__(self, address: SinkAddress) -> None:
        self.name = address.name
        self.types: Sequence[str] = address.types
        self._address = address
        self._channel: Channel | None = None
        self.KINDS[address.kind](address)

    async def open(self) -> None:
        with self._translated():
            if self._channel is None:
                self._channel = channel = self.KINDS[self._address.kind](self._address)
                async with asyncio.timeout(2 * TIMEOUT_S):
                    await channel.prepare(await channel.broker.connect())
            elif not await self._channel.broker.ping(TIMEOUT_S):
                raise TimeoutError("the broker does not answer any more")

    async def publish(self, message: Message) -> None:
        assert self._channel is not None
        with self._translated():
            async with asyncio.timeout(TIMEOUT_S):
                await self._channel.send(message)

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            with suppress(Exception):  # it is given up
                async with asyncio.timeout(CLOSE_S):
                    await channel.broker.stop()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - four libraries, each with a tree of its own
            words = f"{type(error).__name__}: {error}".replace("\n", " ")
            kind = MessageTooLarge if type(error).__name__ in TOO_LARGE else SinkUnavailable
            secret = self._address.password or self._address.user  # a token stands alone
            for each in (secret, quote(secret, safe="")) if secret else ():
                words = words.replace(each, "***")
            raise kind(words[:500]) from None
