"""Deliveries over real sockets: they are signed, retried, recorded, and sent only to their
addressee.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import standardwebhooks
from starlette.responses import RedirectResponse, Response
from structlog.testing import capture_logs

from service import app
from service.app import stages
from service.db.tables import endpoints
from service.db.transaction import Lease, Transaction
from service.events.deliveries import DeliveryOutcome
from service.events.delivery_worker import DeliveryWorker
from service.events.outbox import DeliveryToSend
from service.events.secrets import valid_secrets
from service.images.validator import ImageValidator
from tests.upstream import After, nth
from tests.waiting import wait_until
from tests.world import TEXT_TO_IMAGE, Received, Subscriber, World, subscriber, world

pytestmark = pytest.mark.usefixtures("quick_workers")

JSON = dict[str, Any]
Line = Mapping[str, Any]
DONE = Response(status_code=204)
BROKEN = Response("out of order", 500)
FAIL = {"fail": "service_error"}  # a task that ends without images is quick


@dataclass(slots=True)
class Takers:
    """A subscriber with a path for each test. `answers` lists the answers by path, one per request,
    and the last repeats. The default is 204.
    """

    subscriber: Subscriber
    answers: dict[str, list[Response]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)

    def answer(self, _: int, request: Received) -> Response:
        self.asked[request.path] += 1
        return nth(self.answers.get(request.path), self.asked[request.path] - 1) or DONE

    def url(self, path: str, *answers: Response) -> str:
        self.answers[path] = list(answers)
        return self.subscriber.url + path

    def got(self, path: str) -> list[Received]:
        return [request for request in self.subscriber.received if request.path == path]


@pytest.fixture(scope="module")
async def takers() -> AsyncIterator[Takers]:
    async with subscriber() as made:
        takers = Takers(made)
        made.answer = takers.answer
        yield takers


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("delivery")) as made:
        yield made


@dataclass(slots=True)
class Owner:
    """An owner with tasks and endpoints of its own. `secret` is the owner's callback secret."""

    name: str
    client: httpx.AsyncClient
    secret: str

    async def subscribe(self, url: str, *types: str) -> JSON:
        answer = await self.client.post(
            "/v1/endpoints", json={"url": url, "types": types or ["image.task.*"]}
        )
        assert answer.status_code == 201, answer.text
        made: JSON = answer.json()
        return made

    async def submit(self, **fields: Any) -> JSON:
        body = {
            "model": TEXT_TO_IMAGE,
            "prompt": "a lighthouse",
            "size": "768x768",
            "sandbox": FAIL,
            **fields,
        }
        answer = await self.client.post(
            "/v1/images/generations", json=body, headers={"prefer": "wait=20"}
        )
        assert answer.status_code == 200, answer.text
        task: JSON = answer.json()
        return task

    async def get(self, path: str, **query: str) -> JSON:
        answer = await self.client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        found: JSON = answer.json()
        return found

    async def deliveries(self, **query: str) -> list[JSON]:
        found: list[JSON] = (await self.get("/v1/deliveries", **query))["data"]
        return found[::-1]

    async def finished(self, count: int = 1, **query: str) -> list[JSON]:
        """Waits until `count` deliveries have ended, and returns them oldest first."""

        async def look() -> list[JSON] | None:
            found = [
                delivery
                for delivery in await self.deliveries(**query)
                if delivery["state"] != "pending"
            ]
            return found if len(found) >= count else None

        found: list[JSON] = await wait_until(look)
        return found


@asynccontextmanager
async def owner(here: World, name: str) -> AsyncIterator[Owner]:
    body = {"owner": name, "scopes": ["submit", "read", "subscribe"]}
    made = (await here.client.post("/v1/keys", json=body)).json()
    async with here.with_key(made["key"]) as client:
        yield Owner(name, client, made["callback_secret"])


@pytest.fixture
async def somebody(here: World, request: pytest.FixtureRequest) -> AsyncIterator[Owner]:
    name = "".join(char if char.isalnum() else "-" for char in request.node.name)
    async with owner(here, name[-60:].strip("-")) as made:
        yield made


def verify(secret: str, request: Received) -> Any:
    """Parses a delivery. Both libraries raise an error unless its signature is right."""
    import svix.webhooks  # which takes half a second

    headers = dict(request.headers)
    svix.webhooks.Webhook(secret).verify(request.body, headers)
    return standardwebhooks.Webhook(secret).verify(request.body, headers)


