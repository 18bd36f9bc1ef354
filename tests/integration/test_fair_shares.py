"""What one owner waits for, reads or sends is no other owner's outage (docs/overload.md)."""

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event

from service.db import sqlite
from service.images.validator import ImageValidator
from service.tasks import owner_keys
from service.web import auth
from service.web.key_shares import Shares
from service.web.routes import task_routes
from tests.api import ASYNC, SUBMIT, got, order, submitted
from tests.inputs import photo
from tests.integration.test_shares import head, many, status
from tests.waiting import wait_until
from tests.world import World

POLL, SSE = "/v1/events?wait=60", "accept: text/event-stream"
BODY = json.dumps(order()).encode()
LENGTH = f"content-length: {len(BODY)}"


def store_of(here: World) -> Any:
    return here.context.resources.store


# --- made-up keys
# --------------------------------------------------------------------------------------------------


@pytest.fixture
async def looking(still: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """The store does not answer whether a made-up key is known. Hashes that were asked for."""
    asked, valid, release = list[str](), set[str](), asyncio.Event()
    look_up = store_of(still).look_up

    async def slow(query: Any, *args: Any, **kwargs: Any) -> Any:
        found = await look_up(query, *args, **kwargs)
        if query is owner_keys.key_row:
            asked.append(args[0])
            if found is None:
                await release.wait()
            else:
                valid.add(args[0])
        return found

    monkeypatch.setattr(store_of(still), "look_up", slow)
    yield asked
    release.set()


@asynccontextmanager
async def made_up(here: World, count: int, request: str, *lines: str) -> AsyncIterator[None]:
    """So many connections, each with a key that nobody has."""
    async with AsyncExitStack() as stack:
        for number in range(count):
            key = f"authorization: Bearer dk_made-up-{number}"
            text = "\r\n".join([f"{request} HTTP/1.1", "host: x", key, *lines, "", ""]).encode()
            await stack.enter_async_context(many(here.url, 1, text))
        yield


MADE_UP: dict[str, tuple[str, ...]] = {
    "tasks": ("GET /v1/tasks",),
    "poll": (f"GET {POLL}",),
    "stream": ("GET /v1/events", SSE),
    "body": (f"POST {SUBMIT}", LENGTH),
    "nothing": ("GET /v1/tasks/nothing",),
}


@pytest.mark.parametrize("kind", MADE_UP)
async def test_made_up_keys_take_no_places_of_valid_ones(
    still: World, looking: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from the same address as a key that the process knows, and as a new one."""
    monkeypatch.setattr(still.context.shedder.requests, "total", 40)
    monkeypatch.setattr(still.context.shedder.lookups, "total", 400)
    async with still.owner() as known, still.owner() as new:
        got(await known.get("/v1/tasks"))
        before = len(looking)
        async with made_up(still, 60, *MADE_UP[kind]):
            await wait_until(lambda: len(looking) >= before + 60)
            for client in (known, new):
                got(await client.get("/v1/tasks"))
                await submitted(client)


async def test_look_ups_of_one_address_have_a_limit(
    still: World, looking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what the others leave. A key from elsewhere is still looked up."""
    monkeypatch.setattr(still.context.shedder.lookups, "total", 40)
    async with still.owner() as client, made_up(still, 30, "GET /v1/tasks"):
        await wait_until(lambda: len(looking) >= 20)
        assert (await client.get("/v1/tasks")).status_code == 503
        request = head(client, "GET", "/v1/tasks")
        async with many(still.url, 1, request, source="127.0.0.2") as ((reader, _),):
            assert await status(reader) == 200


async def test_unknown_keys_push_no_valid_key_out_of_the_cache(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_KEYS", 5)
    monkeypatch.setattr(auth, "CACHE_S", 60.0)
    access, asked = still.context.access, list[str]()
    access._cache.clear()
    look_up = store_of(still).look_up

    async def counted(query: Any, *args: Any, **kwargs: Any) -> Any:
        if query is owner_keys.key_row:  # and no look that the process makes meanwhile
            asked.append(args[0])
        return await look_up(query, *args, **kwargs)

    async with still.owner() as client:
        got(await client.get("/v1/tasks"))
        monkeypatch.setattr(store_of(still), "look_up", counted)
        for number in range(20):
            key = {"authorization": f"Bearer dk_made-up-{number}"}
            assert (await client.get("/v1/tasks", headers=key)).status_code == 401
        assert len(set(asked)) == 20
        asked.clear()
        got(await client.get("/v1/tasks"))
        assert asked == []
        assert len(access._cache) <= 5


# --- requests that wait
# --------------------------------------------------------------------------------------------------

WAITS: dict[str, tuple[str, str, tuple[str, ...], bytes]] = {
    "poll": ("GET", POLL, (), b""),
    "stream": ("GET", "/v1/events", (SSE,), b""),
    "first outcome": ("POST", SUBMIT, (LENGTH,), BODY),
    "end": ("POST", SUBMIT, (LENGTH, "prefer: wait=60"), BODY),
    "end and poll": ("POST", SUBMIT, (LENGTH, "prefer: wait=60, respond-async"), BODY),
}


def taken(shares: Shares, count: int) -> bool:
    return shares.taken == count


@pytest.mark.parametrize("kind", WAITS)
async def test_many_owners_that_wait_shut_nobody_out(
    still: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five owners wait as often as they may. A newcomer reads, submits, and waits too."""
    shedder = still.context.shedder
    monkeypatch.setattr(task_routes, "FIRST_OUTCOME_S", 60.0)
    for name in ("polls", "streams", "submissions"):
        monkeypatch.setattr(getattr(shedder, name), "total", 64)
    shares = {"poll": shedder.polls, "stream": shedder.streams}.get(kind, shedder.submissions)
    method, path, lines, body = WAITS[kind]
    async with AsyncExitStack() as stack:
        for left in (32, 16, 8, 4, 2):  # that the owner leaves to others
            owner = await stack.enter_async_context(still.owner())
            request = head(owner, method, path, *lines) + body
            await stack.enter_async_context(many(still.url, left, request))
            await wait_until(partial(taken, shares, 64 - left))
            await stack.enter_async_context(many(still.url, 10, request))
        newcomer = await stack.enter_async_context(still.owner())
        for _ in range(5):
            got(await newcomer.get("/v1/tasks"))
            await submitted(newcomer)
        request = head(newcomer, method, path, *lines) + body
        await stack.enter_async_context(many(still.url, 1, request))
        await wait_until(lambda: shares.taken == 63)
    await wait_until(lambda: (shares.taken, dict(shares.held)) == (0, {}))


@pytest.mark.parametrize("keys", [1, 2, 7])
async def test_an_owner_has_one_share_however_many_keys_it_has(keys: int) -> None:
    shares = Shares("places", 60, 100)
    while shares.left("owner", key := f"key {shares.taken % keys}"):
        shares.take("owner", key)
    assert shares.taken == 30
    assert shares.left("another", "key")


async def test_an_upload_that_waits_for_a_decoder_holds_no_body(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is on disk. So uploads of one owner leave the bytes to others' requests."""
    bodies, waiting, release = still.context.shedder.bodies, list[object](), asyncio.Event()
    validate = ImageValidator.validate

    async def slow(self: ImageValidator, *args: Any, **kwargs: Any) -> Any:
        waiting.append(self)
        await release.wait()
        return await validate(self, *args, **kwargs)

    monkeypatch.setattr(ImageValidator, "validate", slow)
    encoded = base64.b64encode(photo()).decode()
    async with still.owner() as client:
        uploads = [
            asyncio.create_task(
                client.post("/api/v1/files/upload/base64", json={"base64_data": text})
            )
            for text in (encoded, f"data:image/png;base64,{encoded}", f" {encoded}\n")
        ]
        await wait_until(lambda: len(waiting) == len(uploads))
        assert (bodies.size, len(bodies)) == (0, 0)
        release.set()
        for upload in uploads:
            assert got(await upload)["success"]


# --- reads
# --------------------------------------------------------------------------------------------------

LISTS = ["/v1/tasks?limit=1000", "/v1/events?limit=1000", "/v1/deliveries", "/v1/files", "mixed"]


@pytest.fixture
async def blocking(still: World) -> AsyncIterator[Callable[[str], threading.Event]]:
    """Makes every read of an owner's rows wait, in the thread of its reader."""
    release, blocked = threading.Event(), set[str]()
    engine = store_of(still)._reading

    def wait(*context: Any) -> None:
        if blocked & set(map(str, context[3])):
            release.wait(30)

    def block(owner: str) -> threading.Event:
        blocked.add(owner)
        return release

    event.listen(engine, "before_cursor_execute", wait)
    yield block
    release.set()
    event.remove(engine, "before_cursor_execute", wait)


@pytest.mark.parametrize("path", LISTS)
async def test_reads_of_one_owner_leave_a_reader_to_others(
    still: World, path: str, blocking: Callable[[str], threading.Event]
) -> None:
    """However many lists it asks for at once, another owner's lists are read beside them."""
    name = f"greedy-{LISTS.index(path)}"
    async with still.owner(name=name) as greedy, still.owner() as other:
        paths = LISTS[:-1] if path == "mixed" else [path]
        await submitted(greedy)
        release = blocking(name)
        asked = [asyncio.create_task(greedy.get(paths[n % len(paths)])) for n in range(20)]
        slots = store_of(still)._read_slots
        await wait_until(lambda: slots._used[name] == sqlite.READERS - 1)
        async with asyncio.timeout(20):
            for each in LISTS[:-1]:
                got(await other.get(each))
            got(await other.post(SUBMIT, json=order(), headers=ASYNC))
        assert not any(task.done() for task in asked)
        release.set()
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}


async def test_every_limit_is_shared(still: World) -> None:
    """No owner takes all of what lasts: half of an empty process is the most."""
    shares = [each for each in vars(still.context.shedder).values() if isinstance(each, Shares)]
    assert len(shares) == 7
    for each in shares:
        fresh = Shares(each.what, each.total)
        while fresh.left("owner"):
            fresh.take("owner")
        assert fresh.taken <= (each.total + 1) // 2
