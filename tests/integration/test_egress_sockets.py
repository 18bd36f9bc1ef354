"""The egress client against real servers on loopback: its connections, its redirects, and the error
of each failure.
"""

import asyncio
import datetime as dt
import gzip
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service.errors import CallTimedOut, ConnectionLost, EgressRefused, NotConnected
from service.net.egress_client import Egress, Rules
from service.net.responses import Streamed
from service.net.service_client import ServiceClient
from service.net.transport import KEEP_ALIVE_S, Resolve
from tests.waiting import wait_until

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Write = Callable[[bytes], Awaitable[None]]
# Takes the request's bytes and a write function, returns whether the connection stays open.
Answer = Callable[[bytes, Write], Awaitable[bool]]


@dataclass
class Server:
    """A listener that counts its connections and keeps every request."""

    port: int = 0
    connections: int = 0
    left: int = 0  # connections that the client closed
    requests: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def always(answer: bytes) -> Answer:
    async def write(_: bytes, send: Write) -> bool:
        await send(answer)
        return True

    return write


def after_first(answer: Answer) -> Answer:
    """Answers the first request normally. The next request then has a connection already, and its
    short time limit does not include connecting.
    """
    count = iter(range(1))

    async def write(request: bytes, send: Write) -> bool:
        if next(count, None) is None:
            return await answer(request, send)
        await send(OK)
        return True

    return write


@asynccontextmanager
async def serving(
    answer: Answer | bytes = OK, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    """A server on loopback that reads whole requests and lets `answer` write."""
    server, tasks = Server(), set[asyncio.Task[None]]()
    answers = always(answer) if isinstance(answer, bytes) else answer

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [
                    int(line[15:])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length:")
                ]
                request = head + await reader.readexactly(length[0] if length else 0)
                server.requests.append(request)
                if not await answers(request, send):
                    return
        except asyncio.IncompleteReadError:
            server.left += 1
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        tasks.add(asyncio.ensure_future(connection(reader, writer)))

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
        await listener.wait_closed()


def redirect(location: str, status: int = 302) -> bytes:
    return (
        f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    )


def names(*rounds: Sequence[str]) -> tuple[Resolve, list[str]]:
    """Returns a resolver and the list of names it was asked for. The resolver answers each round in
    turn and repeats the last.
    """
    asked: list[str] = []

    async def resolve(host: str) -> Sequence[str]:
        asked.append(host)
        return rounds[min(len(asked), len(rounds)) - 1]

    return resolve, asked


def open_egress(purpose: str = "sandbox", **rules: object) -> Egress:
    # mypy cannot match the keywords of Rules.
    return Egress(Rules(purpose, networks=LOOPBACK, **rules), keep_alive=60)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Server and client TLS contexts with a certificate for a.test."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a.test")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
    )
    builder = builder.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(
        now + dt.timedelta(days=1)
    )
    builder = builder.add_extension(
        x509.SubjectAlternativeName(
            [x509.DNSName("a.test"), x509.IPAddress(ip_address("127.0.0.1"))]
        ),
        False,
    )
    file: Path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(
        private + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cafile=str(file))


# --- connections
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "127.0.0.1.",
            "127.1",
            "127.0.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "017700000001",
            "0",
            "0.0.0.0",
        ),
        *(
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[::1%25lo]",
            "[::1%lo]",
        ),
        *(
            "１２７.０.０.１",
            "127。0。0。1",
            "①②⑦.0.0.1",
            "localhost",
            "LOCALHOST.",
            "a.test",
            "u@127.0.0.1",
            "127.0.0.1%00",
        ),
    ],
)
async def test_nothing_connects_to_this_machine_from_outside(host: str, scheme: str) -> None:
    """A purpose whose networks exclude loopback connects to no spelling of a loopback address."""
    resolve, _ = names(["127.0.0.1"])
    async with (
        serving() as server,
        Egress(Rules("endpoints", networks=(ip_network("10.0.0.0/8"),)), resolve=resolve) as egress,
    ):
        with pytest.raises(EgressRefused):
            await egress.request(
                "POST", f"{scheme}://{host}:{server.port}/", content=b"x", timeout=5
            )
        with pytest.raises(EgressRefused):
            async with egress.stream("GET", f"{scheme}://{host}:{server.port}/", timeout=5, idle=5):
                pass
        assert server.connections == 0


