"""`reconcile` asks again for as long as the upstream gives no answer, over raw sockets."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from service.tasks import admin
from tests.callbacks import raw
from tests.downloads import bytes_of, quick
from tests.partial import COMPLETED, NAMES, Said
from tests.untidy import LENGTH, PLAIN, Shape, Write, cut, response
from tests.upstream import picture
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, world

JSON = dict[str, Any]


@pytest.fixture(scope="module")
async def here(server: Said, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A link lives for 0.3 s, and a query may take half a second."""
    settings: JSON = {
        "evolink_base_url": server.url,
        "reconcile_after_s": 600,
        "evolink_result_ttl_s": 0.3,
        "no_results_after_s": 0.2,
        "query_timeout_s": 0.5,
    }
    with quick():
        async with world(tmp_path_factory.mktemp("again"), **settings) as made:
            yield made


async def post(here: World, path: str, body: bytes = b"") -> JSON:
    headers = f"authorization: Bearer {ADMIN_KEY}\r\ncontent-length: {len(body)}\r\n"
    status, _, answer = await raw(here.url + path, body, headers=headers)
    assert status == 200, answer
    made: JSON = json.loads(answer)
    return made


async def lost(here: World, server: Said, link: bytes = b"$LINK") -> tuple[JSON, str]:
    """A task whose only result is lost, and its name at the upstream."""
    name = next(NAMES)
    server.bodies["query", name] = [COMPLETED.replace(b"$LINK", link)]
    server.shapes["picture", name] = Shape(response(LENGTH, status="500 Oops"), tidy=True)
    order = {"model": "wan2.5-text-to-image", "prompt": name, "size": "768x768"}
    task = await post(here, "/v1/images/generations", json.dumps(order).encode())
    await post(here, f"/v1/tasks/{task['id']}/reconcile")
    task = await here.ended(task["id"])
    assert task["error"]["code"] == "results_lost"
    return task, name


async def late(here: World, task: JSON) -> JSON:
    """The last step of the timeline that tells the outcome. The state stands."""

    async def told() -> JSON | None:
        steps = await here.steps(task["id"])
        return next((step for step in steps if step["step"] == "task.late_result"), None)

    found: JSON = await wait_until(told)
    after = await here.task(task["id"])
    assert (after["state"], after["error"]) == (task["state"], task["error"])
    return found


def then(*first: Write) -> Write:
    """These responses one after another, and then usual ones."""
    left = list(first)

    def write(body: bytes) -> bytes:
        return (left.pop(0) if left else PLAIN)(body)

    return write


def instead(body: bytes, *lines: str, status: str = "200 OK") -> Write:
    return lambda _: response(LENGTH, *lines, status=status)(body)


BUSY = instead(b'{"error": {"code": "rate_limit_exceeded"}}', status="429 Too Many")
SILENT: dict[str, Callable[[], tuple[Write, ...]]] = {
    "429": lambda: (BUSY,),
    "429 for a while": lambda: (BUSY,) * 5,
    "429 with Retry-After": lambda: (instead(b"{}", "Retry-After: 1", status="429 Too Many"),),
    "a slow answer": lambda: (lambda body: PLAIN(body)[:-9],),
    "no answer in time": lambda: (lambda _: b"", lambda _: b"HTTP/1.1 200 OK\r\n"),
    "a gateway's page": lambda: (instead(b"<html>busy</html>", status="502 Bad"),),
    "a page with 200": lambda: (instead(b"<html>busy</html>"),) * 2,
    "a broken answer": lambda: (cut(instead(b'{"id": ')),),
    "an unknown status": lambda: (instead(b'{"status": "in_review"}'),),
    "no status": lambda: (instead(b'{"status": null}'),),
    "no link yet": lambda: (instead(b'{"status": "completed", "results": []}'),),
    "not completed": lambda: (instead(b'{"status": "processing"}'),),
}


@pytest.mark.parametrize("kind", SILENT)
@pytest.mark.parametrize("link", [b"$LINK", b"https://10.0.0.5/a.png"], ids=["dead", "refused"])
async def test_an_upstream_that_gives_no_link_is_asked_again(
    link: bytes, kind: str, here: World, server: Said
) -> None:
    """The old link waits meanwhile, so that it is not lost again before the fresh one is there."""
    task, name = await lost(here, server, link)
    server.bodies["query", name] = [COMPLETED.replace(b"$LINK", f"{server.url}/moved/$ID".encode())]
    server.shapes["query", name] = Shape(then(*SILENT[kind]()))
    before = server.asked.count(("picture", name))
    await post(here, f"/v1/tasks/{task['id']}/reconcile")
    told = await late(here, task)
    assert (told["stored"], told["lost"], told["reason"]) == (1, 0, None)
    (image,) = (await here.task(task["id"]))["images"]
    assert await bytes_of(here, image) == picture()
    assert server.asked.count(("picture", name)) == before


async def test_reconciling_ends_with_a_reason(
    here: World, server: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an hour is 1.5 s here. Then the old link is tried, and the upstream is left alone."""
    assert admin.REVIVED_MS == 30 * 60 * 1000
    monkeypatch.setattr(admin, "REVIVED_MS", 1500)
    task, name = await lost(here, server)
    server.shapes["query", name] = Shape(BUSY, tidy=True)
    before = server.asked.count(("query", name))
    await post(here, f"/v1/tasks/{task['id']}/reconcile")
    told = await late(here, task)
    assert (told["stored"], told["lost"]) == (0, 1)
    assert told["reason"] == "results could not be saved: 0: answered 500"
    other, others_name = await lost(here, server)  # the last query may still be under way
    count, others = (server.asked.count(("query", each)) for each in (name, others_name))
    assert count >= before + 2
    await post(here, f"/v1/tasks/{other['id']}/reconcile")
    await wait_until(lambda: server.asked.count(("query", others_name)) > others)
    assert server.asked.count(("query", name)) == count


@pytest.mark.parametrize(
    "answer",
    [
        instead(b'{"error": {"code": "task_not_found"}}', status="404 Not Found"),
        instead(b'{"status": "failed", "error": {"code": "resource_not_found"}}'),
        PLAIN,
    ],
)
async def test_the_old_link_is_tried_at_once_if_there_is_no_fresh_one(
    answer: Write, here: World, server: Said
) -> None:
    task, name = await lost(here, server)
    server.shapes["query", name] = Shape(answer, tidy=True)
    del server.shapes["picture", name]
    await post(here, f"/v1/tasks/{task['id']}/reconcile")
    assert (await late(here, task))["stored"] == 1
