"""Types of the settings: what a variable may contain."""

import os
import re
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from service.db.postgres_url import POSTGRES_SCHEME, parse_postgres_url
from service.events.broker_addresses import SinkAddress, distinct, sink_address, split_addresses
from service.variables import PREFIX

ADMIN_KEY_CHARS = 16
KEY_BYTES = 32
TEN_YEARS_S = 10 * 366 * 86_400

VISIBLE = re.compile(r"[!-~]+")
HOST = re.compile(r"[a-z0-9_.:-]+")
BUCKET = re.compile(
    r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}){0,8}"
)
# The end of an address that was copied from an example of a request.
API_PATH = re.compile(r"/+v1(/+(images/generations|tasks|credits|models))?/*$", re.IGNORECASE)
RESULT_HOST = re.compile(r"\.?[a-z0-9_]([a-z0-9_.-]*[a-z0-9])?")

Network = IPv4Network | IPv6Network


def split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def network(value: object) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    try:
        return ip_network(str(value))
    except ValueError:
        raise ValueError(
            "should be a network like 10.0.0.0/8 or fd00::/8, without host bits"
        ) from None


def ip_literal(host: str | None) -> IPv4Address | IPv6Address | None:
    """The address that a URL's host spells out, or None for a name."""
    try:
        return ip_address(host or "")
    except ValueError:
        return None


def result_host(value: str) -> str:
    value = value.lower().removeprefix("*") if value.startswith("*.") else value.lower()
    if not RESULT_HOST.fullmatch(value) and not ip_literal(value):
        raise ValueError(
            "should be a host, or .name for every subdomain, without scheme, port or path"
        )
    return value


def header_token(value: SecretStr) -> SecretStr:
    if not VISIBLE.fullmatch(value.get_secret_value()):
        raise ValueError("should be visible ASCII characters without spaces")
    return value


def long_enough(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < ADMIN_KEY_CHARS:
        raise ValueError(f"should have at least {ADMIN_KEY_CHARS} characters")
    return value


def http_address(value: str) -> SplitResult:
    """The parts of an http or https URL to which paths can be appended."""
    if not VISIBLE.fullmatch(value):
        raise ValueError("should be visible ASCII characters without spaces")
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError("should be a URL with a valid host and port") from None
    if (
        parts.scheme not in ("http", "https")
        or not HOST.fullmatch(parts.hostname or "")
        or parts.netloc.endswith(":")
    ):
        raise ValueError("should be an http or https URL with a host")
    if "@" in parts.netloc or "?" in value or "#" in value:
        raise ValueError("should have no user, password, query or fragment")
    return parts


def check_reachable(
    parts: SplitResult, networks: tuple[Network, ...], *, own_resolver: bool
) -> None:
    """ValueError: the upstream and the service cannot reach each other at this address.

    `own_resolver`: the service calls the address and checks a name's addresses when it resolves
    the name. Otherwise the upstream calls it.
    """
    host, number = parts.hostname or "", ip_literal(parts.hostname)
    if number and any(number in network for network in networks):
        return
    if parts.scheme == "http" and (number or not (own_resolver and networks)):
        raise ValueError(
            f"should be https: plain http is for addresses inside {PREFIX}UPSTREAM_NETWORKS"
        )
    local = host.rpartition(".")[2] == "localhost" or (not own_resolver and "." not in host)
    if (not number.is_global) if number else (local and not networks):
        raise ValueError(f"should be a public address: others are for {PREFIX}UPSTREAM_NETWORKS")


def check_postgres_url(value: str) -> None:
    """ValueError, without a part of the value, for another URL or one with a misplaced password."""
    try:
        parts = urlsplit(value)
        for host in parts.netloc.rpartition("@")[2].split(","):
            _ = urlsplit(f"//{host}").port
    except ValueError:
        parts = urlsplit("")
    wrong = "@" in parts.path + parts.query or parts.fragment
    if not POSTGRES_SCHEME.fullmatch(parts.scheme) or wrong:
        raise ValueError(
            "should be sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME, special"
            " characters percent-encoded"
        )
    parse_postgres_url(value)


def folder(value: Path) -> Path:
    try:
        return value.expanduser().absolute()
    except RuntimeError:
        raise ValueError("should be a folder of a user that exists") from None


def request_rate(value: str) -> str:
    """One rate in the notation of the library `limits`. `Retry-After` could not serve several."""
    try:
        from limits import parse_many
    except ImportError:
        raise ValueError("needs the extra limits: darkroom-service[limits]") from None
    try:
        valid = [limit.amount > 0 for limit in parse_many(value)] == [True]
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("should be requests per time, such as 600/minute")
    return value


def keys_of(text: str) -> list[bytes]:
    """The comma-separated keys of a secret. ValueError if one is short."""
    keys = [part.strip().encode() for part in text.split(",")]
    if any(len(key) < KEY_BYTES for key in keys):
        raise ValueError(f"should be comma-separated keys of at least {KEY_BYTES} bytes each")
    return keys


def long_keys(value: SecretStr) -> SecretStr:
    keys_of(value.get_secret_value())
    return value


Seconds = Annotated[float, Field(gt=0, le=TEN_YEARS_S, allow_inf_nan=False)]
Days = Annotated[float, Field(gt=0, le=TEN_YEARS_S // 86_400, allow_inf_nan=False)]
Schedule = Annotated[
    tuple[Seconds, ...], BeforeValidator(split), Field(min_length=1, max_length=100)
]
Networks = Annotated[
    tuple[Annotated[Network, BeforeValidator(network)], ...], BeforeValidator(split)
]
Hosts = Annotated[
    tuple[Annotated[str, AfterValidator(result_host)], ...],
    BeforeValidator(split),
    Field(min_length=1),
]
Port = Annotated[int, Field(ge=0, le=65535)]
Slots = Annotated[int, Field(ge=1, le=1024)]
Token = Annotated[SecretStr, AfterValidator(header_token)]
AdminKey = Annotated[Token, AfterValidator(long_enough)]
SecretKeys = Annotated[SecretStr, AfterValidator(long_keys)]
Folder = Annotated[Path, AfterValidator(folder)]
Sinks = Annotated[
    tuple[Annotated[SinkAddress, BeforeValidator(sink_address)], ...],
    BeforeValidator(split_addresses),
    AfterValidator(distinct),
]
Requests = Annotated[str, AfterValidator(request_rate)]
Lower = BeforeValidator(lower)


def log_value(value: object) -> object:
    if isinstance(value, SecretStr):
        return "***"
    if isinstance(value, tuple):
        return ",".join(str(log_value(each)) for each in value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | float | str | None) else str(value)


def spare_cores() -> int:
    """The cores that this process may use, without one for its event loop. At least one."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return max(1, (cores or 1) - 1)