async def test_a_name_that_changes_after_the_check_is_judged_again() -> None:
    """The client makes no connection to a name that was public at the check and is loopback at the
    time of the connection.
    """
    resolve, asked = names(["1.1.1.1"], ["127.0.0.1"])
    refused: list[tuple[str, str, str]] = []
    egress = Egress(
        Rules("endpoints"), resolve=resolve, on_refused=lambda *what: refused.append(what)
    )
    async with serving() as server, egress:
        await egress.check(f"https://a.test:{server.port}/")
        with pytest.raises(EgressRefused):
            await egress.request("POST", f"https://a.test:{server.port}/", timeout=5)
        assert (server.connections, asked) == (0, ["a.test", "a.test"])
    assert refused == [("endpoints", "a.test", "127.0.0.1 is not globally routable")]


async def test_the_connection_goes_to_the_address_that_was_judged() -> None:
    """A new connection resolves the name once, so a second answer cannot replace the checked one. A
    kept connection does not resolve again.
    """
    resolve, asked = names(["127.0.0.1"], ["10.0.0.1"])
    async with (
        serving() as server,
        Egress(Rules("endpoints", networks=LOOPBACK), resolve=resolve, keep_alive=60) as egress,
    ):
        for _ in range(2):
            assert (
                await egress.request("GET", f"http://a.test:{server.port}/", timeout=5)
            ).status == 200
        assert (server.connections, len(server.requests), asked) == (1, 2, ["a.test"])


async def test_a_connection_of_one_purpose_serves_no_other() -> None:
    """Each purpose has its own connection pool. Another purpose opens its own connection, or is
    refused if its rules forbid the address.
    """
    resolve, _ = names(["127.0.0.1"])
    made = [
        Egress(Rules(purpose, networks=LOOPBACK), resolve=resolve, keep_alive=60)
        for purpose in ("sandbox", "endpoints")
    ]
    async with serving() as server, made[0] as one, made[1] as two:
        async with Egress(
            Rules("task_callbacks", networks=(ip_network("10.0.0.0/8"),)), resolve=resolve
        ) as closed:
            url = f"http://a.test:{server.port}/"
            for egress in (one, two, one, two):
                assert (await egress.request("GET", url, timeout=5)).status == 200
            assert (server.connections, len(server.requests)) == (2, 4)
            for scheme in ("http", "https"):
                with pytest.raises(EgressRefused):
                    await closed.request("GET", f"{scheme}://a.test:{server.port}/", timeout=5)
        assert (server.connections, len(server.requests)) == (2, 4)


async def test_an_idle_connection_is_left_before_the_server_leaves_it() -> None:
    """The client closes first. Servers close idle connections after at least 2 to 5 s, and a
    submission that meets such a close has an uncertain outcome.
    """
    assert KEEP_ALIVE_S < 2
    async with (
        serving() as server,
        Egress(Rules("upstream", networks=LOOPBACK), keep_alive=0.05) as egress,
    ):
        await egress.request("POST", server.url, timeout=5)
        await wait_until(lambda: server.left)  # without another request
        await egress.request("POST", server.url, timeout=5)
        assert (server.connections, len(server.requests)) == (2, 2)


async def test_plain_http_is_for_networks_alone() -> None:
    """Inside the networks plain http works by address and by name. Outside them the client sends
    nothing.
    """
    resolve, _ = names(["127.0.0.1"])
    async with serving() as server:
        async with Egress(Rules("endpoints", networks=LOOPBACK), resolve=resolve) as egress:
            assert (await egress.request("GET", server.url, timeout=5)).body == b"ok"
            assert (
                await egress.request("GET", f"http://A.test.:{server.port}", timeout=5)
            ).body == b"ok"
        assert b"host: a.test:" in server.requests[1].lower()
        async with Egress(Rules("endpoints"), resolve=resolve) as egress:
            with pytest.raises(EgressRefused, match="plain http"):
                await egress.request("GET", server.url, timeout=5)
        assert len(server.requests) == 2


