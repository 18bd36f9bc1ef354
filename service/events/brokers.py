"""Brokers through FastStream. Each event is one message, which the broker confirms before the next
one goes, under the event's id.

After any fault the broker worker closes the connection and opens a new one. The libraries' own
reconnecting is off, because it keeps messages or sends them twice unseen. Their logs are silenced
(`ops.logging`). A fault's SinkUnavailable has their message.
"""

import asyncio
import logging
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

import faststream

from service.errors import MessageRefused, MessageTooLarge, SinkUnavailable
from service.events.broker_addresses import SinkAddress
from service.events.feed import Entry

TIMEOUT_S, CLOSE_S = 5.0, 2.0  # for a broker to confirm, to answer, to be connected to
CONTENT_TYPE = "application/cloudevents+json"
DUPLICATES_S = 3600  # how long a stream that is made here remembers ids
KEPT_S = 30 * 86_400  # and how long it keeps messages
REMEMBERED = 1000  # entries at the end of a Redis stream whose ids are compared
# JetStream's and Kafka's limit is 1 MiB unless it is set. An AMQP exchange returns a message for
# which it has no queue.
REFUSALS: dict[str, type[MessageRefused]] = {
    "MaxPayloadError": MessageTooLarge,
    "MessageSizeTooLargeError": MessageTooLarge,
    "PublishError": MessageRefused,
}
LARGEST = 64 << 20  # bytes of a message, so that the broker's own limit is met first

logging.getLogger(faststream.__name__).handlers.clear()  # FastStream writes to standard error


class BrokerSink(ABC):
    """The broker at an address. ImportError: the extra is not installed."""

    def __init__(self, address: SinkAddress) -> None:
        self.name = address.name
        self.types: Sequence[str] = address.types
        self._address = address
        self._broker: Any = None  # FastStream's, None: closed
        self._new_broker(address)

    @abstractmethod
    def _new_broker(self, address: SinkAddress) -> Any:
        """FastStream's broker, not connected."""

    async def _prepare(self, connection: Any) -> None:  # noqa: B027 - Kafka makes topics itself
        """Makes the stream or queue if it is missing. Leaves it as it is if it exists."""

    @abstractmethod
    async def _send(self, entry: Entry, trace: Mapping[str, str]) -> None: ...

    async def open(self) -> None:
        with self._translated():
            if self._broker is None:
                self._broker = self._new_broker(self._address)
                async with asyncio.timeout(2 * TIMEOUT_S):
                    await self._prepare(await self._broker.connect())
            elif not await self._broker.ping(TIMEOUT_S):
                raise TimeoutError("the broker does not answer any more")

    async def publish(self, entry: Entry, trace: Mapping[str, str]) -> None:
        with self._translated():
            async with asyncio.timeout(TIMEOUT_S):
                await self._send(entry, trace)

    async def close(self) -> None:
        broker, self._broker = self._broker, None
        if broker is not None:
            with suppress(Exception):  # it is given up
                async with asyncio.timeout(CLOSE_S):
                    await broker.stop()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raises SinkUnavailable, without the password, for the errors of four libraries."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each library has a tree of its own
            text = f"{type(error).__name__}: {error}".replace("\n", " ")
            kind = REFUSALS.get(type(error).__name__, SinkUnavailable)
            if kind is MessageRefused and self._address.option == "queue":
                kind = SinkUnavailable  # the queue is gone, and the next connection makes it
            secret = self._address.password or self._address.user  # a token stands alone
            for each in (secret, quote(secret, safe="")) if secret else ():
                text = text.replace(each, "***")
            raise kind(text[:500]) from None


class Nats(BrokerSink):
    """JetStream. The subject is the address's and the event's type. `Nats-Msg-Id` is the event's
    id.
    """

    def _new_broker(self, address: SinkAddress) -> Any:
        from faststream.nats import NatsBroker
        from faststream.nats.security import NatsSecurity, NatsToken, NatsUserPassword
        from nats.aio.client import Client

        class ClosingNatsBroker(NatsBroker):
            """Closes its socket when the server accepts the connection but not the password."""

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
        user, password = address.user, address.password
        if user is not None:
            security = NatsToken(user) if password is None else NatsUserPassword(user, password)
        return ClosingNatsBroker(
            [f"{'tls' if address.tls else 'nats'}://{host}" for host in address.hosts],
            security=security,
            name="darkroom",
            allow_reconnect=False,
            max_reconnect_attempts=1,  # else the first connection is tried for ever
            reconnect_time_wait=0,
            connect_timeout=round(TIMEOUT_S),
            drain_timeout=round(CLOSE_S),
            logger=None,
        )

    async def _prepare(self, connection: Any) -> None:
        from nats.js.api import StreamConfig
        from nats.js.errors import NotFoundError

        stream = connection.jetstream(timeout=TIMEOUT_S)
        try:
            await stream.stream_info(self._address.target)
        except NotFoundError:
            kept: Any = {"duplicate_window": DUPLICATES_S, "max_age": KEPT_S}
            subjects = [f"{self._address.path}.>"]
            await stream.add_stream(StreamConfig(self._address.target, subjects=subjects, **kept))

    async def _send(self, entry: Entry, trace: Mapping[str, str]) -> None:
        await self._broker.publish(
            entry.document,
            f"{self._address.path}.{entry.type}",
            headers={"Nats-Msg-Id": entry.id, "content-type": CONTENT_TYPE, **trace},
            correlation_id=entry.id,
            stream=self._address.target,
            timeout=TIMEOUT_S,
        )


