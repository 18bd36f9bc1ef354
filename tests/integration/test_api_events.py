"""Reading events by pull: in sequence, from a position, filtered, and with a long poll."""

import asyncio
import re
import time
from typing import Any

import httpx
import pytest

from tests.api import TIME, UNTIL_DONE, an_id, got, refused, submitted
from tests.world import World

JSON = dict[str, Any]


async def read(client: httpx.AsyncClient, **query: Any) -> JSON:
    page = got(await client.get("/v1/events", params=query))
    assert page.keys() == {"data", "next_after", "resync"}
    assert re.fullmatch("[0-9]{20}", page["next_after"])
    assert page["resync"] is False
    return page


async def latest(here: World) -> str:
    """The latest position in the outbox."""
    page = await read(here.client, after="0" * 19 + "1", task="nobody")
    place: str = page["next_after"]
    return place


async def test_an_event_is_a_cloud_event_with_the_task_as_it_was(here: World) -> None:
    """The event has every key that docs/api.md lists. `data` is the task without its prompt and
    with its links.
    """
    async with here.owner() as client:
        task = await submitted(client, UNTIL_DONE, metadata={"a": "b"})
        submitted_event, completed = (await read(client))["data"]
    for event, type in (
        (submitted_event, "image.task.submitted"),
        (completed, "image.task.completed"),
    ):
        assert re.fullmatch(an_id("evt"), event["id"])
        assert re.fullmatch(TIME, event["time"])
        assert re.fullmatch("[0-9]{20}", event["sequence"])
        assert event == {
            "specversion": "1.0",
            "id": event["id"],
            "source": here.url,
            "type": type,
            "subject": task["id"],
            "time": event["time"],
            "datacontenttype": "application/json",
            "sequence": event["sequence"],
            "data": event["data"],
        }
    alone = ("prompt", "quarantine", "data", "held")  # only in a task
    assert completed["data"] == {name: task[name] for name in task if name not in alone}
    assert (submitted_event["data"]["state"], submitted_event["data"]["results"]) == (
        "submitted",
        [],
    )


async def test_continuing_after_the_last_one_seen_misses_and_repeats_nothing(here: World) -> None:
    """Pages of any size, joined by `next_after`, return every event once, in sequence."""
    async with here.owner() as client:
        for _ in range(3):
            await submitted(client, UNTIL_DONE)
        whole = (await read(client))["data"]
        assert len(whole) == 6
        assert [event["sequence"] for event in whole] == sorted(
            event["sequence"] for event in whole
        )
        for limit in (1, 4, 6, 7):
            seen, after = [], "0"
            while page := await read(client, after=after, limit=limit):
                seen += page["data"]
                after = page["next_after"]
                if not page["data"]:
                    break
            assert seen == whole
        for event, rest in zip(whole, range(5, -1, -1), strict=True):
            assert len((await read(client, after=event["sequence"]))["data"]) == rest


async def test_next_after_is_the_last_one_examined_whatever_the_filter_left_out(
    here: World,
) -> None:
    """A reader with a filter does not examine the same events again. A full page ends at its last
    event.
    """
    async with here.owner() as client:
        mine = await submitted(client, UNTIL_DONE)
        await submitted(here.client, UNTIL_DONE)
        end = await latest(here)
        page = await read(client, type="image.task.failed")
        assert (page["data"], page["next_after"]) == ([], end)
        page = await read(client, task=mine["id"])
        assert page["next_after"] == end
        assert end > page["data"][-1]["sequence"]
        page = await read(client, limit=1)
        assert page["next_after"] == page["data"][0]["sequence"]
        beyond = "00000000009999999999"
        assert (await read(client, after=beyond))["next_after"] == beyond


