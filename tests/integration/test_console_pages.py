"""The console's pages of tasks, deliveries and endpoints, in a browser without scripts."""

import json
import re
from collections.abc import AsyncIterator, Sequence
from html import unescape
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy import event as statements
from starlette.responses import Response

from service.db.operator_tables import ledger
from service.db.tables import images as image_table
from service.db.tables import tasks as task_table
from service.db.transaction import Transaction
from service.events.endpoints import EndpointChange, change_endpoints, endpoint_row
from service.queue import worker
from service.signing import hash_api_key
from service.web.sessions import COOKIE
from tests.callbacks import verdict
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, JSON, Subscriber, World

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_replays")]
SETTINGS = {"delivery_schedule": (0.05,)}
HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}</title><script>alert(2)</script>'
MOST_BYTES, MOST_STATEMENTS = 100_000, 60


@pytest.fixture
def shop(shop: Subscriber) -> Subscriber:
    shop.answer = lambda _n, _request: Response(HOSTILE, 503)
    return shop


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
        "state=failed&prompt=a+harbour",  # other tests of this file leave failed tasks
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
    assert await verdict(here, task, json.dumps(body).encode()) == "conflict"
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


async def in_state(here: World, task: JSON, state: str) -> bool:
    return bool((await here.task(task["id"]))["state"] == state)


async def test_a_running_task_is_cancelled(here: World, visitor: Visitor) -> None:
    task = await here.submit(sandbox={"delay": 600})
    await wait_until(lambda: in_state(here, task, "submitted"))
    path = f"/console/tasks/{task['id']}"
    page = await visitor.get(path)
    assert f'href="{path}/cancel"' in page
    assert f'href="{path}/erase"' not in page
    page = await visitor.get(f"{path}/cancel")
    assert "Subscribers get image.task.cancelled." in " ".join(page.split())
    assert await in_state(here, task, "submitted")
    assert "The task is cancelled." in await visitor.post(f"{path}/cancel")
    assert (await here.task(task["id"]))["state"] == "cancelled"


async def made_upstream(here: World, task: JSON) -> bool:
    """Whether the upstream has completed the task, so that one query is enough."""
    id = (await here.task(task["id"]))["upstream_id"]
    listed = (await here.sandbox.get("/sandbox/tasks")).json()["data"]
    return any(each["id"] == id and each["status"] == "completed" for each in listed)


@pytest.mark.parametrize(
    ("outcome", "state"), [("failed", "failed"), ("id", "completed"), ("resubmit", "completed")]
)
async def test_a_submission_of_unknown_outcome_is_resolved(
    here: World, visitor: Visitor, outcome: str, state: str
) -> None:
    """As failed, with the id that the upstream shows, or by another submission."""

    async def named() -> bool:
        return (await here.task(task["id"]))["upstream_id"] is not None

    lost = {"lose_answer": True, "drop_callback": True}
    task = await here.submit(prompt=f"lost, {outcome}", sandbox=lost)
    await wait_until(lambda: in_state(here, task, "uncertain"))
    path = f"/console/tasks/{task['id']}"
    assert f'href="{path}/resolve"' in await visitor.get(path)
    upstream_id = ""
    if outcome == "id":
        upstream_id = (await here.sandbox.get("/sandbox/tasks")).json()["data"][-1]["id"]
        assert "upstream" in await visitor.post(f"{path}/resolve", 400, outcome="id")
    page = await visitor.post(f"{path}/resolve", outcome=outcome, upstream_id=upstream_id)
    assert "The submission is settled." in page
    if state != "failed":
        await wait_until(named)
        await wait_until(lambda: made_upstream(here, task))
        await visitor.post(f"{path}/reconcile", 200)
    assert (await here.ended(task["id"]))["state"] == state