class Kafka(BrokerSink):
    """An idempotent producer with `acks=all`. The key is the task's id, which keeps its events in
    order. The header `ce_id` is the event's id.
    """

    def _new_broker(self, address: SinkAddress) -> Any:
        from faststream.kafka import KafkaBroker
        from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512

        context = ssl.create_default_context() if address.tls else None
        tls: Any = {"ssl_context": context, "use_ssl": address.tls}
        security = BaseSecurity(**tls)
        if address.user is not None:
            mechanisms = {"SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}
            mechanism = mechanisms.get(address.sasl, SASLPlaintext)
            security = mechanism(address.user, address.password or "", **tls)
        return KafkaBroker(
            list(address.hosts),
            security=security,
            client_id="darkroom",
            acks="all",
            enable_idempotence=True,
            request_timeout_ms=round(TIMEOUT_S * 1000),
            max_request_size=LARGEST,
            logger=None,
        )

    async def _send(self, entry: Entry, trace: Mapping[str, str]) -> None:
        ids = {"ce_id": entry.id, "ce_type": entry.type}
        await self._broker.publish(
            entry.document,
            self._address.path,
            key=(entry.task_id or entry.id).encode(),
            headers={**ids, "content-type": CONTENT_TYPE, **trace},
            correlation_id=entry.id,
        )


class Amqp(BrokerSink):
    """Publisher confirms. Messages are persistent and must reach a queue. `message_id` is the
    event's id, `type` its type.
    """

    def _new_broker(self, address: SinkAddress) -> Any:
        from aio_pika import RobustConnection
        from faststream.rabbit import Channel as Options
        from faststream.rabbit import RabbitBroker

        class ClosingRabbitBroker(RabbitBroker):
            """Closes a connection that fails while it is being opened."""

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

        user = quote(address.user or "guest", safe="")
        password = quote(address.password or "guest", safe="")
        host, path = address.hosts[0], quote(address.path, safe="")
        return ClosingRabbitBroker(
            f"amqp{'s' * address.tls}://{user}:{password}@{host}/{path}",
            timeout=TIMEOUT_S,
            default_channel=Options(publisher_confirms=True, on_return_raises=True),
            app_id="darkroom",
            logger=None,
        )

    async def _prepare(self, connection: Any) -> None:
        from aio_pika.exceptions import ChannelNotFoundEntity

        target = self._address.target
        async with connection.channel() as channel:
            if self._address.option == "exchange":
                await channel.get_exchange(target, ensure=True)
                return
            try:
                await channel.declare_queue(target, passive=True)
            except ChannelNotFoundEntity:  # which has closed the channel
                async with connection.channel() as another:
                    await another.declare_queue(target, durable=True)

    async def _send(self, entry: Entry, trace: Mapping[str, str]) -> None:
        to_exchange = self._address.option == "exchange"
        await self._broker.publish(
            entry.document,
            routing_key=entry.type if to_exchange else self._address.target,
            exchange=self._address.target if to_exchange else None,
            mandatory=True,
            persist=True,
            timeout=TIMEOUT_S,
            content_type=CONTENT_TYPE,
            headers=dict(trace),
            message_id=entry.id,
            message_type=entry.type,
            correlation_id=entry.id,
        )


class Redis(BrokerSink):
    """An entry has the fields `id`, `type`, `content-type` and `event`. An id among the last
    entries is not added again. FastStream wraps the bytes, so entries go through its client.
    """

    def _new_broker(self, address: SinkAddress) -> Any:
        from faststream.redis import RedisBroker

        user, login = quote(address.user or "", safe=""), ""
        if address.password is not None:
            login = f"{user}:{quote(address.password, safe='')}@"
        quiet: Any = None  # RedisBroker's annotation does not allow None, its documentation does
        return RedisBroker(
            f"redis{'s' * address.tls}://{login}{address.hosts[0]}/{address.path or 0}",
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            logger=quiet,
        )

    async def _prepare(self, connection: Any) -> None:
        self._client = connection
        last = await connection.xrevrange(self._address.target, count=REMEMBERED)
        self._ids = {fields.get(b"id", b"") for _, fields in last}

    async def _send(self, entry: Entry, trace: Mapping[str, str]) -> None:
        if entry.id.encode() not in self._ids:
            fields = {"id": entry.id, "type": entry.type, "content-type": CONTENT_TYPE}
            await self._client.xadd(
                self._address.target, {**fields, **trace, "event": entry.document}
            )


KINDS: dict[str, type[BrokerSink]] = {"nats": Nats, "kafka": Kafka, "amqp": Amqp, "redis": Redis}
