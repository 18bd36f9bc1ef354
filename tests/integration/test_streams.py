"""Server-sent events: from a position, in sequence, until the reader leaves, the key is revoked or
the process stops.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.db.tables import counters, events
from service.db.transaction import Transaction
from service.errors import StoreUnavailable
from service.events import feed, tail
from service.events.feed import event_list
from service.events.tail import StreamFilter, Tail
from service.web.routes import event_routes
from tests.api import UNTIL_DONE, got, refused, submitted
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import World, world

pytestmark = pytest.mark.slow

SSE = {"accept": "text/event-stream"}
BOTH = ["image.task.submitted", "image.task.completed"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the stream. `id` and `event` are None if the message has none. A comment has its
    text in `data` and ":" in `event`.
    """

    id: str | None
    event: str | None
    data: str

    @property
    def document(self) -> Json:
        document: Json = json.loads(self.data)
        return document


async def messages(answer: httpx.Response) -> AsyncIterator[Message]:
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if line.startswith((":", "retry")):  # no blank line follows
            yield Message(None, ":" if not name else None, "" if name else value)
        elif line:
            fields[name] = value
        else:
            yield Message(fields.get("id"), fields.get("event"), fields.get("data", ""))
            fields = {}


@asynccontextmanager
async def following(
    client: httpx.AsyncClient, headers: Mapping[str, str] = SSE, **query: Any
) -> AsyncIterator[AsyncIterator[Message]]:
    """The messages of a stream after the initial `retry` field."""
    async with client.stream(
        "GET", "/v1/events", params=query, headers={**SSE, **headers}
    ) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        made = messages(answer)
        assert await anext(made) == Message(None, None, "")
        yield made


async def next_of(stream: AsyncIterator[Message], count: int) -> list[Message]:
    async with asyncio.timeout(20):
        return [await anext(stream) for _ in range(count)]


async def pulled(client: httpx.AsyncClient, **query: Any) -> list[Json]:
    found: list[Json] = got(await client.get("/v1/events", params={"limit": 1000, **query}))["data"]
    return found


def sent(events: list[Json]) -> list[tuple[str, str, Json]]:
    return [(event["sequence"], event["type"], event) for event in events]


def seen(stream: list[Message]) -> list[tuple[str | None, str | None, Json]]:
    return [(message.id, message.event, message.document) for message in stream]


async def test_a_stream_shows_what_happens_from_now_on(here: World) -> None:
    """`id` is the sequence, `event` the type, and `data` the event as a pull shows it. Earlier
    events do not appear.
    """
    async with here.owner() as client:
        await submitted(client, UNTIL_DONE)
        async with following(client) as stream:
            task = await submitted(client, UNTIL_DONE)
            found = await next_of(stream, 2)
        assert seen(found) == sent(await pulled(client, task=task["id"]))
        assert [message.event for message in found] == BOTH


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("TEXT/Event-Stream", "text/event-stream"),
        ("application/json;q=0.5 , text/event-stream;charset=utf-8; q=0.9", "text/event-stream"),
        ("application/json, text/event-stream;q=0", "application/json"),
        ("text/event-stream; q=0.000, */*", "application/json"),
        ("text/event-streams", "application/json"),
    ],
)
async def test_accept_is_read_as_http_defines_it(here: World, accept: str, kind: str) -> None:
    async with here.client.stream("GET", "/v1/events", headers={"accept": accept}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].partition(";")[0] == kind