async def test_an_endpoint_is_edited(here: World, visitor: Visitor) -> None:
    """A wrong address stands at its field, with what was typed. The secret stays."""
    body = {"url": "http://127.0.0.1:1/old", "types": ["task.parked"]}
    made = (await here.client.post("/v1/endpoints", json=body)).json()
    path = f"/console/endpoints/{made['id']}"
    page = await visitor.get(f"{path}/edit")
    assert 'value="http://127.0.0.1:1/old"' in page
    assert 'value="task.parked"' in page
    page = await visitor.post(f"{path}/edit", 400, url="ftp://x", types="task.parked")
    assert re.search('value="ftp://x"[^>]* aria-invalid="true"', page)
    page = await visitor.post(
        f"{path}/edit",
        url="http://127.0.0.1:1/new",
        types="task.parked, image.task.*",
        description="d",
    )
    assert "The endpoint is changed." in page
    shown = (await here.client.get(f"/v1/endpoints/{made['id']}")).json()
    assert (shown["url"], shown["types"]) == (
        "http://127.0.0.1:1/new",
        ["task.parked", "image.task.*"],
    )


async def test_an_edit_keeps_headers_that_no_key_decrypts(here: World, visitor: Visitor) -> None:
    """The page says so, and headers that are typed replace them."""
    body = {"url": "http://127.0.0.1:1/old", "headers": {"X-Env": "prod"}}
    made = (await here.client.post("/v1/endpoints", json=body)).json()
    path, store = f"/console/endpoints/{made['id']}", here.context.resources.store
    await store.write(change_endpoints, EndpointChange(made["id"], None, headers=b"of a lost key"))
    assert (await here.client.get(f"/v1/endpoints/{made['id']}")).json()["headers"] is None
    assert "They are kept unless" in await visitor.get(f"{path}/edit")
    plain: dict[str, Any] = {"url": "http://127.0.0.1:1/new", "types": "image.task.*"}
    assert "No key of DARKROOM_SECRET_KEY" in await visitor.post(f"{path}/edit", **plain)
    row = await store.read(endpoint_row, made["id"], None)
    assert row is not None
    assert (row["url"], row["headers"]) == (plain["url"], b"of a lost key")
    await visitor.post(f"{path}/edit", headers="X-Env=test", **plain)
    assert "They are kept unless" not in await visitor.get(f"{path}/edit")
    shown = (await here.client.get(f"/v1/endpoints/{made['id']}")).json()
    assert shown["headers"] == {"X-Env": "test"}


async def test_an_endpoint_is_created_tested_paused_rotated_and_deleted(
    here: World, visitor: Visitor, shop: Subscriber
) -> None:
    new = "/console/endpoints/new"
    await visitor.get(new)
    page = await visitor.post(new, 400, url="ftp://x", types="*")
    assert 'aria-invalid="true"' in page
    page = await visitor.post(new, 400, url=f"{shop.url}/a", headers="host=x", rate_per_s="1")
    assert "is reserved" in page
    assert 'value="1"' in page
    options = {
        "ordered": "on",
        "ordered_by": "user",
        "metadata": "shop=a=b\nkind=c",
        "headers": "X-Env=prod",
        "rate_per_s": "2.5",
    }
    page = await visitor.post(
        new, 201, url=f"{shop.url}/a", types="task.parked", description=HOSTILE, **options
    )
    assert page.count("whsec_") >= 1
    found = re.search("/console/(endpoints/ep_[a-z0-9]+)", page)
    assert found
    path = f"/console/{found[1]}"
    page = await visitor.get(path)
    assert "whsec_" not in page
    for shown in ("by user", "shop=a=b", "kind=c", "X-Env", "2.5 a second"):
        assert shown in page
    page = await visitor.get(f"{path}/edit")
    for shown in ("checked", "shop=a=b\nkind=c", "X-Env=prod", 'value="2.5"'):
        assert shown in page
    plain: dict[str, Any] = {"url": f"{shop.url}/a", "types": "task.parked", "description": HOSTILE}
    assert "X-Env" not in await visitor.post(f"{path}/edit", **plain)
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
    """Copies of the newest task with their image and their ledger, with prompts of their own."""
    run = tx.connection.execute
    completed = task_table.c.state == "completed"
    task = dict(run(task_table.select().where(completed).limit(1)).mappings().one())
    mine = image_table.c.task_id == task["id"]
    image = dict(run(image_table.select().where(mine).limit(1)).mappings().one())
    entries = run(ledger.select().where(ledger.c.task_id == task["id"])).mappings().all()
    ids = [f"task_{number:026d}" for number in range(counts[0])]
    fresh = {"idempotency_key": None, "submit_due_at": None, "settle_due_at": None}
    rows = [
        task | fresh | {"id": id, "upstream_id": f"u-{id}", "prompt": f"{HOSTILE} {id}" * 20}
        for id in ids
    ]
    run(task_table.insert(), rows)
    run(image_table.insert(), [image | {"id": f"img{id[4:]}", "task_id": id} for id in ids])
    copies = [
        {
            **entry,
            "task_id": id,
            "id": f"led_{place}_{id}",
            "sequence": 10_000 + len(ids) * place + n,
        }
        for place, entry in enumerate(entries)
        for n, id in enumerate(ids)
    ]
    run(ledger.insert(), copies)
    return [None]


