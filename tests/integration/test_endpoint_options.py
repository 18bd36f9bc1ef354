"""Options of endpoints: order, filter, static headers, rate, and signatures of two kinds."""

import asyncio
import base64
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from service.cli import event_commands, program
from service.cli.api_client import CommandFailed
from service.cli.event_commands import listen
from service.db.tables import deliveries
from service.db.transaction import Emitted, Transaction
from service.events import delivery_order, replays
from service.events.endpoints import endpoint_row
from service.events.secrets import stored_secrets
from service.queue import worker
from service.signing import new_secret
from service.upkeep.rekey import rekey
from tests.api import got, refused
from tests.environment import clean_environment
from tests.upstream import After
from tests.waiting import wait_until
from tests.world import Received, Subscriber, World, answering, subscriber, world

JSON = dict[str, Any]
REFUSED, DONE = Response(status_code=500), Response(status_code=204)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(delivery_order, "LOOK_MS", 20)
        patch.setattr(replays, "EVERY_MS", 20)
        yield


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("options"), delivery_schedule="0.3,0.3") as made:
        yield made


@dataclass(frozen=True, slots=True)
class About:
    """An event of a task with metadata."""

    owner: str
    task: str
    metadata: JSON


def emit(tx: Transaction, items: Sequence[About]) -> list[str]:
    ids = []
    for item in items:
        ids.append(tx.id("event"))
        data = {"id": item.task, "metadata": item.metadata}
        tx.emitted.append(Emitted(ids[-1], item.owner, "image.task.failed", item.task, data))
    return ids


class Shop:
    """An owner with a subscriber."""

    def __init__(
        self, here: World, client: httpx.AsyncClient, name: str, server: Subscriber
    ) -> None:
        self.here, self.client, self.name, self.server = here, client, name, server

    async def endpoint(self, **options: Any) -> JSON:
        body = {"url": f"{self.server.url}/", **options}
        return got(await self.client.post("/v1/endpoints", json=body), 201)

    async def emit(self, task: str, **metadata: str) -> str:
        store = self.here.context.resources.store
        return await store.write(emit, About(self.name, task, metadata))

    async def arrived(self, count: int) -> list[str]:
        """The ids of the events of all requests, as soon as there are so many."""
        await wait_until(lambda: len(self.server.received) >= count)
        return [each.headers["webhook-id"] for each in self.server.received]

    async def settled(self) -> list[JSON]:
        """All deliveries, as soon as none is pending."""

        async def look() -> list[JSON] | None:
            found = got(await self.client.get("/v1/deliveries"))["data"]
            return None if any(each["state"] == "pending" for each in found) else found

        found: list[JSON] = await wait_until(look)
        return found


@pytest.fixture
async def shop(here: World, request: pytest.FixtureRequest) -> AsyncIterator[Shop]:
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())[-60:].strip("-")
    async with subscriber() as server, here.owner(name=name) as client:
        yield Shop(here, client, name, server)


KEYS: dict[str, tuple[Any, ...]] = {
    "task": ({"ordered": True}, "task_a", {}, "task_b", {}),
    "metadata": (
        {"ordered": True, "ordered_by": "user"},
        *("task_c", {"user": "1"}, "task_d", {"user": "2"}),
    ),
    "task without that key": ({"ordered": True, "ordered_by": "no"}, "task_e", {}, "task_f", {}),
}


@pytest.mark.parametrize("kind", KEYS)
async def test_a_failure_holds_back_only_its_own_key(shop: Shop, kind: str) -> None:
    """The first event of a key fails once. What follows of that key comes after its retry, in the
    order of the events. Another key does not wait.
    """
    options, one, about_one, other, about_other = KEYS[kind]
    await shop.endpoint(**options)
    go = asyncio.Event()

    def answer(number: int, _request: Received) -> Response:
        return DONE if number else After(go.wait, REFUSED)

    shop.server.answer = answer
    first = await shop.emit(one, **about_one)
    await shop.arrived(1)
    more = [await shop.emit(one, **about_one) for _ in range(3)]
    free = await shop.emit(other, **about_other)
    assert await shop.arrived(2) == [first, free]
    go.set()
    assert await shop.arrived(6) == [first, free, first, *more]


