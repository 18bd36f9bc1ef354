"""Addresses from providers' consoles, against the real server and through TLS."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import asyncpg
import pytest
from structlog.testing import capture_logs

from service.db import failover
from service.errors import ConfigurationError
from service.resources import new_id
from service.upkeep.store_figures import mark
from tests.certificates import self_signed
from tests.servers import postgres_database
from tests.stores import open_postgres


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"))


@dataclass(slots=True)
class Provider:
    """A database behind TLS. `encrypted` counts its connections with TLS."""

    address: str
    encrypted: int = 0

    def url(self, query: str = "", scheme: str = "postgres") -> str:
        return f"{scheme}://{self.address}{query}"


@pytest.fixture(scope="module")
def database(postgres_server: str) -> Iterator[str]:
    """One database for all tests, migrated by the first."""
    with postgres_database(postgres_server) as url:
        yield url


@pytest.fixture
async def provider(database: str, certificate: Path) -> AsyncIterator[Provider]:
    """A proxy that ends TLS before the real server, which has none."""
    parts = urlsplit(database)
    given = dict(parse_qsl(parts.query))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await reader.readexactly(8)
        except asyncio.IncompleteReadError:  # the client was cancelled
            writer.close()
            return
        if first == b"\0\0\0\x08\x04\xd2\x16\x2f":  # the request for TLS
            writer.write(b"S")
            try:
                await writer.start_tls(tls)
            except (ConnectionError, ssl.SSLError):
                return
            made.encrypted += 1
            first = b""
        folder = given.get("host")
        theirs, ours = await (
            asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")
            if folder
            else asyncio.open_connection(parts.hostname, parts.port)
        )
        ours.write(first)
        await asyncio.gather(pipe(reader, ours), pipe(theirs, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    login = parts.netloc.rpartition("@")[0] or f"{given['user']}:any"
    port = server.sockets[0].getsockname()[1]
    made = Provider(f"{login}@localhost:{port}{parts.path}")
    yield made
    server.close()


async def usable(url: str) -> None:
    async with open_postgres(url, process="one", new_id=new_id) as store:
        await store.write(mark, None)


CONSOLES = {
    "Neon": "?sslmode=require&channel_binding=require",
    "Neon with a timeout": "?connect_timeout=15&sslmode=require&channel_binding=require",
    "Heroku, Render": "",
    "DigitalOcean, Azure": "?sslmode=require",
    "Supabase": "?sslmode=require&target_session_attrs=read-write",
    "RDS": "?sslmode=verify-full&sslrootcert={file}",
    "verify-ca": "?sslmode=verify-ca&sslrootcert={file}",
    "ssl=true": "?ssl=true",
    "Django": "?sslmode=require&connect_timeout=10&keepalives=1&keepalives_idle=30"
    "&keepalives_interval=10&keepalives_count=5&tcp_user_timeout=20000",
    "an application's name": "?sslmode=require&application_name=shop&client_encoding=utf8",
    "GSS": "?sslmode=require&gssencmode=disable&krbsrvname=postgres&sslsni=1",
    "options": "?sslmode=require&options=-c%20geqo%3Doff",
}


@pytest.mark.parametrize("query", CONSOLES.values(), ids=CONSOLES)
async def test_a_database_is_used_by_the_address_of_its_console(
    query: str, provider: Provider, certificate: Path
) -> None:
    """The service migrates and commits, with TLS wherever the provider has it."""
    await usable(provider.url(query.format(file=certificate)))
    assert provider.encrypted


async def test_the_systems_authorities_are_used_as_libpq_uses_them(
    provider: Provider, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sslrootcert=system` trusts the authorities of the system, and nothing else."""
    url = provider.url("?sslmode=verify-full&sslrootcert=system")
    with pytest.raises(ConfigurationError, match=r"DARKROOM_DATABASE_URL: .*certificate"):
        await usable(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    await usable(url)


async def test_parameters_without_effect_are_logged_once(provider: Provider) -> None:
    """One line at the start names them."""
    with capture_logs() as lines:
        await usable(
            provider.url("?sslmode=require&channel_binding=require&application_name=shop&sslsni=1")
        )
    said = [line for line in lines if line["event"] == "store.parameters_ignored"]
    assert [line["parameters"] for line in said] == ["application_name,channel_binding,sslsni"]


async def test_parameters_of_the_connection_are_used(provider: Provider) -> None:
    """Keepalives go to the socket, options to the server. The session keeps the name by which
    other processes find it.
    """
    url = provider.url(
        "?keepalives_idle=30&keepalives_interval=7&keepalives_count=3&tcp_user_timeout=20000"
        "&options=-c%20geqo%3Doff&application_name=shop"
    )
    settings = {"application_name": "darkroom", "lock_timeout": "5000"}
    connection: Any = await failover.connecting(url, settings)()
    try:
        held = connection._transport.get_extra_info("socket")
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        options = [held.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
        assert options == [30, 7, 3, 20_000]
        assert held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert await connection.fetchval("SHOW geqo") == "off"
        assert await connection.fetchval("SHOW application_name") == "darkroom"
    finally:
        await connection.close()
    connection = await failover.connecting(provider.url("?keepalives=0&keepalives_idle=0"), {})()
    held = connection._transport.get_extra_info("socket")
    assert not held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    await connection.close()


async def test_the_timeout_of_the_address_holds_for_each_host(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent host hides the next one for `connect_timeout` seconds, and 0 is the default. The
    next one, which answers, gets more time here.
    """
    connect, given = asyncpg.connect, list[float]()

    async def patient(host: str, *, timeout: float, **more: Any) -> Any:
        given.append(timeout)
        silent = len(given) % 2
        return await connect(host, timeout=timeout if silent else 30, **more)

    monkeypatch.setattr(asyncpg, "connect", patient)
    for seconds in (1, 0):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            host = f"@127.0.0.1:{silent.getsockname()[1]},"
            url = provider.url(f"?connect_timeout={seconds}").replace("@", host)
            if not seconds:
                monkeypatch.setattr(failover, "CONNECT_S", 0.1)
            connection = await failover.connecting(url, {})()
            await connection.close()
    assert given == [1, 1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?sslmode=verify-full&sslrootcert=/nowhere/root.pem", "sslrootcert: there is no file"),
        ("?sslmode=require&sslcert=/nowhere/client.pem", "sslcert: there is no file"),
        ("?sslmode=verify-full", "certificate"),
        ("?sslmode=require&ssl_min_protocol_version=SSLv3", "TLS version"),
        ("?gsslib=other", "gsslib"),
        ("?options=-c%20no_such_setting%3D1", "no_such_setting"),
        ("?connect_timeout=10&host=ignored&port=1", None),
    ],
)
async def test_an_address_that_cannot_work_stops_the_start_in_one_line(
    query: str,
    said: str | None,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The line names the setting and the parameter, and there is no traceback."""
    monkeypatch.setenv("HOME", str(tmp_path))  # without ~/.postgresql
    if said is None:
        await usable(provider.url(query))  # the host of the address wins
        return
    with pytest.raises(ConfigurationError) as caught:
        await usable(provider.url(query))
    assert str(caught.value).startswith("DARKROOM_DATABASE_URL: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_an_address_of_a_pooler_is_told_from_the_servers() -> None:
    """PgBouncer refuses the settings of the session, as in transaction mode it must."""
    said = b"SFATAL\0C08P01\0Munsupported startup parameter: lock_timeout\0\0"

    async def pooler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(b"E" + struct.pack("!i", len(said) + 4) + said)
        writer.close()

    async with await asyncio.start_server(pooler, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConfigurationError, match="not that of its pooler"):
            await usable(f"postgres://u:p@127.0.0.1:{port}/d?sslmode=disable")