async def test_every_page_is_small_and_asks_little_with_five_thousand_tasks(
    here: World, visitor: Visitor, shop: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 100 KB, and a number of statements that does not grow with the tasks. A full page of
    tasks reads their images in a few statements more.
    """
    made = await here.client.post("/v1/endpoints", json={"url": f"{shop.url}/many"})
    endpoint = made.json()["id"]
    task = (await here.ended((await here.submit())["id"]))["id"]

    async def failed() -> list[JSON] | None:
        query = {"endpoint": endpoint, "state": "dead"}
        found: list[JSON] = (await here.client.get("/v1/deliveries", params=query)).json()["data"]
        return found or None

    delivery = (await wait_until(failed))[0]["id"]
    await here.client.patch(f"/v1/endpoints/{endpoint}", json={"status": "disabled"})
    monkeypatch.setattr(worker, "LOOK_S", 30.0)  # or the workers' looks are counted with the pages
    paths = [
        *re.findall('<li><a href="(/console/[^"]+)"', await visitor.get("/console/tasks")),
        *(f"/console/tasks?{each}" for each in ("prompt=nothing+is+like+it", "error=nothing")),
        "/console/gallery?prompt=lighthouse",
        f"/console/playground?task={task}",
        f"/console/gallery/{task}/0",
        f"/console/tasks/{task}",
        f"/console/deliveries/{delivery}",
        f"/console/endpoints/{endpoint}",
    ]
    before = await statements_of(visitor, paths)
    await here.context.resources.store.write(many_tasks, 5000)
    after = await statements_of(visitor, paths)
    assert len(paths) > 15
    more = {path: (before[path], after[path]) for path in paths if after[path] > before[path] + 10}
    assert more == {}
    assert max(after.values()) <= MOST_STATEMENTS, after


async def statements_of(visitor: Visitor, paths: Sequence[str]) -> dict[str, int]:
    """How many times each page reads the store. The visitor checks its size."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        if statement.startswith("SELECT"):
            seen.append(statement)

    statements.listen(Engine, "before_cursor_execute", note)
    counted = {}
    try:
        for path in paths:
            seen.clear()
            await visitor.get(path)
            counted[path] = len(seen)
    finally:
        statements.remove(Engine, "before_cursor_execute", note)
    return counted


async def test_groups_and_replays_read_by_an_index(here: World) -> None:
    """The plans have no scan of a table."""

    def plans(connection: Connection) -> list[str]:
        failing = "FROM deliveries WHERE cause IS NOT NULL"
        found = []
        for more in ("", "AND owner = 'a'"):
            group = "SELECT endpoint_id, cause, failed_since, failed_at"
            asked = f"EXPLAIN QUERY PLAN {group} {failing} {more} ORDER BY failed_at DESC LIMIT 9"
            found += [row[3] for row in connection.execute(text(asked))]
        order = "AND created_at >= 5 ORDER BY created_at, id LIMIT 9"
        asked = f"EXPLAIN QUERY PLAN SELECT * {failing} AND owner = 'a' {order}"
        return found + [row[3] for row in connection.execute(text(asked))]

    found = await here.context.resources.store.read(plans)
    assert ["COVERING INDEX ix_deliveries" in plan for plan in found[:2]] == [True, True]
    assert "ix_deliveries_failed_created_at" in found[2]
    assert len(found) == 3  # no sorting
