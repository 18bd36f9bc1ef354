"""The URL of a PostgreSQL database as libpq documents it (PostgreSQL, 34.1): which parameters the
driver reads, which this service reads, and which have no effect here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit

# SQLAlchemy and Django write their driver behind the scheme.
POSTGRES_SCHEME = re.compile(r"postgres(ql)?(\+\w+)?")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
_DRIVER = """
host port dbname user password passfile service sslmode sslnegotiation sslcert sslkey
sslpassword sslrootcert sslcrl ssl_min_protocol_version ssl_max_protocol_version krbsrvname
gsslib options
"""
DRIVER = frozenset(_DRIVER.split())
# Whole numbers. 0 stands for the default, as in libpq, except that `keepalives=0` turns them off.
_NUMBERS = """
connect_timeout keepalives keepalives_idle keepalives_interval keepalives_count
tcp_user_timeout
"""
NUMBERS = frozenset(_NUMBERS.split())
# The driver has no such function, or the service decides itself: every session is called
# `darkroom`, speaks UTF-8 and is on the host that accepts writes.
_IGNORED = """
application_name channel_binding client_encoding fallback_application_name gssdelegation
gssencmode hostaddr load_balance_hosts max_protocol_version min_protocol_version
oauth_client_id oauth_client_secret oauth_issuer oauth_scope replication require_auth
requirepeer requiressl scram_client_key scram_server_key servicefile sslcertmode
sslcompression sslcrldir sslkeylogfile sslsni target_session_attrs
"""
IGNORED = frozenset(_IGNORED.split())
CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
}
FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")


@dataclass(frozen=True, slots=True)
class PostgresUrl:
    """`dsns`: one for each host, for the driver. `files` and `numbers` are given parameters by
    name. `system_roots`: the server's certificate is checked against the system's authorities.
    """

    dsns: tuple[str, ...]
    numbers: Mapping[str, int]
    files: Mapping[str, str]
    system_roots: bool
    ignored: tuple[str, ...]


def parse_postgres_url(url: str) -> PostgresUrl:
    """ValueError names an unknown parameter or one with a wrong value, and shows no value."""
    parts = urlsplit(url)
    params = dict(parse_qsl(parts.query))
    if not parts.netloc.rpartition("@")[2] and "host" not in params and "hostaddr" in params:
        params["host"] = params.pop("hostaddr")
    if params.get("ssl") == "true":  # libpq takes it for the sake of JDBC
        params = {"sslmode": "require"} | params
        del params["ssl"]
    foreign = sorted(params.keys() - DRIVER - NUMBERS - IGNORED)
    if foreign:
        names = ", ".join(
            name if NAME.fullmatch(name) else "one with odd characters" for name in foreign
        )
        raise ValueError(
            f"has parameters that PostgreSQL's own clients do not know: {names}. Leave them out. A"
            " setting of the server goes into options=-c%20NAME%3DVALUE"
        )
    for name, choices in CHOICES.items():
        if params.get(name, choices[0]) not in choices:
            raise ValueError(f"{name} should be one of {', '.join(choices)}")
    for name in NUMBERS & params.keys():
        if not re.fullmatch(r"-?[0-9]{1,9}", params[name]):
            raise ValueError(f"{name} should be a whole number")
    system_roots = params.get("sslrootcert") == "system"
    if system_roots:
        if params.get("sslmode", "verify-full") != "verify-full":
            raise ValueError("sslrootcert=system goes with sslmode=verify-full, as in libpq")
        del params["sslrootcert"]
    return PostgresUrl(
        tuple(_dsns(parts.netloc, parts.path, params)),
        {name: int(params[name]) for name in NUMBERS & params.keys()},
        {name: params[name] for name in FILES if name in params},
        system_roots,
        tuple(sorted(IGNORED & params.keys())),
    )


def _dsns(netloc: str, path: str, params: Mapping[str, str]) -> list[str]:
    """One URL for each host. The hosts are in the address, or else in the parameter `host`."""
    query = {name: value for name, value in params.items() if name in DRIVER}
    user, at, hosts = netloc.rpartition("@")
    if hosts or "host" not in query:
        text = f"?{urlencode(query, safe='/')}" if query else ""
        return [f"postgresql://{user}{at}{host}{path}{text}" for host in hosts.split(",")]
    names, ports = query.pop("host").split(","), query.pop("port", "").split(",")
    ports = ports * len(names) if len(ports) == 1 else ports
    if len(ports) != len(names) or not all(re.fullmatch("[0-9]{0,5}", port) for port in ports):
        raise ValueError("port should be one number, or one for each host")
    texts = [
        urlencode({"host": name} | ({"port": port} if port else {}) | query, safe="/")
        for name, port in zip(names, ports, strict=True)
    ]
    return [f"postgresql://{user}{at}{path}?{text}" for text in texts]