async def test_a_stream_contains_all_events_after_its_headers(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader may submit a task as soon as it has the headers, before the body begins."""
    frames = event_routes.frames

    async def frames_after_an_event(*given: Any) -> AsyncIterator[str | bytes]:
        await emitted(here.context.resources.store)
        async for part in frames(*given):
            yield part

    monkeypatch.setattr(event_routes, "frames", frames_after_an_event)
    async with following(here.client) as stream:
        (found,) = await next_of(stream, 1)
    assert found.event == "image.task.failed"


async def test_a_stream_goes_on_where_a_reader_was(here: World) -> None:
    """A stream starts after `after`, or after `Last-Event-ID`, which a browser sends when it
    reconnects to the same address.
    """
    async with here.owner() as client:
        for _ in range(2):
            await submitted(client, UNTIL_DONE)
        whole = await pulled(client)
        async with following(client, after="0") as stream:
            assert seen(await next_of(stream, 4)) == sent(whole)
            await submitted(client, UNTIL_DONE)
            assert [message.event for message in await next_of(stream, 2)] == BOTH
        async with following(client, {"last-event-id": whole[2]["sequence"]}, after="0") as stream:
            assert seen(await next_of(stream, 1)) == sent(whole[3:])
        for bad in ("x", "9" * 21, str(2**63)):
            refused(
                await client.get("/v1/events", headers={**SSE, "last-event-id": bad}),
                400,
                "invalid_request",
                param="Last-Event-ID",
            )


async def test_a_stream_shows_what_was_asked_for(here: World) -> None:
    """A reader can filter by type and by task, and sees only the events of its owner. An admin sees
    all owners. The filters hold for stored and for new events.
    """
    async with here.owner() as client, here.owner() as other:
        first = await submitted(client, UNTIL_DONE)
        place = (await pulled(client))[-1]["sequence"]
        async with (
            following(client, after="0", type="image.task.completed") as completed,
            following(client, after="0", task=first["id"]) as one,
            following(client, after=place, type="image.task.*,task.parked") as mine,
            following(here.client, after=place) as everybody,
        ):
            await submitted(other, UNTIL_DONE)
            second = await submitted(client, UNTIL_DONE)
            assert [m.document["subject"] for m in await next_of(completed, 2)] == [
                first["id"],
                second["id"],
            ]
            assert [m.event for m in await next_of(one, 2)] == BOTH
            assert [m.document["subject"] for m in await next_of(mine, 2)] == [second["id"]] * 2
            assert len({m.document["subject"] for m in await next_of(everybody, 4)}) == 2


@pytest.mark.parametrize(("page", "kept", "size"), [(2, 3, 1 << 20), (100, 3, 1), (100, 2000, 1)])
async def test_a_reader_who_is_far_behind_catches_up(
    here: World, page: int, kept: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that is behind reads pages from the store and then follows the shared tail. It gets
    each event once, also the events that the tail could not keep in memory.
    """
    monkeypatch.setattr(tail, "PAGE", page)
    monkeypatch.setattr(tail, "KEPT", kept)
    monkeypatch.setattr(tail, "SENT_SIZE", size)
    async with here.owner() as client, following(client) as leading:
        for _ in range(4):
            await submitted(client, UNTIL_DONE)
        whole = await pulled(client)
        async with following(client, after="0") as stream:
            assert seen(await next_of(stream, 8)) == sent(whole) == seen(await next_of(leading, 8))
            task = await submitted(client, UNTIL_DONE)
            rest = sent(await pulled(client, task=task["id"]))
            assert seen(await next_of(stream, 2)) == rest == seen(await next_of(leading, 2))


async def test_what_is_kept_is_soon_read_again(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader gets nothing of a task that was erased meanwhile, and no link that has expired."""
    monkeypatch.setattr(tail, "KEPT_MS", 0)
    async with here.owner() as client, following(client) as stream:
        task = await submitted(client, UNTIL_DONE, metadata={"shop": "one"})
        *_, last = await next_of(stream, 2)
        assert last.document["data"]["metadata"] == {"shop": "one"}
        assert (await client.delete(f"/v1/tasks/{task['id']}")).status_code == 204

        async def erased() -> bool:
            async with following(client, after=0) as again:
                found = await next_of(again, 2)
            return not any(each.document["data"]["metadata"] for each in found)

        await wait_until(erased)


async def test_what_is_kept_is_limited_by_size_too(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tail drops large events from memory, and the reader still gets them."""
    monkeypatch.setattr(tail, "KEPT_SIZE", 1)
    async with here.owner() as client, following(client) as stream:
        task = await submitted(client, UNTIL_DONE)
        assert seen(await next_of(stream, 2)) == sent(await pulled(client, task=task["id"]))
        assert here.context.tail._entries == []


async def test_a_reader_whose_place_is_gone_is_told(tmp_path: Path) -> None:
    """The reader gets one `resync` without an id and with the oldest sequence, and then the events
    from there.
    """
    async with world(tmp_path) as here:
        for _ in range(2):
            await submitted(here.client, UNTIL_DONE)
        whole = await pulled(here.client)

        def forget(tx: Transaction, items: Sequence[int]) -> list[None]:
            tx.connection.execute(events.delete().where(events.c.sequence <= items[0]))
            tx.connection.execute(
                counters.update().where(counters.c.name == "forgotten").values(value=items[0])
            )
            return [None]

        await here.context.resources.store.write(forget, int(whole[1]["sequence"]))
        async with following(here.client, after=whole[0]["sequence"]) as stream:
            told, *rest = await next_of(stream, 3)
        assert (told.id, told.event, told.document) == (
            None,
            "resync",
            {"sequence": whole[2]["sequence"]},
        )
        assert seen(rest) == sent(whole[2:])
        await here.context.resources.store.write(forget, int(whole[3]["sequence"]))
        async with following(here.client, after=whole[0]["sequence"]) as stream:
            (told,) = await next_of(stream, 1)
        assert int(told.document["sequence"]) == int(whole[3]["sequence"]) + 1


async def test_a_reader_is_told_once_that_its_place_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention leaves gaps because it keeps events with pending deliveries. The reader gets one
    `resync` for all pages, with the oldest sequence that is left.
    """
    monkeypatch.setattr(tail, "PAGE", 2)
    async with world(tmp_path) as here:
        await emitted(here.context.resources.store, 12)
        whole = await pulled(here.client)

        def thin(tx: Transaction, items: Sequence[Sequence[int]]) -> list[None]:
            tx.connection.execute(events.delete().where(events.c.sequence.in_(items[0])))
            tx.connection.execute(
                counters.update().where(counters.c.name == "forgotten").values(value=max(items[0]))
            )
            return [None]

        await here.context.resources.store.write(thin, [2, 9])
        async with following(here.client, after=whole[0]["sequence"]) as stream:
            told, *rest = await next_of(stream, 1 + 9)
        assert (told.event, told.document) == ("resync", {"sequence": whole[0]["sequence"]})
        assert seen(rest) == sent([whole[place] for place in (2, 3, 4, 5, 6, 7, 9, 10, 11)])


async def test_a_comment_comes_when_nothing_else_does(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments keep proxies from closing a silent connection."""
    monkeypatch.setattr(event_routes, "CHECK_S", 0.02)
    monkeypatch.setattr(event_routes, "COMMENT_S", 0.1)
    async with here.owner() as client, following(client) as stream:
        assert {message.event for message in await next_of(stream, 3)} == {":"}


async def test_a_stream_ends_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revoked key ends the stream without another event. A new request gets 401."""
    monkeypatch.setattr(event_routes, "CHECK_S", 0.05)
    monkeypatch.setattr("service.web.auth.CACHE_S", 0.0)
    async with world(tmp_path) as here:
        made = got(await here.client.post("/v1/keys", json={"owner": "x", "scopes": ["read"]}), 201)
        async with here.with_key(made["key"]) as client, following(client) as stream:
            assert (await here.client.delete(f"/v1/keys/{made['id']}")).status_code == 204
            async with asyncio.timeout(20):
                assert [message async for message in stream] == []
            refused(await client.get("/v1/events", headers=SSE), 401, "unauthorized")


async def test_what_others_do_hides_neither_silence_nor_the_end_of_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While events of other owners arrive, the reader still gets comments, and the service still
    notices that its key was revoked.
    """
    monkeypatch.setattr(event_routes, "CHECK_S", 0.2)
    monkeypatch.setattr(event_routes, "COMMENT_S", 0.4)
    monkeypatch.setattr("service.web.auth.CACHE_S", 0.0)
    async with world(tmp_path) as here:

        async def others() -> None:
            while True:
                await emitted(here.context.resources.store, type="task.parked")

        made = got(await here.client.post("/v1/keys", json={"owner": "x", "scopes": ["read"]}), 201)
        noise = asyncio.create_task(others())
        async with here.with_key(made["key"]) as client, following(client) as stream:
            assert {message.event for message in await next_of(stream, 2)} == {":"}
            assert (await here.client.delete(f"/v1/keys/{made['id']}")).status_code == 204
            async with asyncio.timeout(20):
                assert {message.event async for message in stream} <= {":"}
        noise.cancel()


async def test_a_held_answer_shows_nothing_to_a_key_that_was_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service checks the key again before it answers a held request."""
    monkeypatch.setattr("service.web.auth.CACHE_S", 0.0)
    async with world(tmp_path) as here:
        made = got(
            await here.client.post("/v1/keys", json={"owner": "x", "scopes": ["read", "admin"]}),
            201,
        )
        async with here.with_key(made["key"]) as client:
            held = asyncio.create_task(client.get("/v1/events", params={"after": "0", "wait": 30}))
            await wait_until(lambda: here.context.shedder.waiting)
            assert (await here.client.delete(f"/v1/keys/{made['id']}")).status_code == 204
            await emitted(here.context.resources.store, type="task.parked")
            refused(await held, 401, "unauthorized")


async def test_a_stop_ends_streams(tmp_path: Path) -> None:
    """A stop ends open streams at once, and also a stream that opens during the stop."""
    async with world(tmp_path) as here, following(here.client) as stream:
        here.context.stopping.quiesce()
        async with asyncio.timeout(20):
            assert [message async for message in stream] == []
        async with following(here.client) as late:
            assert [message async for message in late] == []


async def test_streams_are_limited(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream over the limit gets 503 with `Retry-After`. A reader that leaves makes room. HEAD
    takes no place.
    """
    async with here.owner() as client:
        async with following(client):
            monkeypatch.setattr(here.context.shedder.streams, "total", 1)
            refused(await client.get("/v1/events", headers=SSE), 503, "overloaded")

        async def left() -> bool:
            return here.context.tail.streams == here.context.shedder.streams.taken == 0

        await wait_until(left)
        async with following(client):
            pass
        await wait_until(left)
        answer = await client.head("/v1/events", headers=SSE)
        assert (answer.status_code, answer.content) == (200, b"")


async def test_a_store_that_is_away_ends_those_who_need_it(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader at the head of the stream survives an unavailable store and an unexpected error,
    which is logged. A reader that must read from the store gets the error.
    """
    monkeypatch.setattr(tail, "LOOK_S", 0.05)
    monkeypatch.setattr(feed, "LOOK_S", 0.05)
    store, read, faults = (
        here.context.resources.store,
        here.context.resources.store.read,
        [StoreUnavailable("away"), ValueError("odd")],
    )

    async def failing(query: Any, *args: Any) -> Any:
        if faults and query is event_list and args[1] is None:
            raise faults.pop(0)
        return await read(query, *args)

    async with here.owner() as client:
        with capture_logs() as lines:
            async with following(client) as stream:
                monkeypatch.setattr(store, "read", failing)
                task = await submitted(client, UNTIL_DONE)
                assert seen(await next_of(stream, 2)) == sent(await pulled(client, task=task["id"]))
        assert [line["exception"] for line in lines if line["event"] == "worker.failed"] == [
            "ValueError: odd"
        ]
        faults.append(StoreUnavailable("away"))
        with pytest.raises(StoreUnavailable):
            await anext(Tail(store, here.context.resources.links).follow(0, StreamFilter(None), 1))
        assert faults == []
