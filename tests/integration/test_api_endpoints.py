"""Endpoints and deliveries in the HTTP API."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from tests.api import TIME, UNTIL_DONE, an_id, got, refused, submitted
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber

JSON = dict[str, Any]
CLOSED = "http://127.0.0.1:9/"  # no server listens here


async def created(client: httpx.AsyncClient, url: str = CLOSED, **fields: Any) -> JSON:
    return got(await client.post("/v1/endpoints", json={"url": url, **fields}), 201)


def without_secret(endpoint: JSON) -> JSON:
    return {name: value for name, value in endpoint.items() if name != "secret"}


# --- endpoints
# --------------------------------------------------------------------------------------------------


async def test_an_endpoint_has_every_key_and_its_secret_once(here: World) -> None:
    """Only the answer to the creation has the secret."""
    async with here.owner(name="ann") as client:
        made = await created(client)
        assert re.fullmatch(an_id("ep"), made["id"])
        assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", made["secret"])
        assert re.fullmatch(TIME, made["created_at"])
        assert made == {
            "id": made["id"],
            "owner": "ann",
            "url": CLOSED,
            "types": ["image.task.*"],
            "description": "",
            "status": "enabled",
            "ordered": False,
            "ordered_by": None,
            "metadata": {},
            "rate_per_s": None,
            "headers": {},
            "created_at": made["created_at"],
            "disabled_at": None,
            "disabled_reason": None,
            "status_since": made["created_at"],
            "failing_since": None,
            "success_rate": None,
            "replay": None,
            "secret": made["secret"],
        }
        path = f"/v1/endpoints/{made['id']}"
        assert got(await client.get(path)) == without_secret(made)
        assert got(await client.get("/v1/endpoints")) == {
            "data": [without_secret(made)],
            "next_cursor": None,
        }
        assert got(await client.patch(path, json={"description": "d"})) == without_secret(made) | {
            "description": "d"
        }


async def test_endpoints_are_listed_newest_first_in_pages(here: World) -> None:
    async with here.owner() as client:
        ids = [(await created(client))["id"] for _ in range(3)]
        first = got(await client.get("/v1/endpoints", params={"limit": 2}))
        second = got(
            await client.get("/v1/endpoints", params={"limit": 2, "cursor": first["next_cursor"]})
        )
        assert [endpoint["id"] for endpoint in first["data"] + second["data"]] == ids[::-1]
        assert second["next_cursor"] is None


async def test_a_patch_changes_what_it_names(here: World) -> None:
    """Each field can be changed alone, and the rest stays as it is."""
    async with here.owner() as client:
        known = without_secret(
            await created(client, types=["image.task.failed"], description="first")
        )
        path = f"/v1/endpoints/{known['id']}"
        for change in (
            {"url": "http://127.0.0.1:10/x"},
            {"types": ["*"]},
            {"description": ""},
            {"types": None},
            {"description": "second"},
            {"description": None},
            {"url": None, "status": None},
            {"status": "paused"},
            {},
        ):
            for name, value in change.items():
                default = {"types": ["image.task.*"], "description": ""}.get(name, known[name])
                known[name] = default if value is None else value
            changed = got(await client.patch(path, json=change))
            known |= {"status_since": changed["status_since"]} if "status" in change else {}
            assert changed == known
        assert got(await client.get(path)) == known


async def test_an_endpoint_is_disabled_and_enabled_by_its_owner(here: World) -> None:
    """A disabled endpoint shows the time and the reason."""
    async with here.owner() as client:
        path = f"/v1/endpoints/{(await created(client))['id']}"
        off = got(await client.patch(path, json={"status": "disabled"}))
        assert off["status"] == "disabled"
        assert re.fullmatch(TIME, off["disabled_at"])
        assert off["disabled_reason"] == "by its owner"
        on = got(await client.patch(path, json={"status": "enabled"}))
        assert (on["status"], on["disabled_at"], on["disabled_reason"]) == ("enabled", None, None)


async def test_a_deleted_endpoint_is_gone(here: World) -> None:
    """The deletion is 204, and every later request is 404."""
    async with here.owner() as client:
        path = f"/v1/endpoints/{(await created(client))['id']}"
        answer = await client.delete(path)
        assert (answer.status_code, answer.content) == (204, b"")
        for method, body in (("GET", None), ("PATCH", {}), ("DELETE", None)):
            refused(await client.request(method, path, json=body), 404, "endpoint_not_found")
        assert got(await client.get("/v1/endpoints"))["data"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"types": ["image.task.done"]}, "types.0"),
        ({"types": ["image.task.failed", "image"]}, "types.1"),
        ({"types": []}, "types"),
        ({"types": "*"}, "types"),
        ({"types": ["*"] * 33}, "types"),
        ({"types": [7]}, "types.0"),
        ({"description": "d" * 501}, "description"),
        ({"description": 7}, "description"),
        ({"secret": "whsec_mine"}, "secret"),
        ({"url": 7}, "url"),
        ({"url": ""}, "url"),
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "http://8.8.8.8/"}, "url"),
        ({"url": "https://169.254.169.254/"}, "url"),
        ({"url": "https://0x7f000001/"}, "url"),
        ({"url": "ftp://8.8.8.8/"}, "url"),
        ({"url": "https://u:p@8.8.8.8/"}, "url"),
        ({"url": "https://8.8.8.8:0/"}, "url"),
        ({"url": "https://8.8.8.8/" + "a" * 2048}, "url"),
    ],
)
async def test_an_invalid_endpoint_is_refused_by_name(
    here: World, fields: JSON, param: str
) -> None:
    """The rule holds for creation and for changes. A rejected request changes nothing."""
    async with here.owner() as client:
        refused(
            await client.post("/v1/endpoints", json={"url": CLOSED, **fields}), 400, param=param
        )
        assert got(await client.get("/v1/endpoints"))["data"] == []
        known = without_secret(await created(client))
        path = f"/v1/endpoints/{known['id']}"
        error = refused(await client.patch(path, json=fields), 400, param=param)
        assert error["message"].count(", not ") <= 1, "a refused value is named once"
        assert got(await client.get(path)) == known


async def test_an_endpoint_wants_a_url_and_a_known_status(here: World) -> None:
    """A missing URL and an unknown status are rejected by name."""
    refused(await here.client.post("/v1/endpoints", json={}), 400, "invalid_request", param="url")
    path = f"/v1/endpoints/{(await created(here.client))['id']}"
    refused(
        await here.client.patch(path, json={"status": "off"}),
        400,
        "invalid_request",
        param="status",
    )
    refused(
        await here.client.patch(path, json={"owner": "x"}), 400, "invalid_request", param="owner"
    )


async def test_only_an_admin_subscribes_for_others(here: World) -> None:
    """An `owner` of null, which covers all owners, and another owner's name need `admin`. The key's
    own owner does not.
    """
    async with here.owner(name="olga") as client:
        for owner in (None, "ann"):
            refused(
                await client.post("/v1/endpoints", json={"url": CLOSED, "owner": owner}),
                403,
                "permission_denied",
                param="owner",
            )
        assert (await created(client, owner="olga"))["owner"] == "olga"
    assert (await created(here.client, owner=None, types=["task.parked"]))["owner"] is None
    assert (await created(here.client, owner="olga"))["owner"] == "olga"
    assert (await created(here.client))["owner"] == "admin"
    for bad in ("", "A", "o" * 65, "a b"):
        refused(
            await here.client.post("/v1/endpoints", json={"url": CLOSED, "owner": bad}),
            400,
            "invalid_request",
            param="owner",
        )


# --- deliveries
# --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def told(
    client: httpx.AsyncClient, *statuses: int, **fields: Any
) -> AsyncIterator[tuple[JSON, Subscriber]]:
    """Creates an endpoint with a subscriber that gives these answers and repeats the last."""

    def answer(number: int, _: object) -> Response:
        return Response(b"answer \xff" + b"a" * 3000, statuses[min(number, len(statuses) - 1)])

    async with subscriber() as takes:
        takes.answer = answer
        yield await created(client, takes.url, **fields), takes


async def delivered(client: httpx.AsyncClient, state: str, **query: Any) -> list[JSON]:
    """Waits until the list has deliveries in that state, and returns them."""

    async def look() -> list[JSON]:
        page: list[JSON] = got(
            await client.get("/v1/deliveries", params={"state": state, **query})
        )["data"]
        return page

    found: list[JSON] = await wait_until(look)
    return found


async def test_a_delivery_has_every_key_and_every_attempt(here: World) -> None:
    """Each attempt shows its time and result, and a delivered one has no next attempt."""
    async with (
        here.owner() as client,
        told(client, 500, 204, types=["image.task.completed"]) as (endpoint, takes),
    ):
        task = await submitted(client, UNTIL_DONE)
        (delivery,) = await delivered(client, "delivered")
        event = got(await client.get("/v1/events", params={"type": "image.task.completed"}))[
            "data"
        ][0]
        assert re.fullmatch(an_id("dlv"), delivery["id"])
        assert re.fullmatch(TIME, delivery["created_at"])
        assert delivery == {
            "id": delivery["id"],
            "endpoint": endpoint["id"],
            "event": event["id"],
            "type": "image.task.completed",
            "task": task["id"],
            "state": "delivered",
            "cause": None,
            "created_at": delivery["created_at"],
            "next_attempt_at": None,
            "attempts": delivery["attempts"],
        }
        first, second = delivery["attempts"]
        assert [first["status"], second["status"]] == [500, 204]
        assert (first["error"], second["error"]) == ("answered 500", None)
        for attempt in (first, second):
            assert re.fullmatch(an_id("att"), attempt["id"])
            assert re.fullmatch(TIME, attempt["time"])
            assert type(attempt["duration_ms"]) is int
            assert attempt["answer"] is None
        assert got(await client.get(f"/v1/deliveries/{delivery['id']}")) == delivery
        assert {received.headers["webhook-id"] for received in takes.received} == {event["id"]}


async def test_what_a_subscriber_answered_is_shown_to_admins_alone(here: World) -> None:
    """The answer's first 2 KiB are shown as text, whatever the bytes are."""
    async with (
        here.owner() as client,
        told(client, 500, 200, types=["image.task.completed"]) as (endpoint, _),
    ):
        await submitted(client, UNTIL_DONE)
        (theirs,) = await delivered(client, "delivered", endpoint=endpoint["id"])
        (ours,) = await delivered(here.client, "delivered", endpoint=endpoint["id"])
        assert [attempt["answer"] for attempt in theirs["attempts"]] == [None, None]
        assert [attempt["answer"] for attempt in ours["attempts"]] == ["answer �" + "a" * 2040] * 2
        assert got(await here.client.get(f"/v1/deliveries/{ours['id']}")) == ours


