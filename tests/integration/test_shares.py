"""One key or one address never takes everything of a process: bodies that do not arrive, polls,
streams, requests and connections (docs/overload.md).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from service.errors import ApiError
from service.events import feed
from service.fair_slots import HOLDER
from service.ops.metrics import Metrics
from service.web import key_shares, overload, server, server_protocol
from service.web.key_shares import BodyShares, Shares, address_of
from service.web.overload import LoadShedder, PriorityGate
from service.web.routes import task_routes
from service.web.server import Server, bind, listening
from tests.api import ASYNC, SUBMIT, got, order, refused, submitted
from tests.callbacks import connected
from tests.waiting import wait_until
from tests.world import World, world

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def head(client: httpx.AsyncClient, method: str, path: str, *lines: str) -> bytes:
    key = client.headers["authorization"]
    text = [f"{method} {path} HTTP/1.1", "host: x", f"authorization: {key}", *lines, "", ""]
    return "\r\n".join(text).encode()


async def status(reader: asyncio.StreamReader) -> int:
    async with asyncio.timeout(30):
        line = await reader.readline()
    return int(line.split()[1]) if line else 0


@asynccontextmanager
async def many(
    url: str, count: int, request: bytes, source: str = "127.0.0.1"
) -> AsyncIterator[list[Streams]]:
    """So many connections on which this request was sent."""
    host, port = url.removeprefix("http://").split(":")
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
            stack.callback(writer.close)
            writer.write(request)
            made.append((reader, writer))
        yield made


# --- bodies that do not arrive
# --------------------------------------------------------------------------------------------------

LENGTH, CHUNKED = ("content-length: 9000",), ("transfer-encoding: chunked",)
SLOW = pytest.mark.parametrize(
    ("method", "path", "lines", "begin"),
    [
        ("POST", SUBMIT, LENGTH, b""),
        ("POST", SUBMIT, LENGTH, b'{"model"'),
        ("POST", SUBMIT, CHUNKED, b"3\r\n{  \r\n"),
        ("POST", SUBMIT, (*LENGTH, "prefer: respond-async"), b"{"),
        ("POST", "/v1/endpoints", LENGTH, b"{"),
        ("POST", "/v1/keys/rotate-secret", LENGTH, b"{"),
    ],
    ids=["nothing", "length", "chunked", "async", "endpoint", "secret"],
)


def open_bodies(here: World, count: int) -> bool:
    return len(here.context.shedder.bodies) == count


@SLOW
async def test_slow_bodies_of_one_key_leave_room_for_all_others(
    still: World,
    method: str,
    path: str,
    lines: Sequence[str],
    begin: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A key has 200 bodies that are not complete. More get 429 while none of them is slow. Requests
    of other keys are answered.
    """
    monkeypatch.setattr(key_shares, "SLOW_S", 60.0)
    async with still.owner() as attacker, still.owner() as other, AsyncExitStack() as stack:
        request = head(attacker, method, path, *lines) + begin
        count = key_shares.BODIES_OF_KEY + 70
        made = await stack.enter_async_context(many(still.url, count, request))
        await wait_until(lambda: len(still.context.shedder.bodies) == key_shares.BODIES_OF_KEY)
        answers = [asyncio.create_task(status(reader)) for reader, _ in made]
        await wait_until(lambda: sum(each.done() for each in answers) == 70)
        assert {each.result() for each in answers if each.done()} == {429}
        for _ in range(10):
            await submitted(other)
            got(await other.get("/v1/tasks"))
        assert still.context.shedder.active <= 1
        for each in answers:
            each.cancel()
    await wait_until(lambda: not len(still.context.shedder.bodies))


