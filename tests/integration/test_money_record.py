"""The ledger and the sandbox's record of charges agree, over HTTP (docs/money.md)."""

import asyncio
import time
from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.upstreams.sandbox import SandboxOptions, create_sandbox
from tests.api import SUBMIT, UNTIL_DONE, got, order, submitted
from tests.waiting import wait_until
from tests.world import LOOPBACK, World, world


@pytest.fixture(scope="module")
async def own(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("record")) as made:
        yield made


async def record(own: World) -> dict[str, Any]:
    """The sandbox's charges by the service's task."""
    rows = (await own.sandbox.get("/sandbox/charges")).raise_for_status().json()["data"]
    assert len({row["idempotency_key"] for row in rows}) == len(rows)
    return {row["idempotency_key"]: row for row in rows}


CASES = {
    "plain": {"n": 3},
    "failed": {"sandbox": {"fail": "service_error"}},
    "fewer images": {"n": 4, "sandbox": {"images": 2}},
    "a decimal price": {"model": "z-image-turbo", "size": "16:9"},
    "a price by a field": {"model": "gpt-image-2-beta", "size": "1:1", "resolution": "2K"},
    "a price per request": {
        "model": "mj-v7",
        "size": None,
        "model_params": {"speed": "turbo"},
        "sandbox": {"images": 3},
    },
    "fivefold": {"sandbox": {"reserved": 7.5, "usage": 1.5}},
    "dearer": {"sandbox": {"reserved": 0.5, "usage": 4.25}},
    "a refund": {"sandbox": {"refund": 1}},
    "a lost answer": {"sandbox": {"lose_answer": True}},
    "three callbacks": {"sandbox": {"repeat_callback": 3}},
    "cancelled there": {"sandbox": {"cancel": "code"}},
    "no price in the catalogue": {"model": "gpt-image-1.5", "size": "1:1"},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
async def test_usage_equals_the_upstreams_record(own: World, fields: dict[str, Any]) -> None:
    async with own.owner() as client:
        task = await submitted(client, UNTIL_DONE, **fields)
        totals = got(await client.get("/v1/usage"))["totals"]
        row = (await record(own))[task["id"]]
        assert (totals["used"], totals["refunded"]) == (row["used"], row["refunded"])
        if task["usage"]["credits_reserved"] is not None:  # the answer arrived
            assert totals["reserved"] == row["credits_reserved"]
        if "reserved" not in fields.get("sandbox", {}) and task["model"] != "gpt-image-1.5":
            assert totals["estimated"] == row["credits_reserved"]
        assert totals["images_requested"] == row["images_requested"]
        assert totals["images"] == row["images"] == len(task["images"])
        entries = got(await client.get("/v1/ledger"))["data"]
        assert sum(entry["credits"] for entry in entries if entry["kind"] == "reserve") == 0


async def test_a_refund_that_comes_later_is_booked_by_the_next_query(tmp_path: Path) -> None:
    """The sandbox's clock goes on by hand."""
    now = [time.time()]
    options = SandboxOptions(networks=(ip_network(LOOPBACK),), delay_s=0.05)
    sandbox = create_sandbox(options, lambda: now[0])
    async with world(tmp_path, upstream=sandbox) as there:
        faults = {"usage": 1.5, "refund": 1.5, "refund_after": 600}
        task = await submitted(there.client, UNTIL_DONE, sandbox=faults)
        assert got(await there.client.get("/v1/usage"))["totals"]["refunded"] == 0
        now[0] += 600
        got(await there.client.post(f"/v1/tasks/{task['id']}/reconcile"))

        async def refunded() -> bool:
            return bool(got(await there.client.get("/v1/usage"))["totals"]["refunded"])

        await wait_until(refunded)
        totals = got(await there.client.get("/v1/usage"))["totals"]
        assert (totals["used"], totals["refunded"]) == (1.5, 1.5)
        row = (await record(there))[task["id"]]
        assert (row["used"], row["refunded"]) == (1.5, 1.5)


async def test_a_task_cancelled_here_costs_what_the_upstream_says(own: World) -> None:
    """The upstream makes it all the same. It is charged, and its image is not kept."""
    async with own.owner() as client:
        task = await submitted(client, {}, sandbox={"drop_callback": True})
        cancelled = got(await client.post(f"/v1/tasks/{task['id']}/cancel"))
        assert (cancelled["state"], cancelled["cancel"]) == ("cancelled", "local")

        async def charged() -> bool:
            return bool((await record(own))[task["id"]]["used"])

        await wait_until(charged)
        got(await own.client.post(f"/v1/tasks/{task['id']}/reconcile"))
        assert await spent(client, 2) == {"used": 2, "reserved": 2, "images": 0}
        assert (await record(own))[task["id"]]["used"] == 2


@pytest.mark.parametrize(
    ("faults", "used"),
    [({"lose_submission": 1}, 0), ({"lose_answer": True, "drop_callback": True}, 2)],
    ids=["nothing was created", "proof comes late"],
)
async def test_an_uncertain_task_that_failed_costs_what_is_proved(
    tmp_path: Path, faults: dict[str, Any], used: int
) -> None:
    """No answer says what happened, and the task fails. A callback after that proves the cost."""
    async with world(tmp_path, uncertain_after_s=0.2) as there:
        task = await there.submit(sandbox=faults)
        task = await there.ended(task["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "submission_uncertain")
        entries = got(await there.client.get("/v1/ledger"))["data"]
        assert [entry["credits"] for entry in entries] == [2, 2, -2]

        async def proved() -> list[Any]:
            return [row for row in (await record(there)).values() if row["used"]]

        for row in await wait_until(proved) if used else ():
            proof = await there.sandbox.get(f"/v1/tasks/{row['id']}")
            got(await there.stranger.post(there.callback_url(task["id"]), content=proof.content))
        assert (await spent(there.client, used))["used"] == used
        charged = sum(row["used"] for row in (await record(there)).values())
        assert charged == used


async def spent(client: httpx.AsyncClient, used: int) -> dict[str, Any]:
    """The usage once it has this cost."""

    async def look() -> dict[str, Any] | None:
        totals = got(await client.get("/v1/usage"))["totals"]
        figures = {name: totals[name] for name in ("used", "reserved", "images")}
        return figures if totals["used"] == used else None

    figures: dict[str, Any] = await wait_until(look)
    return figures


async def test_four_retries_of_one_intent_are_one_task_and_one_charge(own: World) -> None:
    """One click under one key, whose connection is cut four times: in the middle of the request,
    behind it, while the client waits, and in the middle of the response.
    """
    async with own.owner() as client:
        wanted = {"idempotency-key": "one-intent-of-a-client"} | UNTIL_DONE
        body = order(sandbox={"delay": 0.4})
        request = client.build_request("POST", SUBMIT, json=body, headers=wanted)
        head = [f"POST {SUBMIT} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items())]
        whole = "\r\n".join([*head, "", ""]).encode() + request.content
        for sent, waits_s, reads in (
            (len(whole) - 9, 0.05, 0),
            (len(whole), 0, 0),
            (len(whole), 0.1, 0),
            (len(whole), 0, 99),
        ):
            reader, writer = await asyncio.open_connection(request.url.host, request.url.port)
            writer.write(whole[:sent])
            await writer.drain()
            await asyncio.sleep(waits_s)
            assert len(await reader.readexactly(reads)) == reads
            writer.transport.abort()
        task = got(await client.post(SUBMIT, json=body, headers=wanted))
        assert (task["state"], len(task["images"])) == ("completed", 1)
        assert [each["id"] for each in got(await client.get("/v1/tasks"))["data"]] == [task["id"]]
        entries = got(await client.get("/v1/ledger"))["data"]
        assert [entry["kind"] for entry in entries].count("charge") == 1
        charged = (await record(own))[task["id"]]
        assert got(await client.get("/v1/usage"))["totals"]["used"] == charged["used"] == 2
        image = await own.client.get(task["images"][0]["url"])
        assert len(image.content) == task["images"][0]["bytes"]