async def test_an_event_is_delivered_signed_as_the_standard_says(
    somebody: Owner, takers: Takers
) -> None:
    """The libraries of Standard Webhooks and Svix accept the signature. The body is the event from
    the outbox.
    """
    endpoint = await somebody.subscribe(takers.url("/signed"))
    task = await somebody.submit(sandbox={}, prompt="一只猫", metadata={"order": "七"})
    first, last = await somebody.finished(2, endpoint=endpoint["id"])
    assert (first["state"], last["state"], last["task"]) == ("delivered", "delivered", task["id"])
    requests = {request.headers["webhook-id"]: request for request in takers.got("/signed")}
    for event in (await somebody.get("/v1/events"))["data"]:
        request = requests[event["id"]]
        assert verify(endpoint["secret"], request) == event
        assert request.headers["content-type"] == "application/cloudevents+json"
        assert request.headers["user-agent"].startswith("Darkroom/")
    completed = json.loads(requests[last["event"]].body)
    assert completed["data"]["images"][0]["url"] in completed["data"]["results"]
    assert completed["data"]["metadata"] == {"order": "七"}
    assert "prompt" not in completed["data"]
    assert len(requests) == len(takers.got("/signed")) == 2


async def test_a_failed_attempt_is_repeated_by_schedule_and_recorded(
    here: World, somebody: Owner, takers: Takers
) -> None:
    """Each attempt sends the same id and bytes. The list has its time, status, duration and error,
    and for admins the answer.
    """
    endpoint = await somebody.subscribe(
        takers.url("/retried", BROKEN, BROKEN, DONE), "image.task.failed"
    )
    task = await somebody.submit()
    (delivery,) = await somebody.finished(task=task["id"])
    assert (delivery["state"], delivery["endpoint"], delivery["next_attempt_at"]) == (
        "delivered",
        endpoint["id"],
        None,
    )
    tried = delivery["attempts"]
    assert [(each["status"], each["error"]) for each in tried] == [
        (500, "answered 500"),
        (500, "answered 500"),
        (204, None),
    ]
    assert all(each["duration_ms"] >= 0 and each["answer"] is None for each in tried)
    times = [datetime.fromisoformat(each["time"]) for each in tried]
    assert all(late - early >= timedelta(seconds=0.05) for early, late in pairwise(times))
    requests = takers.got("/retried")
    assert len({(request.headers["webhook-id"], request.body) for request in requests}) == 1
    assert [verify(endpoint["secret"], request)["id"] for request in requests] == [
        delivery["event"]
    ] * 3
    shown = (await here.client.get(f"/v1/deliveries/{delivery['id']}")).json()
    assert [each["answer"] for each in shown["attempts"]] == ["out of order", "out of order", ""]
    timeline = (await somebody.get(f"/v1/tasks/{task['id']}/timeline"))["data"]
    assert [step["status"] for step in timeline if step["step"] == "delivery.attempted"] == [
        500,
        500,
        204,
    ]


def exhausted_lines(lines: Sequence[Line], count: int) -> list[Line] | None:
    """These log lines, which come after the commits, as soon as there are so many."""
    found = [line for line in lines if line["event"] == "delivery.exhausted"]
    return found if len(found) >= count else None


async def test_after_the_last_retry_a_delivery_is_dead(
    here: World, somebody: Owner, takers: Takers
) -> None:
    """The dead delivery stays in the list, and operators get `delivery.exhausted`. A dead delivery
    of that event raises no further event.
    """
    wanted = {"url": takers.url("/watching", BROKEN), "types": ["delivery.*"], "owner": None}
    watching = await here.client.post("/v1/endpoints", json=wanted)
    endpoint = await somebody.subscribe(takers.url("/dead", BROKEN), "image.task.failed")
    with capture_logs() as lines:
        task = await somebody.submit()
        (delivery,) = await somebody.finished(task=task["id"])
        assert (delivery["state"], len(delivery["attempts"])) == ("dead", 3)

        async def watched() -> Any:
            found = (
                await here.client.get(
                    "/v1/deliveries", params={"endpoint": watching.json()["id"], "state": "dead"}
                )
            ).json()["data"]
            return [each for each in found if each["task"] == task["id"]]

        (unheard,) = await wait_until(watched)
        logged = await wait_until(lambda: exhausted_lines(lines, 2))
    assert len(unheard["attempts"]) == 3
    exhausted = [
        event["data"] for event in await here.events(task=task["id"], type="delivery.exhausted")
    ]
    told = {
        "delivery_id": delivery["id"],
        "endpoint_id": endpoint["id"],
        "event_id": delivery["event"],
        "task_id": task["id"],
    }
    assert exhausted == [told]
    assert [(line["attempt"], line["endpoint_id"]) for line in logged] == [
        (3, endpoint["id"]),
        (3, watching.json()["id"]),
    ]
    await here.client.delete(f"/v1/endpoints/{watching.json()['id']}")