async def test_an_http_link_out_of_the_networks_is_fetched_by_https(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """With `upgrade` the first lookup chooses https, and the address of the connection is then
    checked by the rules for https.
    """
    resolve, _ = names(["1.1.1.1"], ["127.0.0.1"])
    egress = Egress(Rules("results", networks=LOOPBACK, upgrade=True), resolve=resolve, tls=tls[1])
    async with (
        serving(tls=tls[0]) as server,
        egress,
        egress.stream("GET", f"http://a.test:{server.port}/x", timeout=5, idle=5) as got,
    ):
        assert (got.url, b"".join([chunk async for chunk in got.chunks()])) == (
            f"https://a.test:{server.port}/x",
            b"ok",
        )


async def test_a_proxy_of_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would resolve the name itself, so the client uses none."""
    async with serving() as proxy, serving() as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with open_egress() as egress:
            await egress.request("GET", server.url, timeout=5)
        await asyncio.to_thread(ServiceClient(server.url, "sk").call, "GET", "/")
        assert (proxy.connections, server.connections) == (0, 2)


# --- redirects
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["http://10.0.0.1/", "//[bad/", "ftp://a/", "\\\\x", ""])
async def test_a_redirect_is_an_answer_unless_the_rules_follow_it(location: str) -> None:
    """With no redirects allowed the client returns a 3xx answer unchanged, for any location."""
    async with serving(redirect(location)) as server, open_egress() as egress:
        response = await egress.request("POST", server.url, timeout=5)
        assert (response.status, response.headers["location"], len(server.requests)) == (
            302,
            location,
            1,
        )


@pytest.mark.parametrize(
    "location",
    [
        *(
            "http://127.0.0.2:{port}/",
            "http://2130706433:{port}/",
            "http://0x7f.1:{port}/",
            "http://b.test:{port}/",
            "//127.0.0.2:{port}/",
        ),
        *(
            "http://u@127.0.0.1:{port}/",
            "ftp://127.0.0.1:{port}/",
            "http:///",
            "//[::1",
            "http://127.0.0.1:{port}/\x7fx",
            "file:///etc/passwd",
        ),
        *("http://[::ffff:127.0.0.1]:{port}/", "https://10.0.0.1/", "/" + "x" * 2048),
    ],
)
async def test_every_redirect_is_judged_anew(location: str) -> None:
    """A redirect that the rules forbid (host list, address, notation, scheme) ends the call, and
    the client does not connect to its target.
    """
    rules = Rules(
        "results",
        networks=(ip_network("127.0.0.1/32"),),
        hosts=("127.0.0.1", "127.0.0.2", "10.0.0.1"),
        redirects=5,
    )
    async with (
        serving() as there,
        Egress(rules) as egress,
        serving(redirect(location.format(port=there.port))) as here,
    ):
        with pytest.raises(EgressRefused):
            await egress.request("GET", here.url, timeout=5)
        assert (there.connections, len(here.requests)) == (0, 1)


async def test_a_get_follows_as_many_redirects_as_the_rules_say() -> None:
    """With a limit of two, a GET follows two redirects, also relative ones, and the third is
    refused. A POST follows none.
    """

    async def answer(request: bytes, send: Write) -> bool:
        step = int(request.split(b" ")[1].rsplit(b"/", 1)[1])
        await send(redirect(str(step - 1), 307) if step else OK)
        return True

    async with serving(answer) as server, open_egress(redirects=2) as egress:
        async with egress.stream("GET", f"{server.url}/a/2", timeout=5, idle=5) as got:
            assert (got.status, got.url) == (200, f"{server.url}/a/0")
        with pytest.raises(EgressRefused, match="more than 2 redirects"):
            await egress.request("GET", f"{server.url}/a/3", timeout=5)
        assert (await egress.request("POST", f"{server.url}/a/1", timeout=5)).status == 307


async def test_credentials_stay_with_whom_they_were_meant_for() -> None:
    """A redirect to another origin drops the key and every header that is not known to be harmless.
    A redirect within the origin keeps them.
    """
    sent = {"Authorization": "Bearer k", "X-Api-Key": "k", "Cookie": "k", "Accept": "image/*"}
    async with serving() as other, open_egress(redirects=1) as egress:
        async with serving(redirect(f"{other.url}/")) as server:
            await egress.request("GET", server.url, headers=sent, timeout=5)
        assert b"Bearer k" in server.requests[0]
        assert b"image/*" in other.requests[0]
        assert not any(
            word in other.requests[0].lower()
            for word in (b"authorization", b"x-api-key", b"cookie")
        )

    async def same(request: bytes, send: Write) -> bool:
        await send(OK if b"/there" in request else redirect("/there"))
        return True

    async with serving(same) as server, open_egress(redirects=1) as egress:
        await egress.request("GET", server.url, headers=sent, timeout=5)
        assert b"Bearer k" in server.requests[1]


# --- requests and answers
# --------------------------------------------------------------------------------------------


async def test_a_request_leaves_as_it_was_written() -> None:
    """Method, path, query, body and headers arrive unchanged. The client names itself and asks for
    an uncompressed body.
    """
    async with serving() as server, open_egress() as egress:
        url = f"{server.url}/a%2Fb%7E//c?X=%2F%7E%40a+b%20c&d=%E4%BD%A0,;:@!$'()*"
        response = await egress.request(
            "POST",
            url,
            headers={"X-One": "1", "Accept-Encoding": "gzip"},
            content=b'{"a":1}',
            timeout=5,
        )
        head, body = server.requests[0].split(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        assert head.split(b" ")[:2] == [b"POST", url.removeprefix(server.url).encode()]
        assert body == b'{"a":1}'
        assert any(line.startswith(b"user-agent: darkroom/") for line in lines)
        assert {b"x-one: 1", b"accept-encoding: identity", b"content-length: 7"} <= set(lines)
        assert sum(line.startswith(b"host:") for line in lines) == 1
        assert (response.status, response.headers["content-length"]) == (200, "2")
        assert response.duration > 0


async def test_a_large_body_is_sent_whole_and_with_its_length() -> None:
    """A body of many pieces arrives byte for byte, without chunked encoding."""
    content = bytes(range(256)) * 8192
    async with serving() as server, open_egress() as egress:
        assert (await egress.request("POST", server.url, content=content, timeout=5)).status == 200
    head, body = server.requests[0].split(b"\r\n\r\n", 1)
    assert b"content-length: 2097152" in head.lower()
    assert b"transfer-encoding" not in head.lower()
    assert body == content


async def test_an_answer_that_comes_before_the_body_was_read_counts() -> None:
    """A server may refuse a large body by its head alone and never read on. The client returns that
    answer.
    """
    done = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Large\r\nContent-Length: 2\r\n\r\nno")
        await done.wait()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server, open_egress() as egress:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        response = await egress.request("POST", url, content=bytes(50_000_000), timeout=5)
        assert (response.status, response.body) == (413, b"no")
        done.set()


async def test_no_cookie_is_kept() -> None:
    """The client keeps no cookies between calls, because calls belong to different owners."""
    async with (
        serving(b"HTTP/1.1 204 No\r\nSet-Cookie: a=1\r\n\r\n") as server,
        open_egress() as egress,
    ):
        await egress.request("GET", server.url, timeout=5)
        await egress.request("GET", server.url, timeout=5)
        assert not any(b"cookie" in request.lower() for request in server.requests)


async def test_a_compressed_body_is_left_as_it_is() -> None:
    """The client never decompresses a body, so a small body cannot swell."""
    bomb = gzip.compress(bytes(1 << 20))
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
        + bomb
    )
    async with serving(answer) as server, open_egress() as egress:
        response = await egress.request("GET", server.url, timeout=5)
        assert (response.body, response.headers["content-encoding"]) == (bomb, "gzip")


@pytest.mark.parametrize("limit", [99_999, 100_000, 0])
async def test_a_long_body_is_cut(limit: int) -> None:
    """The client returns at most `max_bytes`."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000)
    async with serving(answer) as server, open_egress() as egress:
        response = await egress.request("GET", server.url, timeout=5, max_bytes=limit)
        assert len(response.body) == limit


async def test_an_endless_body_ends_at_the_limit() -> None:
    """The client closes the connection to an endless body after `max_bytes`."""

    async def answer(_: bytes, send: Write) -> bool:
        await send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await send(bytes(1 << 16))

    async with serving(answer) as server, open_egress() as egress:
        response = await egress.request("GET", server.url, timeout=10, max_bytes=1 << 20)
        assert len(response.body) == 1 << 20


async def test_a_stream_gives_the_body_in_pieces() -> None:
    """All bytes arrive in order, over TLS as well. A reader may leave the stream early without
    harm.
    """
    body = bytes(range(256)) * 4096
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(body)
        + body
    )
    async with serving(answer) as server, open_egress() as egress:
        async with egress.stream("GET", server.url, timeout=5, idle=5) as got:
            assert (got.status, got.headers["content-type"]) == (200, "image/png")
            assert b"".join([chunk async for chunk in got.chunks()]) == body
        async with egress.stream("GET", server.url, timeout=5, idle=5) as got:
            assert await anext(got.chunks())


