"""Causes every type of event in one service and receives it in every supported way."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.responses import Response

from service.db.tables import deliveries
from service.db.transaction import Lease, Transaction
from service.queue.crashes import FAULT_LIMIT, record_faults
from service.web.event_schemas import EVENT_TYPES
from tests.api import ASYNC, got
from tests.stores import fault
from tests.upstream import Cut, Upstream, document, error, failed, picture
from tests.waiting import wait_until
from tests.world import World, subscriber, world

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Told:
    """The events by id, as the bytes that each way of delivery brought. `task` is the document sent
    to a task's own `callback_url`.
    """

    webhooks: Mapping[str, bytes]
    streamed: Mapping[str, bytes]
    pulled: Mapping[str, bytes]
    test: bytes
    task: bytes
    document: JSON


@asynccontextmanager
async def told(folder: Path) -> AsyncIterator[Told]:
    """Runs a service with an upstream and subscribers that cause every type of event."""
    upstream = upstream_of_all()
    async with (
        world(
            folder,
            upstream=upstream.app,
            evolink_result_ttl_s=3600,
            uncertain_after_s=0.05,
            delivery_schedule="0.05",
        ) as here,
        subscriber() as shop,
    ):
        shaky = iter([503])  # one failure, and then it recovers
        shop.answer = lambda _n, request: Response(
            status_code=next(shaky, 204)
            if request.path == "/shaky"
            else {"/broken": 500, "/gone": 410}.get(request.path, 204)
        )
        endpoint = await subscribed(here, f"{shop.url}/all", "*")
        await subscribed(here, f"{shop.url}/broken", "image.task.completed")
        await subscribed(here, f"{shop.url}/gone", "image.task.cancelled")
        await subscribed(here, f"{shop.url}/shaky", "image.task.failed")
        resting = await subscribed(here, f"{shop.url}/resting", "endpoint.disabled")
        got(await here.client.patch(f"/v1/endpoints/{resting}", json={"status": "paused"}))
        await live(here, upstream, shop.url)

        async def pending() -> list[JSON]:
            found: list[JSON] = got(
                await here.client.get("/v1/deliveries", params={"endpoint": resting})
            )["data"]
            return found

        (delivery,) = await wait_until(pending)
        await here.context.resources.store.write(park, delivery["id"])

        async def everything() -> list[JSON]:
            found = await here.events()
            return found if {event["type"] for event in found} == EVENT_TYPES.keys() else []

        ids = [event["id"] for event in await wait_until(everything, 30)]
        test = got(await here.client.post(f"/v1/endpoints/{endpoint}/test"))
        assert test["status"] == 204

        def sent(path: str) -> dict[str, bytes]:
            return {
                request.headers["webhook-id"]: request.body
                for request in shop.received
                if request.path == path
            }

        await wait_until(lambda: sent("/all").keys() >= set(ids) and sent("/own"), 30)
        pulled = {event["id"]: json.dumps(event).encode() for event in await here.events()}
        streamed = await read(here, len(ids))
        webhooks = sent("/all")
        (tested,) = (
            body for body in webhooks.values() if json.loads(body)["type"] == "endpoint.test"
        )
        (own,) = sent("/own").values()
        described = got(await here.stranger.get("/asyncapi.json"))
        yield Told(
            {id: webhooks[id] for id in ids},
            {id: streamed[id] for id in ids},
            {id: pulled[id] for id in ids},
            tested,
            own,
            described,
        )


def upstream_of_all() -> Upstream:
    """An upstream that answers by prompt. Its id of a task is the prompt."""
    made = Upstream()
    for prompt in ("fine", "bad", "stopped", "lost", "risky"):
        made.submits[prompt] = [document("pending", id=f"task-unified-{prompt}")]
    made.submits["doubtful"] = [Cut(b'{"id": "task-un')]
    made.submits["barred"] = [error(401, "unauthorized"), document("pending", id="task-unified-5")]
    made.queries["task-unified-bad"] = [failed("service_error")]
    made.queries["task-unified-lost"] = [failed("resource_not_found")]
    made.files["0.png"] = [Response(picture(), media_type="image/png")]
    return made


async def subscribed(here: World, url: str, *types: str) -> str:
    """Subscribes an endpoint to the events of all owners."""
    made = got(
        await here.client.post("/v1/endpoints", json={"url": url, "types": types, "owner": None}),
        201,
    )
    return str(made["id"])


async def live(here: World, upstream: Upstream, own: str) -> None:
    """Runs a task for each way to end, a contradiction, a proof that arrives too late, an image
    that cannot be fetched, a refusal of the account, an exhausted budget, and a pause.
    """
    for prompt, file in (("fine", "0.png"), ("doubtful", "0.png"), ("risky", "missing.png")):
        upstream.queries[f"task-unified-{prompt}"] = [
            document("completed", f"{here.sandbox_url}/files/{file}")
        ]

    async def submitted(prompt: str, state: str, **fields: Any) -> str:
        task = await here.submit(prompt=prompt, headers=ASYNC, **fields)
        await wait_until(lambda: in_state(here, task["id"], state))
        return str(task["id"])

    async def called(task_id: str, prompt: str, status: str) -> None:
        results = json.loads(bytes(upstream.queries[f"task-unified-{prompt}"][0].body)).get(
            "results", []
        )
        body = {"id": f"task-unified-{prompt}", "status": status, "results": results}
        got(await here.stranger.post(here.callback_url(task_id), json=body))

    fine = await submitted(
        "fine", "submitted", callback_url=f"{own}/own", metadata={"order": "七\u2028"}
    )
    await called(fine, "fine", "completed")
    await wait_until(lambda: in_state(here, fine, "completed"))
    await called(fine, "fine", "failed")
    for prompt, status in (("bad", "failed"), ("lost", "failed"), ("risky", "completed")):
        await called(await submitted(prompt, "submitted"), prompt, status)
    got(await here.client.post(f"/v1/tasks/{await submitted('stopped', 'submitted')}/cancel"))
    await called(await submitted("doubtful", "failed"), "doubtful", "completed")
    await submitted("barred", "submitted")
    async with here.owner(name="thrifty") as thrifty:
        budget = {"period": "total", "credits": 0.000001}
        got(await here.client.put("/v1/budgets/thrifty", json=budget))
        order = {"model": "wan2.5-text-to-image", "prompt": "too dear"}
        got(await thrifty.post("/v1/images/generations", json=order), 402)
    for paused in (True, False):
        change = {"paused": paused, "reason": "an invoice is open"}
        got(await here.client.post("/v1/submission", json=change))


async def in_state(here: World, task_id: str, state: str) -> bool:
    return bool((await here.task(task_id))["state"] == state)


def park(tx: Transaction, items: Sequence[str]) -> list[None]:
    """Parks a delivery after its last allowed fault. Its event belongs to no task."""
    for key in items:
        held = {
            "due_at": tx.now,
            "lease_until": tx.now + 60_000,
            "lease_owner": "somebody",
            "fence": 1,
            "faults": FAULT_LIMIT - 1,
        }
        tx.change(deliveries, key, held)
        tx.write()
        assert record_faults(tx, [fault(Lease("deliver", key, 1, 1), 0)]) == [FAULT_LIMIT]
    return [None] * len(items)


async def read(here: World, count: int) -> dict[str, bytes]:
    """Reads `count` events from a stream, each `data` as it was sent."""
    found: dict[str, bytes] = {}
    rest = b""
    headers = {"accept": "text/event-stream"}
    async with (
        asyncio.timeout(30),
        here.client.stream("GET", "/v1/events", params={"after": "0"}, headers=headers) as answer,
    ):
        async for chunk in answer.aiter_bytes():
            *messages, rest = (rest + chunk).split(b"\n\n")
            for message in messages:
                fields = dict(line.split(b": ", 1) for line in message.split(b"\n"))
                if b"data" in fields:
                    event = json.loads(fields[b"data"])
                    assert (fields[b"id"].decode(), fields[b"event"].decode()) == (
                        event["sequence"],
                        event["type"],
                    )
                    found[event["id"]] = fields[b"data"]
            if len(found) >= count:
                break
    return found
