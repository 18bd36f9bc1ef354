"""An answer is bounded in bytes as well as in rows, and goes on with a cursor."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, update

from service.db import paging
from service.db.paging import in_batches, that_fit
from service.db.tables import attempts, deliveries, events
from service.db.transaction import Transaction
from service.resources import new_id
from service.tasks.document import shortened
from tests.api import ASYNC, UNTIL_DONE, got, submitted
from tests.world import World

JSON = dict[str, Any]

MIB = 1 << 20
SHAPES = {
    "one long text": "x" * 900_000,
    "text beyond ASCII": "ж" * 450_000,
    "escaped text": "\x01" * 150_000,
    "many small fields": {f"k{number}": 1 for number in range(46_000)},
    "many empty lists": [[]] * 160_000,
}


async def pages(
    client: httpx.AsyncClient, path: str, cursor: str, next_cursor: str, **query: Any
) -> list[list[JSON]]:
    """All pages of a list. Each keeps to 4 MiB."""
    made: list[list[JSON]] = []
    place: Any = None
    while place is not None or not made:
        asked = {"limit": 1000, **query, **({cursor: place} if place else {})}
        answer = await client.get(path, params=asked)
        document = got(answer)
        assert len(answer.content) <= 4 * MIB
        assert len(answer.content) == int(answer.headers["content-length"])
        made.append(document["data"])
        place = document[next_cursor] if document["data"] else None
    return made


@pytest.mark.parametrize("note", SHAPES.values(), ids=list(SHAPES))
async def test_a_page_of_tasks_ends_at_four_mebibytes(still: World, note: object) -> None:
    """The cursor leads through all tasks, newest first, each once. A task is never cut."""
    async with still.owner() as client:
        ids = [(await submitted(client, ASYNC, note=note))["id"] for _ in range(9)]
        made = await pages(client, "/v1/tasks", "cursor", "next_cursor")
        assert [task["id"] for page in made for task in page] == ids[::-1]
        assert len(made) >= 2
        assert all(task["request"]["note"] == note for page in made for task in page)


def grow_events(tx: Transaction, notes: Sequence[tuple[str, object]]) -> list[None]:
    """Gives the events of a task a long request, as earlier versions kept it."""
    for task_id, note in notes:
        mine = events.c.task_id == task_id
        data = {"id": task_id, "state": "queued", "images": [], "request": {"note": note}}
        tx.connection.execute(update(events).where(mine).values(data=data))
    return [None] * len(notes)


@pytest.fixture(scope="module")
async def large(here: World) -> AsyncIterator[tuple[httpx.AsyncClient, list[str]]]:
    """An owner's client and the sequences of its 12 events, most of which have 0.9 MB."""
    async with here.owner() as client:
        for number in range(6):
            task = await submitted(client, UNTIL_DONE)
            note = list(SHAPES.values())[number % len(SHAPES)]
            await here.context.resources.store.write(grow_events, (task["id"], note))
        found = await pages(client, "/v1/events", "after", "next_after")
        yield client, [event["sequence"] for page in found for event in page]


@pytest.mark.parametrize("query", [{}, {"type": "image.task.*"}, {"wait": "5"}])
async def test_a_page_of_events_ends_at_four_mebibytes(
    large: tuple[httpx.AsyncClient, list[str]], query: JSON
) -> None:
    """`next_after` leads to all events in sequence, each once."""
    client, sequences = large
    assert len(sequences) == 12
    assert sequences == sorted(set(sequences))
    first = got(await client.get("/v1/events", params={"limit": 1000, **query}))
    assert 1 < len(first["data"]) < 12
    assert first["next_after"] == first["data"][-1]["sequence"]
    limited = await pages(client, "/v1/events", "after", "next_after", limit=2, type="*")
    assert [event["sequence"] for page in limited for event in page] == sequences


async def test_a_stream_of_large_events_misses_none(
    large: tuple[httpx.AsyncClient, list[str]],
) -> None:
    client, sequences = large
    headers, seen = {"accept": "text/event-stream"}, list[str]()
    async with client.stream("GET", "/v1/events?after=0", headers=headers) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                seen.append(line.removeprefix("id: "))
            if len(seen) == len(sequences):
                break
    assert seen == sequences


def many_attempts(tx: Transaction, counts: Sequence[int]) -> list[None]:
    """So many attempts for every delivery, each with the 2 KiB of the subscriber's answer."""
    for delivery_id in tx.connection.execute(deliveries.select()).scalars().all():
        for count in counts:
            rows = [
                {
                    "id": new_id("attempt", tx.now),
                    "delivery_id": delivery_id,
                    "time": number,
                    "duration_ms": 1,
                    "answer": b"\x00" * 2048,
                }
                for number in range(count)
            ]
            tx.connection.execute(insert(attempts), rows)
    return [None] * len(counts)


