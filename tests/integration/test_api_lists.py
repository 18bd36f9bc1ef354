"""Lists of tasks: filters and pages. Rules that hold for every list are tested on every list."""

import asyncio
from typing import Any

import pytest

from tests.api import got, listed, refused, submitted
from tests.world import World

JSON = dict[str, Any]


async def test_a_list_is_filtered_by_state_model_and_metadata(still: World) -> None:
    """Filters are combined with AND. Metadata is compared as text, under any name."""
    async with still.owner() as client:
        red = (await submitted(client, metadata={"colour": "red", "a.b": "1"}))["id"]
        blue = (await submitted(client, metadata={"colour": "blue", "key": "да"}))["id"]
        other = (
            await submitted(client, model="another-model", metadata={"colour": "red", "size": ""})
        )["id"]
        got(await client.post(f"/v1/tasks/{red}/cancel"))
        assert await listed(client) == [other, blue, red]
        assert await listed(client, state="cancelled") == [red]
        assert await listed(client, state="queued") == [other, blue]
        assert await listed(client, model="another-model") == [other]
        assert await listed(client, **{"metadata.colour": "red"}) == [other, red]
        assert await listed(client, **{"metadata.colour": "red", "state": "queued"}) == [other]
        assert await listed(client, **{"metadata.a.b": "1"}) == [red]
        assert await listed(client, **{"metadata.key": "да"}) == [blue]
        assert await listed(client, **{"metadata.size": ""}) == [other]
        assert await listed(client, **{"metadata.missing": "x"}) == []
        assert await listed(client, model="") == []


async def test_metadata_names_are_data_in_a_filter_too(still: World) -> None:
    """A name with brackets or dots matches exactly that name. A name that JSON would escape is
    rejected.
    """
    async with still.owner() as client:
        for name in ("a'b", "a[0]", "$", "a.b.c", "%", "*", " ", "?", "a=b&c", "订单"):
            task = await submitted(client, metadata={name: "1"})
            assert await listed(client, **{f"metadata.{name}": "1"}) == [task["id"]], name
    for name in ('a"b', "a\\b", "a\nb", "\0"):
        refused(
            await still.client.get("/v1/tasks", params={f"metadata.{name}": "1"}),
            400,
            "invalid_request",
            param="metadata",
        )


async def test_a_cursor_leads_through_all_pages_newest_first(still: World) -> None:
    """Every task appears once, and the last page says that it is the last."""
    async with still.owner() as client:
        ids = [(await submitted(client))["id"] for _ in range(6)]
        for limit in (1, 2, 3, 4, 6, 7):
            seen: list[str] = []
            pages, cursor = 0, None
            while pages == 0 or cursor:
                query = {"limit": limit} | ({"cursor": cursor} if cursor else {})
                page = got(await client.get("/v1/tasks", params=query))
                assert page.keys() == {"data", "next_cursor"}
                seen += [task["id"] for task in page["data"]]
                pages, cursor = pages + 1, page["next_cursor"]
            assert (seen, pages) == (ids[::-1], -(-6 // limit))


async def test_a_task_that_comes_meanwhile_does_not_move_the_pages(still: World) -> None:
    """A cursor is a position in the list, not a number of rows."""
    async with still.owner() as client:
        ids = [(await submitted(client))["id"] for _ in range(3)]
        first = got(await client.get("/v1/tasks", params={"limit": 2}))
        await submitted(client)
        second = got(
            await client.get("/v1/tasks", params={"limit": 2, "cursor": first["next_cursor"]})
        )
        assert [task["id"] for task in first["data"] + second["data"]] == ids[::-1]


@pytest.mark.parametrize(
    "limit", ["0", "1001", "-1", "1.5", "x", "", "1e2", "nan", "٣", "+5", "1_0", "9" * 400]
)
async def test_a_limit_is_a_whole_number_from_1_to_1000(still: World, limit: str) -> None:
    for path in ("/v1/tasks", "/v1/events", "/v1/endpoints", "/v1/deliveries", "/v1/keys"):
        refused(
            await still.client.get(path, params={"limit": limit}),
            400,
            "invalid_request",
            param="limit",
        )


async def test_a_list_has_100_unless_another_limit_is_asked_for(still: World) -> None:
    """With one more task, the answer has a cursor."""
    async with still.owner() as client:
        await asyncio.gather(*(submitted(client) for _ in range(101)))
        page = got(await client.get("/v1/tasks"))
        assert len(page["data"]) == 100
        assert len(await listed(client, cursor=page["next_cursor"])) == 1


async def test_the_limits_limits_are_allowed(still: World) -> None:
    for limit in (1, 1000):
        for path in ("/v1/tasks", "/v1/events", "/v1/endpoints", "/v1/deliveries", "/v1/keys"):
            got(await still.client.get(path, params={"limit": limit}))


@pytest.mark.parametrize(
    "cursor",
    [
        *("", "x", "é", "7", "7.", ".a", "-7.a", "1e9.a", "٣.a", f"{2**63}.a"),
        *("7.\0", "7.a b", "7.é", "7." + "a" * 101),
    ],
)
async def test_a_cursor_that_no_answer_gave_is_refused(still: World, cursor: str) -> None:
    """The answer is 400, for every list."""
    for path in ("/v1/tasks", "/v1/endpoints", "/v1/deliveries", "/v1/keys"):
        refused(
            await still.client.get(path, params={"cursor": cursor}),
            400,
            "invalid_request",
            param="cursor",
        )


async def test_filters_that_nothing_can_match_are_refused_by_name(still: World) -> None:
    """An unknown state and text that the store cannot hold are rejected."""
    for query, param in (
        ("state=done", "state"),
        ("state=", "state"),
        ("model=%00", "model"),
        ("metadata.a=%00", "metadata.a"),
    ):
        refused(await still.client.get(f"/v1/tasks?{query}"), 400, "invalid_request", param=param)
