"""The levers of operators over HTTP and on the command line (docs/operations.md)."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from re import fullmatch, search
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.app import Role
from service.queue import worker
from service.tasks import pause
from service.web.sessions import COOKIE
from tests.api import TIME, an_id, got, refused, submitted
from tests.browser.people import cookie
from tests.environment import ROOT
from tests.processes import darkroom
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, subscriber, world

pytestmark = pytest.mark.slow

WHY = "prices doubled"
TIMELINE = "/v1/tasks/{task_id}/timeline"  # where the command reads why a task waits
HELD = f"held: submission is paused: {WHY}"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(pause, "LOOK_S", 0.05)
        yield


async def change(here: World, paused: bool, reason: str | None = WHY) -> Any:
    body = {"paused": paused, "reason": reason}
    return got(await here.client.post("/v1/submission", json=body))


@asynccontextmanager
async def paused(here: World) -> AsyncIterator[Any]:
    yield await change(here, True)
    await change(here, False, None)


def calls(here: World, kind: str = "submit") -> float:
    (family,) = here.context.resources.metrics.upstream_requests.collect()
    counted = (each for each in family.samples if each.name.endswith("_total"))
    return sum(each.value for each in counted if each.labels["kind"] == kind)


async def until_held(here: World, task_id: str) -> Any:
    async def look() -> Any:
        steps = await here.steps(task_id)
        return steps[-1] if steps and steps[-1]["step"] == "task.held" else None

    return await wait_until(look)


async def test_a_pause_stops_submitting_and_nothing_else(tmp_path: Path) -> None:
    """A task that is on its way completes and is delivered. A new task is accepted, is held with
    its reason, and is sent after the pause.
    """
    async with world(tmp_path) as here, subscriber() as hook:
        body = {"url": hook.url, "types": ["image.task.completed", "submission.*"]}
        got(await here.client.post("/v1/endpoints", json=body), 201)
        under_way = await here.submit(sandbox={"delay": 2})
        assert under_way["state"] == "submitted"
        state = await change(here, True)
        assert (state["paused"], state["reason"], state["key_id"]) == (
            True,
            WHY,
            "DARKROOM_ADMIN_KEY",
        )
        sent = calls(here)
        waiting = await here.submit()  # with no preference it answers once the task is held
        assert (waiting["state"], waiting["held"]) == ("queued", HELD)
        assert (await until_held(here, waiting["id"]))["message"] == HELD
        done = await here.ended(under_way["id"])
        assert (done["state"], done["held"], len(done["images"])) == ("completed", None, 1)
        await wait_until(lambda: any(under_way["id"].encode() in r.body for r in hook.received))
        assert got(await here.client.get("/v1/submission"))["waiting"] == 1
        assert calls(here) == sent
        assert (await here.task(waiting["id"]))["state"] == "queued"
        await change(here, False, None)
        assert (await here.ended(waiting["id"]))["state"] == "completed"
        told = await here.events(type="submission.*")
        assert [(each["type"], each["subject"]) for each in told] == [
            ("submission.paused", "submission"),
            ("submission.resumed", "submission"),
        ]
        await wait_until(lambda: any(b"submission.resumed" in r.body for r in hook.received))


async def test_a_pause_survives_a_restart(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        since = (await change(here, True))["since"]
        task = await submitted(here.client)
    async with world(tmp_path) as here:
        state = got(await here.client.get("/v1/submission"))
        assert (state["paused"], state["since"], state["waiting"]) == (True, since, 1)
        await until_held(here, task["id"])
        assert calls(here) == 0
        await change(here, False)
        await wait_until(lambda: calls(here) == 1)  # its callback goes to the first address


async def test_a_pause_holds_in_every_process(tmp_path: Path, postgres_url: str) -> None:
    """An operator's request goes to a web process, and another process has the workers."""
    settings: dict[str, Any] = {"database_url": postgres_url, "secret_key": "k" * 40}
    settings |= {"blob_url": f"file://{tmp_path}/images"}
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        web = await enter(world(tmp_path / "web", role=Role(workers=False), **settings))
        workers = await enter(world(tmp_path / "work", role=Role(web=False), **settings))
        await change(web, True)
        await wait_until(lambda: workers.context.pause.pause.message)
        task = await submitted(web.client)
        assert (await until_held(web, task["id"]))["message"] == HELD
        assert (await web.task(task["id"]))["held"] == HELD
        assert calls(workers) == 0
        await change(web, False)
        await wait_until(lambda: calls(workers) == 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"paused": True}, "reason"),
        ({"paused": True, "reason": ""}, "reason"),
        ({"paused": True, "reason": "  "}, "reason"),
        ({"paused": True, "reason": "x" * 501}, "reason"),
        ({"paused": True, "reason": 7}, "reason"),
        ({"paused": "yes", "reason": WHY}, "paused"),
        ({"reason": WHY}, "paused"),
        ({"paused": False, "until": "tomorrow"}, "until"),
    ],
)
async def test_a_bad_pause_names_its_field(here: World, body: Any, param: str) -> None:
    error = refused(await here.client.post("/v1/submission", json=body), 400, param=param)
    assert error["message"].startswith(f"{param}: ")
    assert "pattern" not in error["message"]
    assert not got(await here.client.get("/v1/submission"))["paused"]