async def test_a_redirect_is_a_failure(somebody: Owner, takers: Takers) -> None:
    """The service does not follow a 3xx, so the signed body reaches no other server."""
    await somebody.subscribe(
        takers.url("/moved", RedirectResponse(takers.url("/target"))), "image.task.failed"
    )
    task = await somebody.submit()
    (delivery,) = await somebody.finished(task=task["id"])
    assert [each["status"] for each in delivery["attempts"]] == [307, 307, 307]
    assert takers.got("/target") == []


async def test_no_answer_is_an_attempt_without_a_status(somebody: Owner) -> None:
    """No server listens at the address. The attempt has the reason, and it counts."""
    await somebody.subscribe("http://127.0.0.1:9/nobody", "image.task.failed")
    task = await somebody.submit()
    (delivery,) = await somebody.finished(task=task["id"])
    assert delivery["state"] == "dead"
    assert {each["status"] for each in delivery["attempts"]} == {None}
    assert all(each["error"].startswith("NotConnected: 127.0.0.1") for each in delivery["attempts"])


async def test_gone_disables_the_endpoint(here: World, somebody: Owner, takers: Takers) -> None:
    """After a 410 there is no further attempt, pending deliveries are dead, no new ones are
    created, and operators get an event.
    """
    endpoint = await somebody.subscribe(takers.url("/gone", Response(status_code=410)))
    with capture_logs() as lines:
        task = await somebody.submit()

        async def disabled() -> JSON | None:
            shown = await somebody.get(f"/v1/endpoints/{endpoint['id']}")
            return shown if shown["status"] == "disabled" else None

        shown = await wait_until(disabled)
        told = ("endpoint.disabled", endpoint["id"])
        await wait_until(
            lambda: told in [(line["event"], line.get("endpoint_id")) for line in lines]
        )
    assert shown["disabled_reason"] == "the endpoint answered 410 Gone"
    assert shown["disabled_at"]
    assert {delivery["state"] for delivery in await somebody.finished(endpoint=endpoint["id"])} == {
        "dead"
    }
    events = [event["data"] for event in await here.events(type="endpoint.disabled")]
    assert endpoint["id"] in [data["endpoint_id"] for data in events]
    before = len(await somebody.deliveries())
    assert (await somebody.submit())["state"] == task["state"] == "failed"
    assert len(await somebody.deliveries()) == before


@pytest.mark.parametrize(("status", "form"), [(429, "seconds"), (503, "date")])
async def test_an_endpoint_that_asks_for_peace_gets_it(
    status: int, form: str, here: World, somebody: Owner, takers: Takers
) -> None:
    """`Retry-After` on 429 and 503 pauses the whole endpoint. The failed delivery and all pending
    ones wait, and no attempt is used up.
    """
    asked = (
        "600"
        if form == "seconds"
        else format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True)
    )
    path = f"/peace-{status}"
    endpoint = await somebody.subscribe(
        takers.url(path, Response(status_code=status, headers={"retry-after": asked})),
        "image.task.failed",
    )
    first = await somebody.submit()

    async def tried() -> Any:
        found = await somebody.deliveries(task=first["id"])
        return found and found[0]["attempts"]

    await wait_until(tried)
    second = await somebody.submit()

    async def snoozed() -> Any:
        (delivery,) = await somebody.deliveries(task=second["id"])
        due = datetime.fromisoformat(delivery["next_attempt_at"])
        return due > datetime.now(UTC) + timedelta(seconds=500) and delivery

    waiting = await wait_until(snoozed)
    assert waiting["attempts"] == []
    (failed,) = await somebody.deliveries(task=first["id"])
    wait = datetime.fromisoformat(failed["next_attempt_at"]) - datetime.fromisoformat(
        failed["attempts"][0]["time"]
    )
    assert timedelta(seconds=560) < wait <= timedelta(seconds=601)
    assert len(takers.got(path)) == 1
    await here.client.delete(f"/v1/endpoints/{endpoint['id']}")