# --- failures
# --------------------------------------------------------------------------------------------------


async def test_a_refused_connection_is_not_connected() -> None:
    """No server listens, so nothing was sent. The error text shows neither path nor query."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with open_egress() as egress:
            with pytest.raises(NotConnected, match=r"^127\.0\.0\.1: Connect") as caught:
                await egress.request(
                    "POST",
                    f"http://127.0.0.1:{taken.getsockname()[1]}/secret?key=secret",
                    timeout=5,
                )
    assert "secret" not in str(caught.value)


async def test_a_name_that_cannot_be_resolved_in_time_is_not_connected() -> None:
    """A name server that never answers leaves no uncertain call."""

    async def resolve(_: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    async with Egress(Rules("upstream"), resolve=resolve) as egress:
        with pytest.raises(NotConnected, match="in time"):
            await egress.request("POST", "https://a.test/", timeout=0.05)


async def test_a_tls_handshake_that_fails_or_stalls_is_not_connected(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """The request was never sent if the certificate is untrusted or for another name, or if the
    server speaks no TLS or stays silent.
    """
    resolve, _ = names(["127.0.0.1"])

    async def quiet(*_: object) -> bool:
        return bool(await asyncio.Event().wait())

    async with (
        serving(tls=tls[0]) as server,
        serving(b"no TLS here") as plain,
        serving(quiet) as silent,
    ):
        async with Egress(
            Rules("upstream", networks=LOOPBACK), resolve=resolve, tls=tls[1]
        ) as egress:
            assert (
                await egress.request("GET", f"https://a.test:{server.port}/", timeout=5)
            ).body == b"ok"
            for host, port, limit in (
                ("b.test", server.port, 5),
                ("a.test", plain.port, 0.1),
                ("a.test", silent.port, 0.1),
            ):
                with pytest.raises(NotConnected):
                    await egress.request("POST", f"https://{host}:{port}/", timeout=limit)
        async with Egress(Rules("upstream", networks=LOOPBACK), resolve=resolve) as egress:
            with pytest.raises(NotConnected, match="certificate"):
                await egress.request("POST", f"https://a.test:{server.port}/", timeout=5)
        assert len(server.requests) == 1


async def test_a_full_pool_is_not_connected() -> None:
    """A call that got no connection before its time ran out was never sent."""

    async def answer(_: bytes, send: Write) -> bool:
        await send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        return bool(await asyncio.Event().wait())

    async with (
        serving(answer) as server,
        Egress(Rules("upstream", networks=LOOPBACK), connections=1) as egress,
    ):
        async with egress.stream("GET", server.url, timeout=5, idle=5):
            with pytest.raises(NotConnected, match="in time"):
                await egress.request("POST", server.url, timeout=0.05)
        assert len(server.requests) == 1


async def test_an_answer_that_came_while_the_process_was_paused_is_read() -> None:
    """The limit is over when the process goes on, but the answer is there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                time.sleep(0.2)
                connection.sendall(OK)

        async with open_egress() as egress:
            answering = asyncio.create_task(asyncio.to_thread(answer))
            asyncio.get_running_loop().call_later(0.1, time.sleep, 2.5)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            response = await egress.request("POST", url, timeout=0.5)
            assert (response.status, response.body) == (200, b"ok")
            await answering


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nContent-Le"])
async def test_no_answer_in_time_is_a_timeout(begin: bytes) -> None:
    """Once the request may have left, exceeding the limit is CallTimedOut: before and in the head
    of the answer.
    """

    async def answer(_: bytes, send: Write) -> bool:
        await send(begin)
        return bool(await asyncio.Event().wait())

    async with serving(after_first(answer)) as server, open_egress() as egress:
        await egress.request("POST", server.url, timeout=5)
        with pytest.raises(CallTimedOut):
            await egress.request("POST", server.url, content=b"x", timeout=0.4)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
)
async def test_an_answer_that_breaks_in_its_body_keeps_its_beginning(
    begin: bytes, ends: bool
) -> None:
    """The status stands and the part of the body that came is there. `failure` says whether the
    connection ended or was silent for too long.
    """

    async def answer(_: bytes, send: Write) -> bool:
        await send(begin)
        return False if ends else bool(await asyncio.Event().wait())

    async with serving(after_first(answer)) as server, open_egress() as egress:
        await egress.request("POST", server.url, timeout=5)
        answers = await asyncio.gather(
            *(
                egress.request("POST", server.url, timeout=timeout, body_timeout=body_timeout)
                for timeout, body_timeout in ((1.5, None), (9, 1.5))
            )
        )
        for response in answers:
            assert (response.status, response.body) == (200, b"half")
            assert type(response.failure) is (ConnectionLost if ends else CallTimedOut)