async def test_levers_and_audit_need_admin(here: World) -> None:
    async with here.owner() as client:
        for method, path in (
            ("GET", "/v1/submission"),
            ("POST", "/v1/submission"),
            ("GET", "/v1/audit"),
            ("POST", "/v1/bulk/reconcile"),
            ("POST", "/v1/bulk/requeue"),
            ("POST", "/v1/bulk/resolve"),
        ):
            refused(await client.request(method, path), 403, "permission_denied")


# --- the audit


async def audit(here: World, **query: Any) -> list[Any]:
    entries: list[Any] = got(await here.client.get("/v1/audit", params=query))["data"]
    return entries


async def test_every_act_is_a_line_and_an_entry(here: World) -> None:
    """With the key, the target, the time, the reason and the outcome. The line says the same."""
    last = (await audit(here) or [{"id": None}])[-1]["id"]
    task = await here.submit()
    await here.ended(task["id"])
    with capture_logs() as lines:
        async with paused(here):
            pass
        got(await here.client.post(f"/v1/tasks/{task['id']}/reconcile"))
        bad = await here.client.post(f"/v1/tasks/{task['id']}/resolve", json={"as": "failed"})
        refused(bad, 409, task_id=task["id"])
        made = got(
            await here.client.post("/v1/keys", json={"owner": "eve", "scopes": ["read"]}), 201
        )
        got(await here.client.put("/v1/budgets/eve", json={"period": "day", "credits": 5}))
        rotate = await here.client.post("/v1/keys/rotate-secret", json={"owner": "eve"})
        got(rotate)
        await here.client.delete(f"/v1/keys/{made['id']}")
        hook = {"url": "http://127.0.0.1:9/x", "types": ["*"]}
        endpoint = got(await here.client.post("/v1/endpoints", json=hook), 201)["id"]
        path = f"/v1/endpoints/{endpoint}"
        got(await here.client.patch(path, json={"description": "x"}))
        got(await here.client.post(f"{path}/rotate", json={}))
        got(await here.client.post(f"{path}/test", json={}))
        replay = got(await here.client.post(f"{path}/replay", json={"only": "all"}))["id"]
        await here.client.delete(f"/v1/replays/{replay}")
        got(await here.client.post("/v1/replays", json={"filter": {"endpoint": endpoint}}))
        await here.client.delete(path)
        got(await here.client.post("/v1/bulk/reconcile", json={"filter": {"owner": "nobody"}}))
    entries = await audit(here, after=last) if last else await audit(here)
    told = [line for line in lines if line["event"] == "admin.action"]
    assert [(e["action"], e["target"], e["outcome"]) for e in entries] == [
        ("submission.pause", None, "done"),
        ("submission.resume", None, "done"),
        ("task.reconcile", task["id"], "done"),
        ("task.resolve", task["id"], "completed"),
        ("key.create", made["id"], "done"),
        ("budget.set", "eve", "done"),
        ("owner.rotate", "eve", "done"),
        ("key.revoke", made["id"], "done"),
        ("endpoint.create", endpoint, "done"),
        ("endpoint.patch", endpoint, "done"),
        ("endpoint.rotate", endpoint, "done"),
        ("endpoint.test", endpoint, "done"),
        ("endpoint.replay", endpoint, "done"),
        ("replay.cancel", replay, "done"),
        ("deliveries.replay", entries[14]["target"], "done"),
        ("endpoint.delete", endpoint, "done"),
        ("tasks.reconcile", None, "done"),
    ]
    same = ("action", "key_id", "reason", "outcome", "owner", "detail")
    assert [[line[n] for n in same] for line in told] == [[e[n] for n in same] for e in entries]
    assert {e["key_id"] for e in entries} == {"DARKROOM_ADMIN_KEY"}
    assert entries[0]["reason"] == WHY
    assert entries[-1]["detail"] == {"filter": {"owner": "nobody"}, "done": 0, "refused": 0}