async def test_a_paused_endpoint_holds_its_deliveries(somebody: Owner, takers: Takers) -> None:
    """A paused endpoint gets nothing. Once enabled, it gets everything, with the full retry
    schedule.
    """
    endpoint = await somebody.subscribe(takers.url("/paused"), "image.task.failed")
    assert (
        await somebody.client.patch(f"/v1/endpoints/{endpoint['id']}", json={"status": "paused"})
    ).json()["status"] == "paused"
    tasks = [await somebody.submit() for _ in range(2)]

    async def held() -> bool:
        found = await somebody.deliveries(endpoint=endpoint["id"])
        return [(each["state"], each["next_attempt_at"], each["attempts"]) for each in found] == [
            ("pending", None, [])
        ] * 2

    await wait_until(held)
    assert takers.got("/paused") == []
    await somebody.client.patch(f"/v1/endpoints/{endpoint['id']}", json={"status": "enabled"})
    found = await somebody.finished(2, endpoint=endpoint["id"])
    assert [(each["state"], each["task"], len(each["attempts"])) for each in found] == [
        ("delivered", task["id"], 1) for task in tasks
    ]


async def test_a_tasks_own_callback_url_gets_the_terminal_task(
    somebody: Owner, takers: Takers
) -> None:
    """One delivery sends the task itself as application/json, signed with the owner's callback
    secret. It is retried like any other.
    """
    task = await somebody.submit(
        callback_url=takers.url("/own", BROKEN, DONE), metadata={"order": "7"}
    )
    (delivery,) = await somebody.finished(task=task["id"])
    assert (delivery["state"], delivery["endpoint"], len(delivery["attempts"])) == (
        "delivered",
        None,
        2,
    )
    first, second = takers.got("/own")
    sent = verify(somebody.secret, second)
    only_shown = {"prompt", "data", "quarantine", "held"}
    assert sent == {name: value for name, value in task.items() if name not in only_shown}
    assert second.headers["content-type"] == "application/json"
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == delivery["event"]
    assert first.body == second.body


async def test_operators_events_go_to_operators_alone(
    here: World, somebody: Owner, takers: Takers
) -> None:
    """An owner that subscribes to every type gets only the events of its own tasks. An admin's
    endpoint for all owners gets the operators' events too.
    """
    every = await here.client.post(
        "/v1/endpoints", json={"url": takers.url("/operators"), "types": ["*"], "owner": None}
    )
    await somebody.subscribe(takers.url("/curious"), "*")
    task = await somebody.submit(sandbox={"contradict": True, **FAIL})

    def types(path: str) -> list[str]:
        bodies = [json.loads(request.body) for request in takers.got(path)]
        return sorted(body["type"] for body in bodies if body["subject"] == task["id"])

    await wait_until(lambda: len(types("/operators")) == 3)
    assert types("/operators") == ["callback.conflict", "image.task.failed", "image.task.submitted"]
    await wait_until(lambda: len(types("/curious")) == 2)
    async with owner(here, "stranger") as stranger:
        await stranger.subscribe(takers.url("/stranger"), "*")
        await somebody.submit()
        mine = await stranger.submit()
        await stranger.finished(2, task=mine["id"])
    assert {json.loads(request.body)["data"]["id"] for request in takers.got("/stranger")} == {
        mine["id"]
    }
    assert types("/curious") == ["image.task.failed", "image.task.submitted"]
    await here.client.delete(f"/v1/endpoints/{every.json()['id']}")


