"""Addresses of brokers, as `DARKROOM_SINKS` has them."""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

SECURE = {"nats+tls": "nats", "kafka+tls": "kafka", "amqps": "amqp", "rediss": "redis"}
SASL = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
TEXT, NAME = re.compile(r"[!-~]+"), re.compile(r"[A-Za-z0-9._:-]{1,100}")
SUBJECT = re.compile(r"[\w-]+", re.ASCII)
TYPE = re.compile(r"\*|[a-z_]+(\.[a-z_]+)*(\.\*)?")
HOST = re.compile(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]")
NAME_CHARS = 200


@dataclass(frozen=True, slots=True)
class Form:
    """The form of one kind's addresses."""

    port: int
    example: str
    path: re.Pattern[str]
    target: tuple[str, ...]  # options, one of which names the target
    hosts: int = 16
    options: tuple[str, ...] = ()


SUBJECTS, TOPIC = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII), re.compile(r"[\w.-]{1,249}", re.ASCII)
VHOST, DATABASE = re.compile(r"[^\s]*"), re.compile(r"\d{0,4}")
AMQP_EXAMPLE = "amqp://HOST:5672/VHOST?queue=NAME, or exchange=NAME"
FORMS = {
    "nats": Form(4222, "nats://HOST:4222/SUBJECT?stream=NAME", SUBJECTS, ("stream",)),
    "kafka": Form(9092, "kafka://HOST:9092/TOPIC", TOPIC, (), options=("sasl",)),
    "amqp": Form(5672, AMQP_EXAMPLE, VHOST, ("queue", "exchange"), hosts=1),
    "redis": Form(6379, "redis://HOST:6379/0?stream=KEY", DATABASE, ("stream",), hosts=1),
}


@dataclass(frozen=True, slots=True)
class SinkAddress:
    """`name` is the sink's name in the store and in metrics: `?name=`, or the address without user,
    password and other options.
    """

    kind: str
    name: str
    tls: bool
    hosts: tuple[str, ...]  # with ports
    user: str | None = field(repr=False)
    password: str | None = field(repr=False)
    path: str
    option: str  # the name of `target`'s option
    target: str
    types: tuple[str, ...]
    sasl: str

    def __str__(self) -> str:
        return self.name


def sink_address(value: object) -> SinkAddress:
    """Parses an address. The ValueError says what is wrong, without a part of the password."""
    if isinstance(value, SinkAddress):
        return value
    text = str(value)
    scheme = text.partition("://")[0].lower()
    kind = SECURE.get(scheme, scheme)
    if "://" not in text or kind not in FORMS:
        raise ValueError(
            f"should begin with {', '.join(f'{each}://' for each in (*FORMS, *SECURE))}"
        )
    form = FORMS[kind]
    try:
        parts = urlsplit(text)
        login, _, netloc = parts.netloc.rpartition("@")
        hosts = tuple(_host(each, form.port) for each in netloc.split(","))
    except ValueError:
        raise ValueError(f"should have a valid host and port: {form.example}") from None
    if len(hosts) > form.hosts:
        raise ValueError("should have one host")
    if not TEXT.fullmatch(text) or parts.fragment or "@" in parts.path + parts.query:
        raise ValueError(
            "should have its special characters percent-encoded, those of a password above all"
        )
    path, options = unquote(parts.path[1:]), _options(parts.query, form)
    if not form.path.fullmatch(path):
        raise ValueError(f"should have a valid path: {form.example}")
    option = next((name for name in form.target if name in options), "")
    target = options.get(option, "")
    if kind == "nats" and not SUBJECT.fullmatch(target):
        raise ValueError("should have a stream= of letters, digits, - and _")
    user, colon, password = login.partition(":")
    if "sasl" in options and not (colon and options["sasl"] in SASL):
        raise ValueError(f"should have sasl= {', '.join(SASL)}, with a user and a password")
    shown = f"?{option}={target}" if option else ""
    name = f"{kind}://{','.join(hosts)}/{parts.path[1:]}{shown}"[:NAME_CHARS]
    return SinkAddress(
        kind,
        options.get("name") or name,
        scheme in SECURE,
        hosts,
        unquote(user) or None,
        unquote(password) if colon else None,
        path,
        option,
        target,
        tuple(options["types"].split(",")) if "types" in options else (),
        options.get("sasl", SASL[0]),
    )


def _options(query: str, form: Form) -> dict[str, str]:
    """The options by name. `types` are joined by commas, any other option is there once."""
    given = parse_qs(query, keep_blank_values=True)
    names = (*form.target, *form.options, "types", "name")
    for name, values in given.items():
        if name not in names:
            raise ValueError(f"should have no options but {', '.join(names)}")
        if name != "types" and (
            len(values) > 1 or "," in values[0] or not TEXT.fullmatch(values[0])
        ):
            raise ValueError(f"should have {name}= once, with a value that has no comma")
    if len(given.keys() & set(form.target)) != min(1, len(form.target)):
        raise ValueError(f"should name one {' or '.join(form.target)}: {form.example}")
    options = {name: ",".join(values) for name, values in given.items()}
    if "name" in options and not NAME.fullmatch(options["name"]):
        raise ValueError("should have a short name= of letters, digits and . _ : -")
    if "types" in options and not all(
        TYPE.fullmatch(pattern) for pattern in options["types"].split(",")
    ):
        raise ValueError("should have types= like image.task.* or image.task.completed")
    return options


def _host(text: str, port: int) -> str:
    parts = urlsplit(f"//{text}")
    if not HOST.fullmatch(parts.netloc.removesuffix(f":{parts.port}")):
        raise ValueError
    return f"{text.removesuffix(f':{parts.port}').lower()}:{parts.port or port}"


def split_addresses(value: object) -> object:
    """Splits at commas before a scheme. Other commas separate the hosts of one address."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in re.split(r",(?=\s*[A-Za-z+]+://)", value))


def distinct(addresses: tuple[SinkAddress, ...]) -> tuple[SinkAddress, ...]:
    if len({address.name for address in addresses}) < len(addresses):
        raise ValueError("should have each address once, or under a name= of its own")
    return addresses