async def test_an_operators_act_on_an_owners_task_is_an_entry_and_the_owners_is_not(
    still: World,
) -> None:
    async with still.owner() as client:
        own, others = await submitted(client), await submitted(client)
        got(await client.post(f"/v1/tasks/{own['id']}/cancel"))
    got(await still.client.post(f"/v1/tasks/{others['id']}/cancel"))
    assert (await still.client.delete(f"/v1/tasks/{others['id']}")).status_code == 204
    found = [each["action"] for id in (own, others) for each in await audit(still, target=id["id"])]
    assert found == ["task.cancel", "task.erase"]


async def test_the_audit_is_read_in_pages_and_by_filters(here: World) -> None:
    async with paused(here), paused(here):
        pass
    first = got(await here.client.get("/v1/audit", params={"limit": 1}))
    assert first["next_cursor"] == first["data"][0]["id"]
    assert first["data"][0].keys() == {
        *("id", "time", "owner", "key_id", "action", "target", "reason"),
        *("outcome", "detail", "request_id"),
    }
    assert fullmatch(an_id("act"), first["next_cursor"])
    assert fullmatch(TIME, first["data"][0]["time"])
    rest = await audit(here, after=first["next_cursor"])
    assert first["data"][0]["id"] not in [entry["id"] for entry in rest]
    resumes = await audit(here, action="submission.resume")
    assert [each["outcome"] for each in resumes[-2:]] == ["done", "unchanged"]
    refused(await here.client.get("/v1/audit", params={"after": "7"}), 400, param="after")
    gone = {"after": f"act_{'a' * 26}"}
    refused(await here.client.get("/v1/audit", params=gone), 404, param="after")


# --- acts in bulk


async def test_a_bulk_act_counts_first(still: World) -> None:
    """A dry run changes nothing and leaves no entry. The same filter then acts."""
    async with still.owner(name="bulk") as client:
        for _ in range(3):
            await submitted(client)
    body = {"filter": {"owner": "bulk"}, "dry_run": True}
    before = len(await audit(still))
    for name, more in (("reconcile", {}), ("requeue", {}), ("resolve", {"as": "failed"})):
        asked = await still.client.post(f"/v1/bulk/{name}", json=body | more)
        assert got(asked) == {"count": 0, "done": None}
    assert len(await audit(still)) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"filter": {"state": "lost"}}, "filter.state"),
        ({"filter": {"since": "yesterday"}}, "filter.since"),
        ({"filter": {"colour": "red"}}, "filter.colour"),
        ({"filter": {"owner": "NOBODY"}}, "filter.owner"),
        ({"dry_run": "yes"}, "dry_run"),
        ({"filter": []}, "filter"),
    ],
)
async def test_a_bad_filter_names_its_field(here: World, body: Any, param: str) -> None:
    refused(await here.client.post("/v1/bulk/reconcile", json=body), 400, param=param)
    refused(await here.client.post("/v1/bulk/resolve", json={}), 400, param="as")


# --- the command line


async def said(here: World, *arguments: str) -> tuple[int, str, str]:
    client = {"DARKROOM_URL": here.url, "DARKROOM_API_KEY": ADMIN_KEY}
    done = await asyncio.to_thread(darkroom, *arguments, folder=ROOT, **client)
    return done.returncode, done.stdout, done.stderr