@pytest.mark.parametrize("begin", [b"", b"nonsense\r\n\r\n", b"nonsense"])
async def test_a_connection_that_ends_without_an_answer_is_lost(begin: bytes) -> None:
    """The connection ends before or instead of an answer. The server may have acted on the
    request.
    """

    async def answer(_: bytes, send: Write) -> bool:
        await send(begin)
        return False

    async with serving(answer) as server, open_egress() as egress:
        with pytest.raises(ConnectionLost):
            await egress.request("POST", server.url, content=b"x", timeout=5)
        assert len(server.requests) == 1


async def test_a_kept_connection_that_is_closed_on_a_post_is_not_tried_again() -> None:
    """The server may have read the request before it closed, so the client does not send it
    twice.
    """

    async def leave(*_: object) -> bool:
        return False

    async with serving(after_first(leave)) as server, open_egress() as egress:
        await egress.request("POST", server.url, timeout=5)
        with pytest.raises(ConnectionLost):
            await egress.request("POST", server.url, timeout=5)
        assert (server.connections, len(server.requests)) == (1, 2)


async def read(got: Streamed) -> bytes:
    return b"".join([chunk async for chunk in got.chunks()])


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_a_stream_that_falls_silent_is_a_timeout(begin: bytes) -> None:
    """A stream ends after `idle` seconds without a byte, long before `timeout`, in the head and in
    the body.
    """

    async def answer(_: bytes, send: Write) -> bool:
        await send(begin)
        return bool(await asyncio.Event().wait())

    async with serving(after_first(answer)) as server, open_egress() as egress:
        await egress.request("GET", server.url, timeout=5)
        with pytest.raises(CallTimedOut):
            async with egress.stream("GET", server.url, timeout=60, idle=0.1) as got:
                await read(got)