async def test_events_are_filtered_by_type_and_task(here: World) -> None:
    """A type filter is an exact type, a prefix with `*`, or `*`. Several are separated by commas or
    repeated. A task filter is an id.
    """
    async with here.owner() as client:
        good = await submitted(client, UNTIL_DONE)
        bad = await submitted(client, UNTIL_DONE, sandbox={"fail": "service_error"})

        async def types(**query: Any) -> list[tuple[str, str]]:
            return [
                (event["subject"], event["type"].rsplit(".", 1)[-1])
                for event in (await read(client, **query))["data"]
            ]

        whole = [
            (good["id"], "submitted"),
            (good["id"], "completed"),
            (bad["id"], "submitted"),
            (bad["id"], "failed"),
        ]
        assert (
            await types()
            == await types(type="*")
            == await types(type="image.*")
            == await types(type="image.task.*")
            == whole
        )
        assert await types(type="image.task.failed") == [whole[3]]
        assert await types(type="image.task.failed,image.task.completed") == [whole[1], whole[3]]
        assert await types(type=["image.task.failed", "image.task.completed"]) == [
            whole[1],
            whole[3],
        ]
        assert await types(task=bad["id"]) == whole[2:]
        assert await types(task=bad["id"], type="image.task.submitted") == [whole[2]]
        assert await types(task="task_unknown") == []
        assert await types(type="callback.conflict") == []
        assert await types(type="") == whole


async def test_operators_events_are_shown_to_admins_alone(here: World) -> None:
    """A conflict between callbacks concerns the operators, so the task's owner does not see it."""
    async with here.owner() as client:
        task = await submitted(client, UNTIL_DONE, sandbox={"contradict": True})
        after = (await read(client, type="image.task.completed"))["data"][0]["sequence"]
        page = await read(here.client, type="callback.conflict", task=task["id"], wait=20)
        (conflict,) = page["data"]
        assert (conflict["subject"], conflict["data"]["task_id"]) == (task["id"], task["id"])
        assert (await read(client, after=after))["data"] == []


async def test_a_reader_who_waits_is_answered_by_the_next_event(here: World) -> None:
    """The server holds the answer only until the first event is there."""
    async with here.owner() as client:
        started = time.monotonic()
        waiting = asyncio.create_task(read(client, wait=30, type="image.task.completed"))
        await submitted(client)
        page = await waiting
        assert [event["type"] for event in page["data"]] == ["image.task.completed"]
        assert time.monotonic() - started < 20


async def test_a_reader_who_waits_in_vain_gets_an_empty_page_with_a_place(here: World) -> None:
    """After the wait the answer says how far the server looked. The server does not wait when
    events are there.
    """
    async with here.owner() as client:
        started = time.monotonic()
        page = await read(client, wait="0.2")
        assert page["data"] == []
        assert time.monotonic() - started >= 0.2
        await submitted(client, UNTIL_DONE)
        assert len((await read(client, wait=60))["data"]) == 2


@pytest.mark.parametrize("wait", ["-1", "60.1", "61", "x", "", "nan", "inf"])
async def test_a_wait_is_0_to_60_seconds(here: World, wait: str) -> None:
    refused(
        await here.client.get("/v1/events", params={"wait": wait}),
        400,
        "invalid_request",
        param="wait",
    )


@pytest.mark.parametrize(
    "after", ["x", "-1", "1.0", "+1", "1" * 21, "9" * 20, str(2**63), "٣", "0x1", "%00"]
)
async def test_a_place_is_a_sequence_that_an_answer_gave(here: World, after: str) -> None:
    """Any other value is rejected by name."""
    refused(
        await here.client.get("/v1/events", params={"after": after}),
        400,
        "invalid_request",
        param="after",
    )


@pytest.mark.parametrize(
    "type", ["image", "image.task", "image.task.done", ".*", "image.task.*x", "\0", "imag*"]
)
async def test_an_unknown_type_is_refused_rather_than_never_seen(here: World, type: str) -> None:
    """A typing error in a type's name is an error at once."""
    refused(
        await here.client.get("/v1/events", params={"type": type}),
        400,
        "invalid_request",
        param="type",
    )


async def test_a_task_filter_must_be_text(here: World) -> None:
    """A task id with NUL is rejected by name."""
    refused(
        await here.client.get("/v1/events", params={"task": "\0"}),
        400,
        "invalid_request",
        param="task",
    )