class Slow:
    """A server that takes its time, and notes how many requests it has at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.ids: list[str] = []
        self.times: list[float] = []
        self.began = time.monotonic()

    async def take(self, request: Request) -> Response:
        await request.body()
        self.now += 1
        self.most = max(self.most, self.now)
        self.times.append(time.monotonic())
        self.ids.append(request.headers["webhook-id"])
        await asyncio.sleep(0.005)
        self.now -= 1
        return Response(status_code=204)

    def kept_apart(self, seconds: float) -> None:
        """At its arrival a request has had as many intervals as there were requests before it."""
        early = [n for n, at in enumerate(self.times) if at - self.began < n * seconds - 0.005]
        assert not early, self.times


async def bursts(shop: Shop, **options: Any) -> Slow:
    """What a server sees of a burst of events of one user, and then of a replay of all of them."""
    slow = Slow()
    app = Starlette(routes=[Route("/", slow.take, methods=["POST"])])
    async with answering(app) as url:
        made = await shop.endpoint(url=f"{url}/", ordered_by="user", **options)
        await asyncio.gather(*(shop.emit(f"task_{n}", user="1") for n in range(8)))
        await wait_until(lambda: len(slow.ids) == 8)
        replay = f"/v1/endpoints/{made['id']}/replay"
        got(await shop.client.post(replay, json={"only": "all"}))
        await wait_until(lambda: len(slow.ids) == 16)
        await shop.settled()  # the server has answered all of them
    return slow


async def in_order(shop: Shop, slow: Slow) -> bool:
    order = [each["id"] for each in got(await shop.client.get("/v1/events"))["data"]]
    assert sorted(slow.ids) == sorted(order * 2)
    return slow.ids == order * 2 and slow.most == 1


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_key_has_one_delivery_at_a_time(shop: Shop, ordered: bool) -> None:
    """Also while a burst arrives, and a replay of all of it, and in the order of the events."""
    assert await in_order(shop, await bursts(shop, ordered=ordered)) is ordered


async def test_postgres_keeps_the_order_and_the_rate_too(tmp_path: Path, postgres_url: str) -> None:
    settings: dict[str, Any] = {"database_url": postgres_url, "secret_key": "k" * 32}
    async with (
        world(tmp_path, **settings) as here,
        subscriber() as server,
        here.owner(name="ann") as client,
    ):
        shop = Shop(here, client, "ann", server)
        slow = await bursts(shop, ordered=True, rate_per_s=50, metadata={"user": "1"})
        assert await in_order(shop, slow)
        slow.kept_apart(0.02)


async def test_what_waits_behind_a_cancelled_replay_goes_on(shop: Shop) -> None:
    made = await shop.endpoint(ordered=True)
    await shop.emit("task_a")
    await shop.arrived(1)
    shop.server.answer = lambda *_: Response(status_code=503, headers={"retry-after": "0"})
    replay = got(await shop.client.post(f"/v1/endpoints/{made['id']}/replay", json={"only": "all"}))
    await shop.arrived(2)
    last = await shop.emit("task_a")
    assert (await shop.client.delete(f"/v1/replays/{replay['id']}")).status_code == 204
    shop.server.answer = lambda *_: DONE
    await shop.settled()
    assert (await shop.arrived(3))[-1] == last


async def test_a_long_line_looks_seldom_and_is_released_in_order(shop: Shop) -> None:
    """The further back a delivery waits, the later it looks by itself."""
    go, taken = asyncio.Event(), list[str]()

    async def take(request: Request) -> Response:
        taken.append(request.headers["webhook-id"])
        await go.wait()
        return DONE

    async def waits() -> list[int]:
        query = select(columns.due_at).where(columns.endpoint_id == made["id"])
        due = query.where(columns.state == "pending", columns.attempts == 0)
        rows = await store.read(lambda c: c.execute(due.order_by(columns.sequence)).scalars().all())
        return [round((at - store.clock()) / delivery_order.LATE_MS) for at in rows]

    store, columns = shop.here.context.resources.store, deliveries.c
    async with answering(Starlette(routes=[Route("/", take, methods=["POST"])])) as url:
        made = await shop.endpoint(url=f"{url}/", ordered=True)
        ids = [await shop.emit("task_a")]
        await wait_until(lambda: taken == ids)
        ids += [await shop.emit("task_a") for _ in range(4)]

        async def in_line() -> bool:
            return await waits() == [1, 2, 3, 4]

        await wait_until(in_line)
        go.set()
        await wait_until(lambda: taken == ids)
        await shop.settled()


@pytest.mark.parametrize("before", [{}, {"ordered": True, "ordered_by": "user"}])
async def test_a_bulk_replay_is_in_the_order_of_the_present_options(
    shop: Shop, before: JSON
) -> None:
    """Two dead events of one task, sent again after the endpoint became ordered by task."""
    made = await shop.endpoint(**before)
    shop.server.answer = lambda *_: REFUSED
    ids = [await shop.emit("task_a", user=str(n)) for n in range(2)]
    await shop.arrived(6)
    assert {each["state"] for each in await shop.settled()} == {"dead"}
    path = f"/v1/endpoints/{made['id']}"
    got(await shop.client.patch(path, json={"ordered": True, "ordered_by": None}))
    shop.server.answer = lambda number, _: DONE if number > 6 else REFUSED
    selected = {"filter": {"endpoint": made["id"], "state": "dead"}}
    assert got(await shop.client.post("/v1/replays", json=selected))["count"] == 2
    assert (await shop.arrived(9))[6:] == [ids[0], ids[0], ids[1]]


async def test_a_dead_delivery_releases_its_key(shop: Shop) -> None:
    await shop.endpoint(ordered=True)
    shop.server.answer = lambda number, _: DONE if number >= 3 else REFUSED
    first, second = await shop.emit("task_a"), await shop.emit("task_a")
    assert await shop.arrived(4) == [first, first, first, second]
    assert {each["state"] for each in await shop.settled()} == {"dead", "delivered"}


async def test_a_retry_by_hand_releases_its_key(tmp_path: Path) -> None:
    async with (
        world(tmp_path, delivery_schedule="600") as here,
        subscriber() as server,
        here.owner(name="ann") as client,
    ):
        shop = Shop(here, client, "ann", server)
        await shop.endpoint(ordered=True)
        server.answer = lambda number, _: DONE if number else REFUSED
        first = await shop.emit("task_a")
        await shop.arrived(1)
        second = await shop.emit("task_a")
        one = got(await client.get("/v1/deliveries", params={"event": first}))["data"][0]
        got(await client.post(f"/v1/deliveries/{one['id']}/retry"))
        assert await shop.arrived(3) == [first, first, second]


async def test_a_filter_by_metadata_holds_for_events_and_replays(shop: Shop) -> None:
    made = await shop.endpoint(metadata={"shop": "é.1", "kind": "a b"})
    wanted = await shop.emit("task_a", shop="é.1", kind="a b", more="x")
    for other in ({"shop": "é.1"}, {"shop": "2", "kind": "a b"}, {}):
        await shop.emit("task_b", **other)
    await shop.settled()
    replay = f"/v1/endpoints/{made['id']}/replay"
    counted = got(await shop.client.post(replay, json={"only": "all", "dry_run": True}))
    assert counted["count"] == 1
    got(await shop.client.post(replay, json={"only": "all"}))
    assert await shop.arrived(2) == [wanted, wanted]
    got(await shop.client.patch(f"/v1/endpoints/{made['id']}", json={"metadata": {}}))
    free = await shop.emit("task_c")
    assert (await shop.arrived(3))[2] == free


async def test_static_headers_are_sent_and_kept_secret(here: World, shop: Shop) -> None:
    """The store holds them encrypted, and a new first key encrypts them again."""
    headers = {"Authorization": "Bearer s3cret-of-a-shop", "X-Env": "prod"}
    made = await shop.endpoint(headers=headers)
    assert made["headers"] == headers
    await shop.emit("task_a")
    got(await shop.client.post(f"/v1/endpoints/{made['id']}/test", json={}))
    await shop.arrived(2)
    for request in shop.server.received:
        assert {name: request.headers[name.lower()] for name in headers} == headers
        assert request.signed_by(made["secret"])
    store = here.context.resources.store
    row = await store.read(endpoint_row, made["id"], None)
    assert row is not None
    assert b"s3cret" not in row["headers"]
    assert await store.read(stored_secrets, "headers", "", 10)
    assert await rekey(here.context.resources) == 0
    got(await shop.client.patch(f"/v1/endpoints/{made['id']}", json={"headers": {}}))
    assert got(await shop.client.get(f"/v1/endpoints/{made['id']}"))["headers"] == {}


WRONG: dict[str, tuple[str, Any, tuple[str, str]]] = {
    "a reserved name": ("headers", {"Webhook-Id": "x"}, ("headers", "Webhook-Id")),
    "the host": ("headers", {"HOST": "x"}, ("headers", "HOST")),
    "one name twice": (
        "headers",
        {"X-Shop": "1", "x-shop": "2"},
        ("headers", "X-Shop' is there twice"),
    ),
    "the length": ("headers", {"content-length": "1"}, ("headers", "content-length")),
    "a proxy's name": ("headers", {"X-Forwarded-For": "1"}, ("headers", "X-Forwarded-For")),
    "a trace": ("headers", {"traceparent": "1"}, ("headers", "traceparent")),
    "no name": ("headers", {"a b": "x"}, ("headers", "a b")),
    "a line end": ("headers", {"x-a": "1\r\nx-b: 2"}, ("headers", r"not '\r'")),
    "a space at the end": ("headers", {"x-a": "1 "}, ("headers", "not ' '")),
    "a long value": ("headers", {"x-a": "1" * 1001}, ("headers", "not 1001")),
    "no object": ("headers", "a: s3cret", ("headers", "object")),
    "one of two": ("headers", {"a": "Bearer s3cret", "host": "x"}, ("headers", "host")),
    "too many": ("headers", {f"x-{n}": "1" for n in range(11)}, ("headers", "10")),
    "no rate": ("rate_per_s", 0, ("rate_per_s", "0.01")),
    "a high rate": ("rate_per_s", 5000, ("rate_per_s", "1000")),
    "no text": ("metadata", {"a": 1}, ("metadata.a", "metadata")),
    "too many pairs": ("metadata", {str(n): "1" for n in range(17)}, ("metadata", "16")),
    "no key": ("ordered_by", "", ("ordered_by", "ordered_by")),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_option_is_refused_by_name(here: World, wrong: str) -> None:
    name, value, said = WRONG[wrong]
    body = {"url": "http://127.0.0.1:9/", name: value}
    error = refused(await here.client.post("/v1/endpoints", json=body), 400, param=said[0])
    assert said[1] in error["message"]
    assert "s3cret" not in error["message"]


async def test_a_rate_spaces_requests(shop: Shop) -> None:
    """10 a second: no request comes before its turn, however slow the machine is. None is lost."""
    slow = Slow()
    async with answering(Starlette(routes=[Route("/", slow.take, methods=["POST"])])) as url:
        await shop.endpoint(url=f"{url}/", rate_per_s=10)
        await asyncio.gather(*(shop.emit(f"task_{n}") for n in range(8)))
        await wait_until(lambda: len(slow.ids) == 8)
        await shop.settled()
    assert len(set(slow.ids)) == 8
    slow.kept_apart(0.1)


async def test_a_new_rate_acts_on_deliveries_that_wait(shop: Shop) -> None:
    """At one request in 100 s the third delivery would wait for more than three minutes."""
    made = await shop.endpoint(rate_per_s=0.01)
    for number in range(3):
        await shop.emit(f"task_{number}")
    await shop.arrived(1)

    async def wait_long() -> bool:
        found = got(await shop.client.get("/v1/deliveries", params={"state": "pending"}))["data"]
        due = [datetime.fromisoformat(each["next_attempt_at"]) for each in found]
        soon = datetime.now(UTC) + timedelta(seconds=50)
        return len([at for at in due if at > soon]) == 2

    await wait_until(wait_long)
    got(await shop.client.patch(f"/v1/endpoints/{made['id']}", json={"rate_per_s": None}))
    await shop.arrived(3)


async def test_a_success_after_failures_is_told_once_a_minute(here: World, shop: Shop) -> None:
    made = await shop.endpoint()
    shop.server.answer = lambda number, _: DONE if number % 2 else REFUSED
    for _ in range(2):
        await shop.emit("task_a")
        await shop.settled()
    told = [each["data"] for each in await here.events(type="endpoint.recovered")]
    (mine,) = [each for each in told if each["endpoint_id"] == made["id"]]
    assert mine["failing_since"] < mine["recovered_at"]
    assert 0 < mine["seconds"] < 60


async def test_a_public_key_of_the_endpoint_verifies_its_webhooks(shop: Shop) -> None:
    """A webhook to one endpoint is not valid for another, or a receiver could pass it on."""
    made = await shop.endpoint()
    await shop.emit("task_a")
    await shop.arrived(1)
    stranger, place = shop.here.stranger, "/.well-known/endpoints/{}/jwks.json"
    keys = got(await stranger.get(place.format(made["id"])))["keys"]
    assert keys[0]["x"] != got(await stranger.get(place.format("ep_other")))["keys"][0]["x"]
    (request,) = shop.server.received
    v1, v1a = request.headers["webhook-signature"].split(" ")
    assert v1.startswith("v1,")
    assert request.signed_by(made["secret"])
    assert v1a.startswith("v1a,")
    raw = base64.urlsafe_b64decode(keys[0]["x"] + "=")
    assert keys[0]["public_key"] == "whpk_" + base64.b64encode(raw).decode()
    key, signature = Ed25519PublicKey.from_public_bytes(raw), base64.b64decode(v1a[4:])
    names = ("webhook-id", "webhook-timestamp")
    content = b".".join([*(request.headers[name].encode() for name in names), request.body])
    key.verify(signature, content)
    with pytest.raises(InvalidSignature):
        key.verify(signature, content + b" ")


async def test_listen_forwards_new_events_to_a_program(shop: Shop, tmp_path: Path) -> None:
    """`darkroom listen` signs each event as a webhook, once, and prints the program's status."""
    secret = new_secret(b"s" * 32)
    await shop.emit("task_before")
    key = shop.client.headers["authorization"].removeprefix("Bearer ")
    command = [sys.executable, "-m", "service", "listen", f"{shop.server.url}/hooks"]
    process = await asyncio.create_subprocess_exec(
        *(*command, "--secret", secret, "--type", "image.task.*"),
        cwd=tmp_path,
        env=clean_environment({"DARKROOM_URL": shop.here.url, "DARKROOM_API_KEY": key}),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert (await process.stdout.readline()).decode().split()[-1] == secret
        shop.server.answer = lambda number, _: DONE if number else REFUSED
        ids = [await shop.emit("task_a"), await shop.emit("task_b")]
        lines = [(await process.stdout.readline()).decode().split() for _ in ids]
    finally:
        process.kill()
        await process.wait()
    assert [line[:3] for line in lines] == [
        [id, "image.task.failed", status] for id, status in zip(ids, ("500", "204"), strict=True)
    ]
    assert await shop.arrived(2) == ids
    assert all(each.signed_by(secret) and each.path == "/hooks" for each in shop.server.received)
    (event, *_) = [json.loads(each.body) for each in shop.server.received]
    assert (event["id"], event["subject"]) == (ids[0], "task_a")


def pages(*ids: str, after: str, resync: bool = False) -> Response:
    types = {"type": "image.task.failed", "sequence": after}
    data = [{"id": id, **types} for id in ids]
    return JSONResponse({"data": data, "next_after": after, "resync": resync})


async def test_listen_goes_on_after_its_place_while_the_service_comes_and_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks again from its place. It forwards no event twice, and says if some are gone."""
    busy = {"error": {"code": "overloaded", "message": "later"}}
    refusal = {"error": {"code": "unauthorized", "message": "this ends the test"}}
    script = iter(
        [
            JSONResponse(busy, 503),
            pages("evt_a", "evt_b", after="8", resync=True),
            pages(after="9"),
            Response("a gateway's page", 502),
            JSONResponse(busy, 429),
            pages("evt_c", after="10"),
            JSONResponse(refusal, 401),
        ]
    )
    asked: list[str | None] = []
    remarks: list[str] = []
    slept: list[float] = []

    async def events(request: Request) -> Response:
        asked.append(request.query_params.get("after"))
        return next(script)

    monkeypatch.setattr(event_commands, "remark", remarks.append)
    clock = SimpleNamespace(sleep=slept.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(event_commands, "time", clock)
    app = Starlette(routes=[Route("/v1/events", events)])
    async with answering(app) as service, subscriber() as receiver:
        monkeypatch.setenv("DARKROOM_URL", service)
        monkeypatch.setenv("DARKROOM_API_KEY", "k" * 20)
        options: JSON = {"after": "7", "secret": new_secret(b"s" * 32), "as_json": True}
        with pytest.raises(CommandFailed, match="this ends the test"):
            await asyncio.to_thread(listen, f"{receiver.url}/hooks", **options)
        sent = [each.headers["webhook-id"] for each in receiver.received]
    assert asked == ["7", "7", "8", "9", "9", "9", "10"]
    assert sent == ["evt_a", "evt_b", "evt_c"]
    assert remarks == ["events after 7 are no longer all kept"]
    assert slept == [1, 1, 2]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    started, *lines = [line for line in printed if "service" not in line]  # no log lines
    assert started["after"] == "7"
    assert [(line["id"], line["status"]) for line in lines] == [(id, 204) for id in sent]


@pytest.mark.parametrize("arguments", [["ftp://x"], ["nowhere"], ["http://x", "--secret", "y"]])
def test_listen_refuses_a_wrong_address_or_secret(arguments: list[str]) -> None:
    result = CliRunner().invoke(program, ["listen", *arguments])
    assert result.exit_code == 2, result.output