async def test_the_slowest_body_is_ended_for_a_new_one(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest gets 408. The new one is read, and the others go on."""
    monkeypatch.setattr(key_shares, "SLOW_S", 0.0)
    monkeypatch.setattr(key_shares, "BODIES_OF_KEY", 3)
    body = json.dumps(order()).encode()
    async with still.owner() as client, AsyncExitStack() as stack:
        lines = (f"content-length: {len(body)}", "prefer: respond-async")
        request = head(client, "POST", SUBMIT, *lines) + body[:9]
        made: list[Streams] = []
        for number in range(1, 6):
            made += await stack.enter_async_context(many(still.url, 1, request))
            await wait_until(partial(open_bodies, still, min(number, 3)))
        assert [await status(reader) for reader, _ in made[:2]] == [408, 408]
        for reader, writer in made[2:]:
            writer.write(body[9:])
            assert await status(reader) == 200


@pytest.mark.parametrize(("limit", "code"), [("BODIES_OF_ADDRESS", 429), ("BODIES", 503)])
async def test_an_address_and_the_process_have_a_limit_of_bodies_too(
    still: World, limit: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit, a key with few of them still gets its body read: the oldest one of the key that
    has the most ends. That key itself gets 429, or 503 from the process.
    """
    monkeypatch.setattr(key_shares, limit, 4)
    monkeypatch.setattr(key_shares, "SLOW_S", 60.0)
    bodies = still.context.shedder.bodies
    async with still.owner() as greedy, still.owner() as other, AsyncExitStack() as stack:
        requests = [head(client, "POST", SUBMIT, *LENGTH) + b"{" for client in (greedy, other)]
        made = await stack.enter_async_context(many(still.url, 4, requests[0]))
        await wait_until(lambda: len(bodies) == 4)
        ((reader, _),) = await stack.enter_async_context(many(still.url, 1, requests[0]))
        assert await status(reader) == code
        await stack.enter_async_context(many(still.url, 1, requests[1]))
        await wait_until(lambda: len({body.key for body in bodies._open}) == 2)
        await submitted(other)
        await wait_until(lambda: len(bodies) == 3)
        answers = [asyncio.create_task(status(reader)) for reader, _ in made]
        await wait_until(lambda: sum(each.done() for each in answers) == 2)
        assert [each.result() for each in answers if each.done()] == [408] * 2
        for each in answers:
            each.cancel()


MANY = "content-length: 300000"  # bytes of a body of which a part arrives


async def part_of_body(
    stack: AsyncExitStack, here: World, part: bytes, number: int
) -> asyncio.StreamReader:
    """Sends 100,000 bytes as body number `number`. The bodies are in order, because each waits for
    the one before: keys are looked up side by side.
    """
    ((reader, _),) = await stack.enter_async_context(many(here.url, 1, part))
    await wait_until(lambda: here.context.shedder.bodies.size == number * 100_000)
    return reader


async def test_the_bytes_of_a_keys_bodies_have_a_limit(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest body gets 408 for the bytes of a new one, if it is slow. Otherwise the new one
    gets 429. Nothing counts any more once the requests are over.
    """
    monkeypatch.setattr(key_shares, "BYTES", 420_000)
    monkeypatch.setattr(key_shares, "SLOW_S", 60.0)
    bodies = still.context.shedder.bodies
    async with still.owner() as client, AsyncExitStack() as stack:
        part = head(client, "POST", SUBMIT, MANY) + b"{" + b" " * 99_999
        made = [await part_of_body(stack, still, part, number) for number in (1, 2)]
        ((refused_one, _),) = await stack.enter_async_context(many(still.url, 1, part))
        assert await status(refused_one) == 429
        monkeypatch.setattr(key_shares, "SLOW_S", 0.0)
        await stack.enter_async_context(many(still.url, 1, part))
        assert await status(made[0]) == 408
        await wait_until(lambda: bodies.size == 200_000)
    await wait_until(lambda: bodies.size == len(bodies) == 0)


@pytest.mark.parametrize(("limit", "most"), [("BYTES_OF_ADDRESS", 250_000), ("BYTES", 420_000)])
async def test_the_key_with_the_most_bytes_makes_room_for_another(
    still: World, limit: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_shares, limit, most)
    bodies = still.context.shedder.bodies
    async with still.owner() as greedy, still.owner() as other, AsyncExitStack() as stack:
        part = head(greedy, "POST", SUBMIT, MANY) + b"{" + b" " * 99_999
        made = [await part_of_body(stack, still, part, number) for number in (1, 2)]
        await submitted(other, note="x" * 140_000)
        assert await status(made[0]) == 408
    await wait_until(lambda: bodies.size == 0)


async def test_a_request_that_waits_for_its_task_holds_no_body(still: World) -> None:
    body = json.dumps(order(note="x" * 200_000)).encode()
    waiting, bodies = still.context.shedder, still.context.shedder.bodies
    async with still.owner() as client:
        lines = (f"content-length: {len(body)}", "prefer: wait=60")
        async with many(still.url, 3, head(client, "POST", SUBMIT, *lines) + body):
            await wait_until(lambda: waiting.waiting == 3)
            assert (bodies.size, len(bodies)) == (0, 0)
        await wait_until(lambda: waiting.waiting == 0)


async def test_a_complete_body_counts_until_its_request_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It makes no room for another, so that one is refused."""
    monkeypatch.setattr(key_shares, "BYTES", 120)
    bodies = BodyShares()
    timer = asyncio.timeout(60)
    with bodies.request() as first:
        with bodies.arriving(first, "one", "a", timer):
            bodies.grow(first, 60)
        with bodies.request() as second, bodies.arriving(second, "two", "b", timer):
            bodies.grow(second, 30)
            with pytest.raises(ApiError) as caught:
                bodies.grow(second, 1)
            assert caught.value.status == 429
        assert bodies.size == 60
    assert bodies.size == 0


# --- requests at work
# --------------------------------------------------------------------------------------------------


def shedder() -> LoadShedder:
    return LoadShedder(PriorityGate(), Metrics())


def taken(made: LoadShedder, stack: ExitStack, holder: str, count: int) -> int:
    """How many of so many requests are admitted."""
    admitted = 0
    HOLDER.set(holder)
    for _ in range(count):
        with suppress(ApiError):
            stack.enter_context(made.request())
            admitted += 1
    return admitted


def test_a_holder_has_at_most_half_of_what_the_others_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a newcomer still gets a place."""
    monkeypatch.setattr(overload, "MAX_ACTIVE", 120)
    made = shedder()
    with ExitStack() as stack:
        assert taken(made, stack, "greedy", 100) == 60
        assert taken(made, stack, "second", 100) == 30
        assert taken(made, stack, "third", 100) == 15
        assert taken(made, stack, "greedy", 1) == 0
        assert taken(made, stack, "newcomer", 1) == 1
        for number in range(100):
            taken(made, stack, f"more {number}", 100)
        assert made.active == 120
    assert (made.active, dict(made.requests.held)) == (0, {})


def test_a_share_comes_back_with_its_end() -> None:
    places = Shares("places", 5, 2)
    with places.take("a", "key"), places.take("a", "key"):
        assert not places.left("a", "key")
        for key in ("key", "other"):  # the first limit is the key's, the second the owner's
            with places.take("a", "other") if key == "other" else nullcontext():
                with pytest.raises(ApiError) as caught:
                    places.take("a", key)
                assert (caught.value.status, caught.value.retry_after) == (429, 1)
        with places.take("b", "1"), places.take("c", "2"), places.take("d", "3"):
            with pytest.raises(ApiError) as caught:
                places.take("e", "4")
            assert caught.value.status == 503
    assert (places.taken, dict(places.held)) == (0, {})


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:0db8:0001:0002"),
        ("2001:db8:1:2::1", "2001:0db8:0001:0002"),
        ("::1", "0000:0000:0000:0000"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_a_network_of_ipv6_counts_as_one_address(host: str, address: str) -> None:
    assert address_of((host, 1)) == address
    assert address_of(None) == ""


# --- polls and streams
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def few(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world in which a key may have three polls and three streams."""
    async with world(tmp_path_factory.mktemp("few"), key_waits=3) as made:
        yield made


async def test_polls_of_one_key_are_limited(few: World) -> None:
    """More get 429 with `Retry-After`. Other keys and reads without `wait` are answered."""
    async with few.owner() as client, few.owner() as other:
        poll = head(client, "GET", "/v1/events?wait=30")
        async with many(few.url, 3, poll):
            await wait_until(lambda: few.context.shedder.polls.taken == 3)
            refused(await client.get("/v1/events?wait=1"), 429, "rate_limit_exceeded")
            got(await client.get("/v1/events"))
            got(await other.get("/v1/events?wait=0.01"))
            got(await client.get("/v1/tasks"))
        await wait_until(lambda: few.context.shedder.polls.taken == 0)
        got(await client.get("/v1/events?wait=0.01"))


async def test_streams_of_one_key_are_limited(few: World) -> None:
    async with few.owner() as client, few.owner() as other:
        stream = head(client, "GET", "/v1/events", "accept: text/event-stream")
        sse = {"accept": "text/event-stream"}
        async with many(few.url, 3, stream) as made:
            assert [await status(reader) for reader, _ in made] == [200] * 3
            refused(await client.get("/v1/events", headers=sse), 429, "rate_limit_exceeded")
            async with other.stream("GET", "/v1/events", headers=sse) as answer:
                assert answer.status_code == 200
            got(await client.get("/v1/events?wait=0.01"))
        await wait_until(lambda: few.context.shedder.streams.taken == 0)
        async with client.stream("GET", "/v1/events", headers=sse) as answer:
            assert answer.status_code == 200


POLLS: dict[str, tuple[str, str, tuple[str, ...], bytes]] = {
    "events": ("GET", "/v1/events?wait=60", (), b""),
    "submission": ("POST", SUBMIT, ("prefer: wait=100",), json.dumps(order()).encode()),
    "first outcome": ("POST", SUBMIT, (), json.dumps(order()).encode()),
}


@pytest.mark.parametrize("kind", [*POLLS])
async def test_a_disconnect_ends_a_poll(
    still: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service looks no more for a client that has gone. A task that was accepted stays."""
    monkeypatch.setattr(feed, "LOOK_S", 0.05)
    monkeypatch.setattr(task_routes, "FIRST_OUTCOME_S", 60.0)
    waiting = still.context.shedder
    method, path, lines, body = POLLS[kind]
    async with still.owner() as client:
        if method == "POST":
            lines = (*lines, f"content-length: {len(body)}")
        request = head(client, method, path, *lines) + body
        async with many(still.url, 5, request):
            await wait_until(lambda: waiting.waiting == 5)
        await wait_until(lambda: waiting.waiting == 0)
        reads, read = list[str](), still.context.resources.store.read

        async def counted(query: Any, *args: Any, **kwargs: Any) -> Any:
            reads.append(query.__name__)
            return await read(query, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(still.context.resources.store, "read", counted)
            await asyncio.sleep(0.3)
        assert "event_list" not in reads
        expected = 5 if method == "POST" else 0
        assert len(got(await client.get("/v1/tasks"))["data"]) == expected


async def test_a_submission_beyond_a_keys_waits_is_answered_at_once(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task is accepted, and the answer does not wait. So no `Preference-Applied` is sent."""
    monkeypatch.setattr(still.context.shedder.submissions, "each", 0)
    async with still.owner() as client:
        for headers in ({"prefer": "wait=60"}, {}):
            answer = await client.post(SUBMIT, json=order(), headers=headers)
            assert got(answer)["state"] == "queued"
            assert "preference-applied" not in answer.headers
        answer = await client.post(SUBMIT, json=order(), headers=ASYNC)
        assert answer.headers["preference-applied"] == "respond-async"


# --- connections
# --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(release: Callable[[], Awaitable[object]]) -> AsyncIterator[tuple[str, Server]]:
    """A server with a quick route `/` and a route `/slow` that waits."""

    async def slow(_: object) -> PlainTextResponse:
        await release()
        return PlainTextResponse("slow")

    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("ok")), Route("/slow", slow)])
    bound = bind("127.0.0.1", 0)
    made = Server(app, bound, 60)
    async with asyncio.timeout(90), listening(made, asyncio.Event()):
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", made


GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "begin",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nx: y\r\n", GET, b"\r\n"],
    ids=["silent", "line", "header", "idle", "blank"],
)
async def test_slow_connections_end_for_new_ones(
    begin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit, the slowest connections of the address that has the most end. One with a
    request in hand goes on, and so do those of another address.
    """
    monkeypatch.setattr(server, "max_connections", lambda: 20)
    monkeypatch.setattr(server, "RETRY_S", 0.02)
    monkeypatch.setattr(server, "ENDED_AT_ONCE", 2)
    monkeypatch.setattr(server, "END_AGAIN_S", 0.02)
    monkeypatch.setattr(server_protocol, "SLOW_S", 0.1)
    release = asyncio.Event()
    async with serving(release.wait) as (url, served), AsyncExitStack() as stack:
        enter = stack.enter_async_context
        slow = GET.replace(b"/ ", b"/slow ")
        ((busy, _),) = await enter(many(url, 1, slow))
        ((far, writer),) = await enter(many(url, 1, GET, source="127.0.0.2"))
        await wait_until(lambda: len(served.server_state.connections) == 2)
        await enter(many(url, 18, begin))
        await wait_until(lambda: len(served.server_state.connections) == 20)
        for _ in range(3):
            async with connected(url) as (reader, asking):
                asking.write(GET)
                assert await status(reader) == 200
        assert await status(far) == 200
        writer.write(GET)
        await far.readuntil(b"ok")
        assert await status(far) == 200
        release.set()
        assert await status(busy) == 200
