"""The console's pages of tasks, deliveries and endpoints, in a browser without scripts."""

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from html import unescape

import httpx
import pytest
from sqlalchemy import Engine
from sqlalchemy import event as statements
from starlette.responses import Response

from service.db.tables import tasks as task_table
from service.db.transaction import Transaction
from service.events import replays as pipeline
from service.queue import worker
from service.signing import hash_api_key
from service.web.sessions import COOKIE
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, Subscriber, World, subscriber, world

pytestmark = pytest.mark.slow
HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}</title><script>alert(2)</script>'
MOST_BYTES, MOST_STATEMENTS = 100_000, 40


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(pipeline, "EVERY_MS", 20)
        yield


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("pages"), delivery_schedule=(0.05,)) as made:
        yield made


@pytest.fixture
async def shop() -> AsyncIterator[Subscriber]:
    async with subscriber() as made:
        made.answer = lambda _n, _request: Response(HOSTILE, 503)
        yield made


class Visitor:
    """A browser without scripts: it follows links and sends forms."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client, self.csrf = client, ""

    async def get(self, path: str, status: int = 200) -> str:
        answer = await self.client.get(path)
        assert answer.status_code == status, answer.text
        assert "<img src=x" not in answer.text
        assert "<script>alert" not in answer.text
        assert ">49<" not in answer.text
        assert len(answer.content) <= MOST_BYTES
        if found := re.search('name="csrf" (?:value|content)="([^"]+)"', answer.text):
            self.csrf = found[1]
        return unescape(answer.text)

    async def post(self, path: str, status: int = 200, **fields: str) -> str:
        answer = await self.client.post(path, data={"csrf": self.csrf, **fields})
        assert answer.status_code == status, answer.text
        return unescape(answer.text)


@pytest.fixture(scope="module")
async def visitor(here: World) -> AsyncIterator[Visitor]:
    sessions = here.context.access.sessions
    assert sessions is not None
    _, header = sessions.start(hash_api_key(ADMIN_KEY))
    cookies = {COOKIE: header.partition(";")[0].partition("=")[2]}
    made = httpx.AsyncClient(
        base_url=here.url, cookies=cookies, follow_redirects=True, headers={"origin": here.url}
    )
    async with made as client:
        yield Visitor(client)


async def test_the_list_of_tasks_has_every_filter_in_its_url(here: World, visitor: Visitor) -> None:
    order = {"order": HOSTILE}
    found = await here.submit(prompt=f"a lighthouse {HOSTILE}", metadata=order)
    other = await here.submit(prompt="a harbour")
    for id in (found["id"], other["id"]):
        await here.ended(id)
    page = await visitor.get("/console/tasks")
    assert found["id"] in page
    assert other["id"] in page
    one = "/console/tasks?prompt=LIGHTHOUSE&state=completed&model=wan2.5-text-to-image&owner=admin"
    page = await visitor.get(one)
    assert found["id"] in page
    assert other["id"] not in page
    for none in (
        "error=nothing",
        "since=2099-01-01T00:00",
        "until=2001-01-01T00:00",
        "state=failed",
    ):
        assert "No task matches" in await visitor.get(f"/console/tasks?{none}")
    query = httpx.QueryParams({"key": "order", "value": HOSTILE})
    page = await visitor.get(f"/console/tasks?{query}")
    assert found["id"] in page
    assert other["id"] not in page
    await visitor.get("/console/tasks?state=lost", 400)


async def test_a_task_shows_its_timeline_callbacks_deliveries_and_ledger(
    here: World, visitor: Visitor
) -> None:
    task = await here.submit(prompt=HOSTILE, metadata={HOSTILE[:20]: HOSTILE})
    await here.ended(task["id"])
    page = await visitor.get(f"/console/tasks/{task['id']}")
    for part in ("task.queued", "task.submitted", "callback.received", "event.emitted"):
        assert part in page
    assert 'class="timeline"' in page
    assert "The task is completed. It can become nothing else." in page
    assert "charge" in page
    assert '"status": "completed"' in page  # the raw body of the callback
    await visitor.get("/console/tasks/task_unknown", 404)


async def test_two_callbacks_that_contradict_each_other_are_compared(
    here: World, visitor: Visitor
) -> None:
    task = await here.submit()
    await here.ended(task["id"])
    upstream_id = (await here.task(task["id"]))["upstream_id"]
    body = {"id": upstream_id, "status": "failed", "error": {"code": "x", "message": HOSTILE}}
    body |= {"object": "image.generation.task", "type": "image", "progress": 100, "created": 1}
    await here.stranger.post(here.callback_url(task["id"]), json=body)
    page = await visitor.get(f"/console/tasks/{task['id']}")
    assert "Contradiction" in page
    assert '<ins class="text">"failed"</ins>' in page
    assert '<del class="text">"completed"</del>' in page


async def test_each_act_on_a_task_asks_first_and_says_what_will_happen(
    here: World, visitor: Visitor
) -> None:
    task = await here.submit()
    path = f"/console/tasks/{task['id']}"
    await here.ended(task["id"])
    assert "costs no credits" in await visitor.get(f"{path}/reconcile")
    assert "The upstream is asked now." in await visitor.post(f"{path}/reconcile")
    assert "cancel" in await visitor.post(f"{path}/cancel", 409)
    assert "Submit it again" in await visitor.get(f"{path}/resolve")
    await visitor.post(f"{path}/resolve", 409, outcome="failed")
    assert "deleted for good" in await visitor.get(f"{path}/erase")
    assert (await here.task(task["id"]))["erased_at"] is None
    assert "The task is erased." in await visitor.post(f"{path}/erase")
    assert (await here.task(task["id"]))["erased_at"] is not None
    await visitor.get(f"{path}/explode", 404)


async def test_an_endpoint_is_created_tested_paused_rotated_and_deleted(
    here: World, visitor: Visitor, shop: Subscriber
) -> None:
    new = "/console/endpoints/new"
    await visitor.get(new)
    page = await visitor.post(new, 400, url="ftp://x", types="*")
    assert 'aria-invalid="true"' in page
    page = await visitor.post(
        new, 201, url=f"{shop.url}/a", types="task.parked", description=HOSTILE
    )
    assert page.count("whsec_") >= 1
    found = re.search("/console/(endpoints/ep_[a-z0-9]+)", page)
    assert found
    path = f"/console/{found[1]}"
    page = await visitor.get(path)
    assert "whsec_" not in page
    await visitor.get("/console/endpoints")
    assert "editable" not in await visitor.get(f"{path}/test")
    sample = json.dumps({"hello": HOSTILE})
    page = await visitor.post(f"{path}/test", type="image.task.failed", data=sample)
    assert "answered 503" in page
    assert json.loads(shop.received[-1].body)["data"] == {"hello": HOSTILE}
    assert "no JSON" in await visitor.post(f"{path}/test", 400, type="endpoint.test", data="{")
    assert "Nothing is lost" in await visitor.get(f"{path}/pause")
    assert "is paused" in await visitor.post(f"{path}/pause")
    assert "is enabled" in await visitor.post(f"{path}/enable")
    assert "whsec_" in await visitor.post(f"{path}/rotate")
    api = f"/v1/{found[1]}"
    await here.client.patch(api, json={"status": "disabled"})
    await emitted(here.context.resources.store, 2, "task.parked")
    page = await visitor.post(f"{path}/enable")
    assert "Send 2 missed events" in page
    since = re.search('name="since" value="([^"]+)"', page)
    assert since
    assert "2 missed events are sent." in await visitor.post(f"{path}/missed", since=since[1])
    assert "is deleted" in await visitor.post(f"{path}/delete")
    await visitor.get(path, 404)


async def test_failures_are_grouped_and_all_that_match_are_sent_again(
    here: World, visitor: Visitor, shop: Subscriber
) -> None:
    """The button has the count. The replay is an object with progress."""
    body = {"url": f"{shop.url}/b", "types": ["image.task.failed"]}
    endpoint = (await here.client.post("/v1/endpoints", json=body)).json()["id"]
    await emitted(here.context.resources.store, 3, "image.task.failed", "admin")
    query = {"endpoint": endpoint, "state": "dead"}

    async def dead() -> bool:
        found = (await here.client.get("/v1/deliveries", params=query)).json()["data"]
        return len(found) == 3

    await wait_until(dead)
    page = await visitor.get(f"/console/deliveries?endpoint={endpoint}&error=answered+503")
    assert "Send 3 failed again" in page
    assert f"error=answered+503&endpoint={endpoint}" in page
    id = re.findall("dlv_[a-z2-7]{26}", page)[0]
    page = await visitor.get(f"/console/deliveries/{id}")
    assert "curl -X POST" in page
    assert "webhook-signature: v1," in page
    assert "Sent <time" in page
    assert "The attempt failed: answered 503" in await visitor.post(
        f"/console/deliveries/{id}/retry"
    )
    shop.answer = lambda _n, _request: Response(status_code=204)
    new = "/console/deliveries/replays/new"
    assert "Send 3 failed deliveries again?" in await visitor.get(f"{new}?endpoint={endpoint}")
    page = await visitor.post(new, endpoint=endpoint)
    assert "3 deliveries are sent again." in page
    found = re.search("rpl_[a-z2-7]{26}", page)
    assert found
    path = f"/console/deliveries/replays/{found[0]}"

    async def delivered() -> bool:
        shown = (await here.client.get(f"/v1/replays/{found[0]}")).json()
        return bool(shown["delivered"] == 3)

    await wait_until(delivered)
    assert "data-poll" not in await visitor.get(path)
    assert "is cancelled" in await visitor.post(f"{path}/cancel")
    assert "Delivered: the endpoint answered 204." in await visitor.post(
        f"/console/deliveries/{id}/retry"
    )


def many_tasks(tx: Transaction, counts: Sequence[int]) -> list[None]:
    """Copies of the newest task, with hostile prompts of their own."""
    row = dict(tx.connection.execute(task_table.select().limit(1)).mappings().one())
    rows = [
        row
        | {"id": f"task_{number:026d}", "upstream_id": f"task-unified-{number}"}
        | {"idempotency_key": None, "prompt": f"{HOSTILE} {number}" * 20}
        | {"submit_due_at": None, "settle_due_at": None}
        for number in range(counts[0])
    ]
    tx.connection.execute(task_table.insert(), rows)
    return [None]


async def test_pages_stay_small_with_five_thousand_tasks(here: World, visitor: Visitor) -> None:
    """At most 100 KB and a fixed number of statements."""
    await here.ended((await here.submit())["id"])
    await here.context.resources.store.write(many_tasks, 5000)
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        seen.append(statement)

    statements.listen(Engine, "before_cursor_execute", note)
    try:
        for path in ("/console/tasks", "/console/deliveries", "/console/endpoints"):
            seen.clear()
            await visitor.get(path)
            assert len([each for each in seen if each.startswith("SELECT")]) <= MOST_STATEMENTS
    finally:
        statements.remove(Engine, "before_cursor_execute", note)