async def test_the_command_line_pauses_resumes_and_acts_in_bulk(here: World) -> None:
    """`submit --wait` says why the task waits."""
    assert (await said(here, "pause"))[0] == 2
    code, out, _ = await said(here, "pause", WHY)
    assert (code, "true" in out.lower(), WHY in out) == (0, True, True)
    waiting = asyncio.create_task(said(here, "submit", "a pier", "--wait"))

    async def held() -> bool:
        return bool(got(await here.client.get("/v1/submission"))["waiting"])

    with capture_logs() as lines:
        await wait_until(held)
        await wait_until(lambda: [line for line in lines if line.get("route") == TIMELINE])
    counted = await said(here, "bulk", "reconcile", "--state", "completed", "--json")
    assert (counted[0], '"done":null' in counted[1].replace(" ", "")) == (0, True)
    assert (await said(here, "resume", "--reason", "cheap again"))[0] == 0
    code, _, err = await waiting
    assert (code, HELD in err) == (0, True), err
    assert "--yes" in (await said(here, "bulk", "reconcile", "--owner", "admin"))[1]
    acted = await said(here, "bulk", "reconcile", "--owner", "admin", "--yes", "--json")
    assert '"done":null' not in acted[1].replace(" ", "")
    code, out, _ = await said(here, "audit", "--action", "submission.resume")
    assert "cheap again" in out


# --- the console


@pytest.fixture
async def browser(here: World) -> AsyncIterator[httpx.AsyncClient]:
    """A browser in which the admin has signed in. It follows redirects to what a person sees."""
    cookies, headers = {COOKIE: cookie(here, ADMIN_KEY)}, {"origin": here.url}
    async with httpx.AsyncClient(
        base_url=here.url, cookies=cookies, headers=headers, follow_redirects=True
    ) as client:
        yield client


async def sent(browser: httpx.AsyncClient, path: str, **fields: str) -> httpx.Response:
    """Fills in the form of a page and sends it."""
    page = await browser.get(path)
    token = search(r'name="csrf" value="([^"]+)"', page.text)
    assert token is not None, page.text
    return await browser.post(path.partition("?")[0], data={"csrf": token[1], **fields})


async def test_the_console_pauses_and_resumes_with_a_question(
    here: World, browser: httpx.AsyncClient
) -> None:
    """A link only asks. A pause without a reason is refused at its field, and one with markup shows
    it as text.
    """
    path = "/console/operations/submission"
    assert "Pause submission?" in (await browser.get(path)).text
    assert not got(await here.client.get("/v1/submission"))["paused"]
    empty = await sent(browser, path, paused="true", reason="")
    assert (empty.status_code, 'aria-invalid="true"' in empty.text) == (400, True)
    page = await sent(browser, path, paused="true", reason="<b>costs</b>")
    assert (page.status_code, "&lt;b&gt;costs" in page.text) == (200, True)
    assert "<b>costs" not in page.text
    assert "Resume submission?" in (await browser.get(path)).text
    await sent(browser, path, paused="false", reason="")
    assert not got(await here.client.get("/v1/submission"))["paused"]
    listed = (await browser.get("/console/audit", params={"action": "submission.pause"})).text
    assert "&lt;b&gt;costs" in listed


async def test_the_console_counts_before_it_acts_in_bulk(
    here: World, browser: httpx.AsyncClient
) -> None:
    async with here.owner(name="crowd") as client:
        for _ in range(2):
            await here.ended((await submitted(client))["id"])
    path = "/console/operations/bulk/reconcile"
    page = await browser.get(path, params={"owner": "crowd"})
    assert "Reconcile 2 tasks" in page.text
    done = await sent(browser, f"{path}?owner=crowd", owner="crowd", reason="drill")
    assert "Reconcile: 2 tasks." in done.text
    (entry,) = [each for each in await audit(here) if each["reason"] == "drill"]
    assert entry["detail"] == {"filter": {"owner": "crowd"}, "done": 2, "refused": 0}
    bad = await browser.get(path, params={"owner": "CROWD"})
    assert (bad.status_code, "owner" in bad.text) == (400, True)
    for act in ("requeue", "resolve"):
        assert "0 tasks" in (await browser.get(f"/console/operations/bulk/{act}")).text
    assert (await browser.get("/console/operations/bulk/delete")).status_code == 404