async def test_a_stream_that_drips_is_cut_at_its_whole_time() -> None:
    """A slow trickle of bytes does not keep a stream alive beyond `timeout`."""

    async def answer(_: bytes, send: Write) -> bool:
        await send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await send(b".")
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.01)

    async with serving(after_first(answer)) as server, open_egress() as egress:
        await egress.request("GET", server.url, timeout=5)
        with pytest.raises(CallTimedOut):
            async with egress.stream("GET", server.url, timeout=0.2, idle=5) as got:
                await read(got)


async def test_a_stream_that_breaks_is_a_lost_connection() -> None:
    """The reader keeps the bytes it has read. The break raises an error and is not taken for the
    end of the body.
    """

    async def answer(_: bytes, send: Write) -> bool:
        await send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        return False

    async with (
        serving(answer) as server,
        open_egress() as egress,
        egress.stream("GET", server.url, timeout=5, idle=5) as got,
    ):
        chunks = got.chunks()
        assert await anext(chunks) == b"half"
        with pytest.raises(ConnectionLost):
            await anext(chunks)


async def test_an_error_of_the_reader_passes_unchanged() -> None:
    """The client translates only errors of the call, not errors that the reader of the stream
    raises.
    """
    async with serving() as server, open_egress() as egress:
        with pytest.raises(TimeoutError, match="mine"):
            async with egress.stream("GET", server.url, timeout=5, idle=5):
                raise TimeoutError("mine")


async def test_the_command_lines_client_sends_its_key_and_follows_nothing() -> None:
    """The command line's client calls the service it was given, with the key if there is one."""
    async with serving(redirect("http://127.0.0.1:1/")) as server:
        client, stranger = ServiceClient(server.url, "sk-1"), ServiceClient(server.url, None)
        assert (await asyncio.to_thread(client.call, "GET", "/v1/tasks")).status == 302
        await asyncio.to_thread(stranger.call, "GET", "/v1/tasks")
        assert b"Bearer sk-1" in server.requests[0]
        assert b"authorization" not in server.requests[1].lower()