async def test_an_attempt_without_an_answer_says_why(here: World) -> None:
    """The attempt has a reason instead of a status. After the last retry the delivery is dead."""
    async with here.owner() as client:
        await created(client, types=["image.task.completed"])
        await submitted(client, UNTIL_DONE)
        (dead,) = await delivered(client, "dead")
        assert [attempt["status"] for attempt in dead["attempts"]] == [None] * 3
        assert all("NotConnected" in attempt["error"] for attempt in dead["attempts"])
        assert dead["next_attempt_at"] is None


async def test_deliveries_are_filtered_by_endpoint_event_task_and_state(here: World) -> None:
    """Filters are combined with AND, and pages are newest first."""
    async with (
        here.owner() as client,
        told(client, 204) as (one, _),
        told(client, 204, types=["image.task.completed"]) as (two, _),
    ):
        tasks = [await submitted(client, UNTIL_DONE) for _ in range(2)]
        events = got(await client.get("/v1/events"))["data"]

        async def count(**query: Any) -> int:
            return len(got(await client.get("/v1/deliveries", params=query))["data"])

        async def done() -> bool:
            return await count(state="delivered") == 6

        await wait_until(done)
        assert await count(endpoint=one["id"]) == 4
        assert await count(endpoint=two["id"]) == 2
        assert await count(task=tasks[0]["id"]) == 3
        assert await count(event=events[0]["id"]) == 1
        assert await count(event=events[1]["id"]) == 2
        assert await count(event=events[1]["id"], endpoint=two["id"]) == 1
        assert (
            await count(state="dead")
            == await count(state="pending")
            == await count(endpoint="ep_x")
            == 0
        )
        whole = got(await client.get("/v1/deliveries"))["data"]
        assert [each["created_at"] for each in whole] == sorted(
            (each["created_at"] for each in whole), reverse=True
        )
        first = got(await client.get("/v1/deliveries", params={"limit": 4}))
        second = got(
            await client.get("/v1/deliveries", params={"limit": 4, "cursor": first["next_cursor"]})
        )
        assert first["data"] + second["data"] == whole
        assert second["next_cursor"] is None


