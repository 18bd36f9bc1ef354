"""Addresses of brokers: every form, and the message for a wrong one, which never shows the
password.
"""

import pytest

from service.errors import ConfigurationError
from service.events.broker_addresses import SECURE, SinkAddress, sink_address
from service.events.brokers import KINDS
from service.settings import load_settings, masked


def test_an_address_has_its_parts() -> None:
    """User and password are percent-encoded, a missing port is the usual one, and types are
    repeated or joined.
    """
    got = sink_address(
        "nats+tls://us%40er:p%3Aw@Host,b:1/darkroom.events?stream=EVENTS&types=image.task.*&types=callback.conflict,*"
    )
    assert (got.kind, got.tls, got.hosts, got.user, got.password) == (
        "nats",
        True,
        ("host:4222", "b:1"),
        "us@er",
        "p:w",
    )
    assert (got.path, got.option, got.target) == ("darkroom.events", "stream", "EVENTS")
    assert got.types == ("image.task.*", "callback.conflict", "*")
    assert sink_address(got) is got


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nats://u:p@h/a.b?stream=S&types=*", "nats://h:4222/a.b?stream=S"),
        ("kafka+tls://u:p@a,[::1]:1/topic?sasl=SCRAM-SHA-512", "kafka://a:9092,[::1]:1/topic"),
        ("amqps://u:p@h/vhost?exchange=darkroom", "amqp://h:5672/vhost?exchange=darkroom"),
        ("amqp://h?queue=q", "amqp://h:5672/?queue=q"),
        ("redis://:p@h:1/2?stream=s", "redis://h:1/2?stream=s"),
        ("redis://h/?stream=s&name=main", "main"),
    ],
)
def test_a_sink_keeps_its_name_when_its_password_changes(text: str, name: str) -> None:
    """Its name is the address without user, password and other options, or the given name."""
    assert (sink_address(text).name, str(sink_address(text))) == (name, name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("http://h/x", "begin with nats://, kafka://, amqp://, redis://"),
        ("nats://h/a", "name one stream: nats://HOST:4222/SUBJECT"),
        ("nats://h?stream=S", "valid path: nats://HOST:4222/SUBJECT"),
        ("nats://h/a b?stream=S", "percent-encoded"),
        ("nats://h/a?stream=a.b", "stream= of letters"),
        ("nats:///a?stream=S", "valid host and port"),
        ("kafka://h:x/t", "valid host and port: kafka://HOST:9092/TOPIC"),
        ("kafka://h:70000/t", "valid host and port"),
        ("kafka://h/", "valid path"),
        ("kafka://h/t?acks=1", "no options but sasl, types, name"),
        ("kafka://h/t?sasl=PLAIN", "with a user and a password"),
        ("kafka://u:pa55word@h/t?sasl=GSSAPI", "sasl= PLAIN"),
        ("amqp://a,b/?queue=q", "one host"),
        ("amqp://h/?queue=q&exchange=e", "name one queue or exchange"),
        ("amqp://h/?queue=", "queue= once, with a value"),
        ("redis://h/x?stream=s", "valid path: redis://HOST:6379/0"),
        ("redis://:pa55word#x@h/0?stream=s", "valid host and port"),
        ("redis://:x?pa55word@h/0?stream=s", "valid host and port|percent-encoded"),
        ("redis://:x/pa55word@h/0?stream=s", "valid host and port|percent-encoded"),
        ("redis://h/0?stream=s&types=Image", "types= like image.task"),
        ("redis://h/0?stream=s&name=a/b", "short name="),
    ],
)
def test_a_wrong_address_is_reported_in_one_line(text: str, reason: str) -> None:
    """The line names the variable and the item, never the password."""
    with pytest.raises(ConfigurationError, match=reason) as caught:
        load_settings({"DARKROOM_SINKS": f"redis://h/0?stream=first,{text}"}, None)
    assert str(caught.value).startswith("DARKROOM_SINKS: item 2 should ")
    assert "pa55word" not in str(caught.value)


def test_the_setting_takes_several_addresses_and_never_shows_a_password() -> None:
    """A comma separates addresses, or the hosts of one address. Each address may occur once."""
    got = load_settings(
        {"DARKROOM_SINKS": "kafka://u:pa55word@a:1,b:2/t, nats://x:pa55word@h/s?stream=S"}, None
    )
    assert all(isinstance(address, SinkAddress) for address in got.sinks)
    assert masked(got)["sinks"] == "kafka://a:1,b:2/t,nats://h:4222/s?stream=S"
    assert "pa55word" not in f"{got!r} {masked(got)}"
    assert masked(load_settings({}, None))["sinks"] == ""
    with pytest.raises(ConfigurationError, match="item 1 should have stream= once"):
        load_settings({"DARKROOM_SINKS": "redis://h/0?stream=s,nats:/h/a"}, None)
    with pytest.raises(ConfigurationError, match="each address once"):
        load_settings({"DARKROOM_SINKS": "kafka://a/t,kafka://u:p@a/t"}, None)


@pytest.mark.parametrize(
    "text",
    [
        "nats+tls://token@h/a?stream=S",
        "kafka+tls://u:p@h/t?sasl=SCRAM-SHA-256",
        "kafka://u:p@h/t",
        "amqps://h/%2F?exchange=e",
        "rediss://u:p@h?stream=s",
    ],
)
def test_the_brokers_library_accepts_every_form_of_an_address(text: str) -> None:
    """TLS, tokens and Kafka's users are in the form that the library expects. Nothing is
    connected.
    """
    address = sink_address(text)
    assert (KINDS[address.kind](address).name, address.tls) == (
        address.name,
        text.partition("://")[0] in SECURE,
    )