@pytest.mark.slow
async def test_retries_never_delay_first_attempts(
    tmp_path: Path, takers: Takers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retries that hang in all retry slots leave the slots of first attempts free."""
    monkeypatch.setattr(app, "REDELIVERIES", 1)
    monkeypatch.setattr(app, "DELIVERIES", 1)
    released = asyncio.Event()
    async with world(tmp_path) as here, owner(here, "patient") as somebody:
        await somebody.subscribe(
            takers.url("/hanging", BROKEN, After(released.wait, DONE)), "image.task.cancelled"
        )
        await somebody.subscribe(takers.url("/prompt"), "image.task.failed")
        first = await somebody.submit(sandbox={"cancel": "status"})
        await wait_until(lambda: len(takers.got("/hanging")) == 2)
        second = await somebody.submit()
        assert [each["state"] for each in await somebody.finished(task=second["id"])] == [
            "delivered"
        ]
        assert [each["state"] for each in await somebody.deliveries(task=first["id"])] == [
            "pending"
        ]
        released.set()
        assert [each["state"] for each in await somebody.finished(task=first["id"])] == [
            "delivered"
        ]


async def test_an_attempt_under_a_lease_that_ended_is_recorded_and_decides_nothing(
    here: World, somebody: Owner, takers: Takers
) -> None:
    """Delivery is at least once. The worker sent the request after its lease had expired, so the
    attempt is listed. The next lease decides the state.
    """
    endpoint = await somebody.subscribe(takers.url("/twice"), "image.task.failed")
    await somebody.client.patch(f"/v1/endpoints/{endpoint['id']}", json={"status": "paused"})
    task = await somebody.submit()

    async def held() -> Any:
        found = await somebody.deliveries(task=task["id"])
        return found and found[0]["next_attempt_at"] is None and found[0]

    delivery = await wait_until(held)
    await here.context.resources.store.write(enable_quietly, endpoint["id"])
    work = stages(
        here.settings, here.context.resources, here.context.breaker, ImageValidator(1, 1, 1)
    )
    assert {stage.name for stage in work if stage.rows is not None} == {"settle", "download"}
    deliver = next(stage for stage in work if stage.name == "deliver")
    with capture_logs() as lines:
        await deliver.run(Lease("deliver", delivery["id"], 99, 1))
    mine = [line for line in lines if line.get("endpoint_id") == endpoint["id"]]
    assert [line["result"] for line in mine if line["event"] == "delivery.attempted"] == [
        "superseded"
    ]
    (after,) = await somebody.deliveries(task=task["id"])
    assert (after["state"], [each["status"] for each in after["attempts"]]) == ("pending", [204])


def enable_quietly(tx: Transaction, ids: Sequence[str]) -> list[None]:
    """A store operation that enables the endpoints and leaves their held deliveries held."""
    for endpoint_id in ids:
        tx.change(endpoints, endpoint_id, {"status": "enabled"})
    return [None] * len(ids)


async def test_a_delivery_that_cannot_be_sent_is_dead_without_an_attempt(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint is deleted or disabled, or the owner has no secret to sign with."""
    monkeypatch.setattr(here.context.resources.store, "clock", lambda: 1_000_000)
    worker, lease = (
        DeliveryWorker(here.context.sender, (1.0,), 1.0),
        Lease("deliver", "dlv_x", 1, 1),
    )
    dead, held = DeliveryOutcome(lease, "dead"), DeliveryOutcome(lease, "held")
    own = DeliveryToSend(
        "dlv_x", "painter", None, "task_x", "pending", "https://x.test", b"", None, None, {}
    )

    def endpoint(status: str, paused_until: int | None = None) -> DeliveryToSend:
        return replace(own, endpoint_id="ep_x", endpoint_status=status, paused_until=paused_until)

    decide = worker._without_request
    assert decide(lease, replace(own, url=None, secret=None)) == dead
    assert decide(lease, replace(own, secret=None)) == dead
    assert decide(lease, own) is None
    assert decide(lease, endpoint("disabled")) == dead
    assert decide(lease, endpoint("paused")) == held
    assert decide(lease, endpoint("enabled")) is None
    assert decide(lease, endpoint("enabled", 999_999)) is None
    assert decide(lease, endpoint("enabled", 1_000_500)) == DeliveryOutcome(
        lease, "snooze", wait_ms=500
    )


def test_a_secret_signs_until_its_overlap_ends() -> None:
    """The newest secret has no end. An older one signs until its overlap ends."""
    assert valid_secrets(json.dumps([("whsec_a", None), ("whsec_b", None)]), 5) == [
        "whsec_a",
        "whsec_b",
    ]
    kept = json.dumps([["whsec_new", None], ["whsec_old", 1000]])
    assert valid_secrets(kept, 999) == ["whsec_new", "whsec_old"]
    assert valid_secrets(kept, 1000) == ["whsec_new"]