async def test_a_filter_of_deliveries_that_is_none_is_refused(here: World) -> None:
    """An unknown state and text that the store cannot hold are rejected."""
    for name, value in (("state", "sent"), ("endpoint", "\0"), ("event", "\0"), ("task", "\0")):
        refused(
            await here.client.get("/v1/deliveries", params={name: value}),
            400,
            "invalid_request",
            param=name,
        )
    refused(await here.client.get("/v1/deliveries/dlv_x"), 404, "delivery_not_found")


async def test_a_paused_endpoint_waits_and_says_when_it_is_tried(here: World) -> None:
    """A pending delivery shows its next attempt, or none while it is held. Once the endpoint is
    enabled, it is sent.
    """
    async with (
        here.owner() as client,
        told(client, 204, types=["image.task.completed"]) as (endpoint, _),
    ):
        path = f"/v1/endpoints/{endpoint['id']}"
        got(await client.patch(path, json={"status": "paused"}))
        await submitted(client, UNTIL_DONE)

        async def held() -> bool:
            (pending,) = await delivered(client, "pending")
            return pending["next_attempt_at"] is None and pending["attempts"] == []

        await wait_until(held)
        got(await client.patch(path, json={"status": "enabled"}))
        (delivery,) = await delivered(client, "delivered")
        assert len(delivery["attempts"]) == 1