async def test_a_page_of_deliveries_ends_at_four_mebibytes(still: World) -> None:
    """Also with the responses of subscribers. A delivery shows its latest 200 attempts."""
    url = "http://127.0.0.1:9/"
    got(await still.client.post("/v1/endpoints", json={"url": url, "types": ["*"]}), 201)
    for _ in range(4):
        task = await submitted(still.client)
        got(await still.client.post(f"/v1/tasks/{task['id']}/cancel"))
    await still.context.resources.store.write(many_attempts, 230)
    made = await pages(still.client, "/v1/deliveries", "cursor", "next_cursor")
    found = [delivery for page in made for delivery in page]
    assert len({delivery["id"] for delivery in found}) == len(found) == 4
    assert len(made) >= 2
    for delivery in found:
        times = [attempt["time"] for attempt in delivery["attempts"]]
        assert (len(times), times) == (200, sorted(times))
        alone = got(await still.client.get(f"/v1/deliveries/{delivery['id']}"))
        assert alone == delivery


# --- the request in events
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("note", SHAPES.values(), ids=list(SHAPES))
async def test_events_keep_little_of_unknown_fields(here: World, note: object) -> None:
    """At most 16 KiB. The documented fields stay, and the task shows everything."""
    async with here.owner() as client:
        whole = {"size": "768x768", "n": 1, "seed": 7, "note": note, "style": "oil"}
        task = await submitted(client, UNTIL_DONE, n=1, seed=7, note=note, style="oil")
        assert task["request"] == whole
        del whole["note"]
        kept = [event["data"]["request"] for event in got(await client.get("/v1/events"))["data"]]
        assert kept == [whole, whole]


def test_a_field_is_kept_whole_or_not_at_all() -> None:
    """Fields count in their order, with their names. Documented ones have 64 KiB of their own."""
    assert shortened({}) == {}
    fits = {"a": "x" * (16 * 1024 - 8)}
    assert shortened(fits) == fits
    assert shortened({"a": "x" * (16 * 1024 - 7), "b": 1}) == {"b": 1}
    assert shortened({"a": "ж" * 9000, "b": 1}) == {"b": 1}
    assert list(shortened({f"k{n}": "x" * 1000 for n in range(40)})) == [f"k{n}" for n in range(16)]
    links = [f"https://f.test/{'x' * 1900}"] * 20
    request = {"image_urls": links, "size": "1x1", "n": 1}
    assert shortened(request) == request
    assert shortened({"size": "x" * 70_000, "n": 1}) == {"n": 1}


# --- rows are read a few at a time
# --------------------------------------------------------------------------------------------------


def batches(sizes: Sequence[int], limit: int, most: int) -> tuple[list[int], list[int], bool]:
    """The taken sizes, the numbers of rows that were asked for, and whether more follow."""
    asked: list[int] = []

    def read(after: int, count: int) -> list[tuple[int, int]]:
        asked.append(count)
        return list(enumerate(sizes))[after : after + count]

    found = in_batches(read, lambda item: item[0] + 1, lambda item: item[1], 0, limit)
    items, more = that_fit(found, lambda item: item[1], most)
    return [size for _, size in items], asked, more


def test_large_rows_are_read_one_by_one() -> None:
    """A page never loads more than its bytes and a few rows. Small rows need few statements."""
    assert batches([MIB] * 50, 1000, 4 * MIB) == ([MIB] * 4, [2, 1, 1, 1], True)
    taken, asked, more = batches([1000] * 500, 300, 4 * MIB)
    assert (taken, more) == ([1000] * 300, False)
    assert asked == [2] + [paging.BATCH] * 18 + [10]
    assert batches([9 * MIB, 1], 10, 4 * MIB) == ([9 * MIB], [2], True)
    assert batches([], 10, 1) == ([], [2], False)
    assert batches([5, 5, 5], 3, 100) == ([5, 5, 5], [2, 1], False)
    assert batches([5, 5, 5], 3, 10) == ([5, 5], [2, 1], True)


def test_a_long_read_gives_way_after_each_quarter_of_a_mebibyte() -> None:
    """A short one does not."""
    for size, number, expected in ((MIB, 3, 2), (100_000, 9, 2), (1000, 200, 0)):
        given: list[int] = []

        def read(after: int, count: int, number: int = number) -> list[int]:
            return list(range(after, min(number, after + count)))

        def place(item: int) -> int:
            return item + 1

        def size_of(_: int, size: int = size) -> int:
            return size

        taken = list(in_batches(read, place, size_of, 0, 1000, partial(given.append, 1)))
        assert taken == list(range(number))
        assert len(given) == expected


async def test_a_long_read_of_the_store_gives_way(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of tasks and a page of events."""
    store, given = still.context.resources.store, list[int]()
    assert store.give_way == still.context.gate.give_way
    monkeypatch.setattr(store, "give_way", partial(given.append, 1))
    async with still.owner() as client:
        for _ in range(3):
            task = await submitted(client, note="x" * 400_000)
            got(await client.post(f"/v1/tasks/{task['id']}/cancel"))
            await store.write(grow_events, (task["id"], "x" * 400_000))
        for path in ("/v1/tasks", "/v1/events"):
            given.clear()
            got(await client.get(path))
            assert given
