"""Answers that are usable only in part, as raw bytes over real sockets. What is paid for is stored
whatever else an answer holds, and what is missing is asked for again.
"""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import pytest
from structlog.testing import capture_logs

from service.backends import INLINE_IMAGES
from service.tasks import results
from service.upstreams.catalogue import load_catalogue
from tests.callbacks import judged, raw, verdict
from tests.downloads import bytes_of, noise, quick
from tests.partial import COMPLETED, NAMES, PENDING, UNUSABLE, Said
from tests.untidy import LENGTH, PLAIN, Shape, response
from tests.upstream import picture
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, world

JSON = dict[str, Any]
MAX_BYTES = 2_000_000


@asynccontextmanager
async def asking(server: Said, folder: Path, **more: Any) -> AsyncIterator[World]:
    settings: JSON = {
        "evolink_base_url": server.url,
        "reconcile_after_s": 600,
        "max_image_bytes": MAX_BYTES,
    }
    with quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "results_wait", lambda _: 0.05)
        async with world(folder, **settings, **more) as made:
            yield made


@pytest.fixture(scope="module")
async def here(server: Said, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with asking(server, tmp_path_factory.mktemp("partial")) as made:
        yield made


@pytest.fixture(scope="module")
async def impatient(server: Said, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world in which results that a completed task lacks are given up soon."""
    folder = tmp_path_factory.mktemp("impatient")
    async with asking(server, folder, no_results_after_s=1.5) as made:
        yield made


async def submitted(here: World, server: Said, *queries: bytes, first: bytes = PENDING) -> JSON:
    """A task whose submission and queries are answered with these bytes."""
    return await here.submit(prompt=server.scripted(*queries, first=first))


async def called(here: World, server: Said, task: JSON, body: bytes = COMPLETED) -> str:
    """The verdict on a callback with these bytes."""
    filled = server.filled(body, task["upstream_id"])
    length = f"content-length: {len(filled)}\r\n"
    status, _, answer = await raw(here.callback_url(task["id"]), filled, headers=length)
    assert (status, json.loads(answer)) == (200, {"status": "accepted"})
    return await judged(task["id"], filled)


async def ended(here: World, server: Said, *queries: bytes, callback: bytes = COMPLETED) -> JSON:
    task = await submitted(here, server, *queries)
    await called(here, server, task, callback)
    return await here.ended(task["id"])


async def stored(here: World, task: JSON, *images: bytes) -> None:
    assert task["state"] == "completed", await here.steps(task["id"])
    assert [await bytes_of(here, image) for image in task["images"]] == list(images or [picture()])


def asked(server: Said, task: JSON, kind: str = "query") -> int:
    return server.asked.count((kind, server.names[task["upstream_id"]]))


# --- a part that nobody needs


@pytest.mark.parametrize("kind", UNUSABLE)
async def test_an_unusable_part_beside_the_rest_costs_nothing(
    kind: str, here: World, server: Said
) -> None:
    """The submission is accepted, the callback is accepted, and one query settles the task."""
    part = b"{" + UNUSABLE[kind] + b", "
    task = await submitted(here, server, part + COMPLETED[1:], first=part + PENDING[1:])
    assert task["state"] == "submitted", await here.steps(task["id"])
    assert await called(here, server, task, part + COMPLETED[1:]) == "accepted"
    await stored(here, await here.ended(task["id"]))
    assert asked(server, task) == 1


async def test_a_byte_order_mark_costs_nothing(here: World, server: Said) -> None:
    mark = b"\xef\xbb\xbf"
    task = await submitted(here, server, mark + COMPLETED, first=mark + PENDING)
    assert await called(here, server, task, mark + COMPLETED) == "accepted"
    await stored(here, await here.ended(task["id"]))


@pytest.mark.parametrize("part", [b'"prompt": "cut \\ud83d"', b'"seed": NaN', b'"x": 1, "x": 2'])
async def test_our_own_clients_get_no_such_leniency(part: bytes, here: World) -> None:
    body = b'{"model": "wan2.5-text-to-image", "prompt": "x", ' + part + b"}"
    headers = f"authorization: Bearer {ADMIN_KEY}\r\ncontent-length: {len(body)}\r\n"
    status, _, answer = await raw(f"{here.url}/v1/images/generations", body, headers=headers)
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    "page",
    [
        *(b"<html>busy</html>", b"", b'{"id": "$ID"}', b"[1]", b'{"status":', b'{"id": "other"}'),
        *(b'{"id": "$ID", "status": "in_review"}', b'{"status": null}', b'{"status": 7}'),
        *(b'{"status": "completed\\u0000"}', b'{"status": "a", "status": "b"}'),
    ],
)
async def test_an_answer_that_cannot_be_read_is_kept_for_operators(
    page: bytes, here: World, server: Said
) -> None:
    """Also one without a documented status. The query is repeated until it can be read. The log
    tells of each. The timeline has the answer once, with its bytes for admins alone.
    """
    with capture_logs() as lines:
        task = await ended(here, server, page, page, COMPLETED)
    await stored(here, task)
    assert asked(server, task) == 3
    told = [line for line in lines if line["event"] == "upstream.unreadable"]
    assert [line["kind"] for line in told] == ["query"] * 2 * bool(page)
    kept = [step for step in await here.steps(task["id"]) if step["step"] == "upstream.unreadable"]
    text = page.replace(b"$ID", task["upstream_id"].encode()).decode()
    assert [(step["answer_to"], step["raw"]) for step in kept] == [("query", text)] * bool(page)


async def test_a_submission_that_cannot_be_read_is_kept_for_operators(
    here: World, server: Said
) -> None:
    """The owner sees the step without the bytes."""
    async with here.owner("submit", "read") as owner:
        name = next(NAMES)
        server.bodies["submission", name] = [b"<html>\0 proxy</html>"]
        body = {"model": "wan2.5-text-to-image", "prompt": name, "size": "768x768"}
        made = (await owner.post("/v1/images/generations", json=body)).json()
        assert made["state"] == "uncertain"
        seen = (await owner.get(f"/v1/tasks/{made['id']}/timeline")).json()["data"]
    for steps, raw_text in (
        (await here.steps(made["id"]), "<html>\ufffd proxy</html>"),
        (seen, None),
    ):
        kept = next(step for step in steps if step["step"] == "upstream.unreadable")
        assert (kept["answer_to"], kept.get("raw")) == ("submission", raw_text)


async def test_a_callback_that_cannot_be_read_is_shown_to_operators(
    here: World, server: Said
) -> None:
    """Its sender is proved, so the upstream is asked at once. The owner sees no bytes."""
    async with here.owner("submit", "read") as owner:
        name = next(NAMES)
        server.bodies["query", name] = [COMPLETED]
        body = {"model": "wan2.5-text-to-image", "prompt": name, "size": "768x768"}
        task = (await owner.post("/v1/images/generations", json=body)).json()
        assert await called(here, server, task, b"<html>\xff\0</html>") == "unreadable"
        await stored(here, await here.ended(task["id"]))
        seen = (await owner.get(f"/v1/tasks/{task['id']}/timeline")).json()["data"]
    for steps, text in ((await here.steps(task["id"]), "<html>\ufffd\ufffd</html>"), (seen, None)):
        call = next(step for step in steps if step["step"] == "callback.received")
        assert (call["verdict"], call.get("raw")) == ("unreadable", text)


# --- links

AROUND = [
    "$LINK\\n",
    "$LINK\\r\\n",
    "  $LINK ",
    "\\t$LINK",
    "\\u0000$LINK\\u001f",
    "$LINK?\\ta\\n=\\r1",
]


@pytest.mark.parametrize("link", AROUND)
@pytest.mark.parametrize("shape", [b'["%b"]', b'[{"url": "%b"}]', b'"%b"'])
async def test_a_link_is_trimmed_as_browsers_do(
    shape: bytes, link: str, here: World, server: Said
) -> None:
    """Blanks and control characters around it, and line ends in it, are no part of it."""
    body = b'{"id": "$ID", "status": "completed", "results": ' + shape % link.encode() + b"}"
    await stored(here, await ended(here, server, body, callback=body))


@pytest.mark.parametrize(
    "where", ["/moved/$ID ", "/mo\tved/$ID", " \tURL/moved/$ID", "/moved/$ID#a b"]
)
async def test_a_redirect_is_trimmed_too(where: str, here: World, server: Said) -> None:
    task = await submitted(here, server, COMPLETED)
    name = server.names[task["upstream_id"]]
    to = where.replace("URL", server.url).replace("$ID", task["upstream_id"])
    server.shapes["picture", name] = Shape(
        response(LENGTH, f"Location: {to}", status="302 Found"), tidy=True
    )
    await called(here, server, task)
    await stored(here, await here.ended(task["id"]))
    assert asked(server, task, "moved") == 1


@pytest.mark.parametrize("around", ["{}\n", " {}\t", "\r\n{}", "\x1f{}\x01"])
async def test_urls_of_clients_are_trimmed_too(around: str, here: World, server: Said) -> None:
    """The service shows, checks and calls the trimmed URL."""
    hook = f"{server.url}/hooks/{next(NAMES)}"
    given = around.format(hook)
    made = await here.client.post("/v1/endpoints", json={"url": given, "types": ["task.parked"]})
    assert (made.status_code, made.json()["url"]) == (201, hook)
    path = f"/v1/endpoints/{made.json()['id']}"
    changed = await here.client.patch(path, json={"url": around.format(hook + "2")})
    assert changed.json()["url"] == hook + "2"
    await here.client.delete(path)
    name = next(NAMES)
    task = await here.submit(prompt=name, callback_url=given)
    await called(here, server, task)
    await here.ended(task["id"])
    await wait_until(lambda: server.asked.count(("receiver", hook.rsplit("/", 1)[1])) == 1)


@pytest.mark.parametrize("length", [4_300, 7_000, 16_384])
@pytest.mark.parametrize("place", ["results", "redirect"])
async def test_a_long_link_is_fetched_whole(
    place: str, length: int, here: World, server: Said
) -> None:
    task = await submitted(here, server, COMPLETED)
    id = task["upstream_id"]
    path = "files" if place == "results" else "moved"
    link = f"{server.url}/{path}/{id}?signature=".ljust(length, "x")
    if place == "results":
        body = COMPLETED.replace(b"$LINK", link.encode())
        server.bodies["query", server.names[id]] = [body]
    else:
        server.shapes["picture", server.names[id]] = Shape(
            response(LENGTH, f"Location: {link}", status="307 Moved"), tidy=True
        )
    await called(here, server, task)
    await stored(here, await here.ended(task["id"]))


async def test_a_link_over_the_limit_is_asked_for_again(
    here: World, impatient: World, server: Said
) -> None:
    """The upstream may send a shorter one. Without that, the reason names the limit."""
    too_long = COMPLETED.replace(b"$LINK", b"$LINK?" + b"x" * 17_000)
    await stored(here, await ended(here, server, too_long, COMPLETED, callback=too_long))
    lost = await ended(impatient, server, too_long, callback=too_long)
    assert lost["error"]["code"] == "results_lost"
    assert "at most 16384" in lost["error"]["message"]


UNREADABLE_LINKS = [
    *("$LINK?a\u2028b", "$LINK?a\u0085", "$LINK?\u2029", "$LINK?\\u0001x", "$LINK?\x7f"),
    *("http:\\\\\\\\127.0.0.1\\\\a.png", "http://127.0.0.1\\\\@evil.test/", "$LINK?" + "é" * 9000),
    *("http://u:p@127.0.0.1/", "http://127.0.0.1:99999/a", "http://127.0.0.1:25/", "https://"),
    *("http://a b/", "http://[::1/a", "http://a..b/", "http://ex%41mple.test/", "http:a.png"),
]


@pytest.mark.parametrize("link", UNREADABLE_LINKS)
async def test_a_link_that_cannot_be_read_is_asked_for_again(
    link: str, here: World, server: Said
) -> None:
    """The upstream may send another one, and operators are told."""
    body = COMPLETED.replace(b"$LINK", link.encode())
    task = await ended(here, server, body, body, COMPLETED, callback=body)
    await stored(here, task)
    assert asked(server, task) >= 3
    (told,) = await here.events(task=task["id"], type="image.at_risk")
    assert "URL" in told["data"]["reason"]


# --- results in another shape, or later

SHAPES = [
    b'"results": "$LINK"',
    b'"results": {"url": "$LINK"}',
    b'"results": {"0": "$LINK"}',
    b'"results": [["$LINK"]]',
    b'"results": [{"image": {"url": "$LINK"}}]',
    b'"results": "[\\"$LINK\\"]"',
    b'"results": null, "result": "$LINK"',
    b'"results": [], "result_data": {"image_url": "$LINK"}',
    b'"results": [null], "result_url": "$LINK"',
    b'"results": ["$LINK"], "results": ["$LINK"]',
    b'"data": [{"url": "$LINK"}]',
    b'"results": [{"uri": "$LINK", "w": 64}]',
    b'"results": {"images": [{"download_url": "$LINK"}]}',
    b'"output": "$LINK"',
    b'"results": ["$LINK"],',
]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_result_in_another_shape_is_one_picture(
    shape: bytes, here: World, server: Said
) -> None:
    body = b'{"id": "$ID", "status": "completed", ' + shape + b"}"
    task = await ended(here, server, body, callback=body)
    await stored(here, task)
    assert asked(server, task) == 1


AROUND_THE_TASK = [
    b'{"code": 200, "message": "ok", "data": %b}',
    b'{"success": true, "data": %b, "error": null}',
    b'{"status": "success", "data": %b}',
    b'{"status": 200, "data": [%b]}',
    b'{"id": "req-1", "data": %b}',
    b'{"id": "req-1", "status": "ok", "error": {"code": 0, "message": "ok"}, "data": %b}',
    b'{"id": "req-1", "status": "completed", "created": 1757165031, "data": %b}',
    b'{"task_id": "req-1", "status": true, "data": {"status": "ok", "task": %b}}',
    b'{"id": 7, "status": "pending", "result": %b}',
    b"\xef\xbb\xbf\xef\xbb\xbf%b",
    b"%b<!-- served by us -->",
    b"\r\n\t%b\0\0",
]


RESULTS_WITH_IDS = [
    b'"data": {"id": "i", "status": "ok", "url": "$LINK"}',
    b'"data": {"id": "i", "status": "completed", "url": "$LINK"}',
    b'"result": {"id": "i", "images": ["$LINK"]}',
    b'"data": [{"id": "i", "url": "$LINK"}], "usage": {}',
    b'"data": {"id": "i", "status": "failed"}, "results": ["$LINK"]',
]


@pytest.mark.parametrize("part", RESULTS_WITH_IDS)
async def test_an_id_of_a_result_is_not_the_tasks(part: bytes, here: World, server: Said) -> None:
    """Nor is its status."""
    body = b'{"id": "$ID", "status": "completed", %b}' % part
    task = await submitted(here, server, body, first=body)
    assert task["upstream_id"] is not None
    assert await called(here, server, task, body) in ("accepted", "duplicate")
    await stored(here, await here.ended(task["id"]))


@pytest.mark.parametrize(
    ("first", "state"),
    [
        (b'{"status": "pending", "data": {"id": "$ID"}}', "submitted"),
        (b'{"status": "success", "data": {"task_id": "$ID", "url": ""}}', "submitted"),
        (b'{"id": "req-1", "data": {"id": "$ID", "status": "queued"}}', "submitted"),
        (b'{"status": "success", "data": {}}', "uncertain"),
        (b'{"status": "success", "data": {"status": "pending"}}', "uncertain"),
    ],
)
async def test_the_id_in_an_envelope_is_the_tasks(
    first: bytes, state: str, here: World, server: Said
) -> None:
    task = await submitted(here, server, COMPLETED, first=first)
    known = next(id for id, name in server.names.items() if name == task["prompt"])
    assert (task["state"], task["upstream_id"]) == (
        (state, known) if state == "submitted" else (state, None)
    )


@pytest.mark.parametrize("around", AROUND_THE_TASK)
async def test_a_task_that_a_gateway_wraps_is_read(
    around: bytes, here: World, server: Said
) -> None:
    """In the answer to the submission, in the callback, and in the query, also with blanks around
    the id.
    """
    pending, completed = (
        around % body.replace(b'"$ID"', b'" $ID\\n"') for body in (PENDING, COMPLETED)
    )
    task = await submitted(here, server, completed, first=pending)
    assert task["state"] == "submitted", await here.steps(task["id"])
    assert await called(here, server, task, completed) == "accepted"
    await stored(here, await here.ended(task["id"]))
    assert asked(server, task) == 1


LATER = [
    b'"results": []',
    b'"results": null',
    b'"results": ""',
    b'"results": [""]',
    b'"results": [null]',
    b'"results": [{"url": null}]',
    b'"results": ["pending"]',
    b'"results": {}',
    b'"results": ["$LINK"], "results": ["$LINK2"]',
    b'"note": "no results at all"',
]


@pytest.mark.parametrize("shape", LATER)
async def test_a_result_that_comes_later_is_stored(shape: bytes, here: World, server: Said) -> None:
    """A completed task without a link is asked for again. Its event tells of one picture."""
    body = b'{"id": "$ID", "status": "completed", ' + shape + b"}"
    task = await ended(here, server, body, body, body, COMPLETED, callback=body)
    await stored(here, task)
    assert asked(server, task) == 4
    steps = [step["step"] for step in await here.steps(task["id"])]
    assert steps.count("task.results_awaited") == steps.count("task.confirmed") == 1


async def test_a_result_that_comes_later_is_found_without_a_callback(
    here: World, server: Said
) -> None:
    empty = COMPLETED.replace(b'"$LINK"', b"")
    task = await submitted(here, server, empty, empty, COMPLETED)
    await here.client.post(f"/v1/tasks/{task['id']}/reconcile")
    await stored(here, await here.ended(task["id"]))


async def test_a_result_is_stored_while_another_is_awaited(here: World, server: Said) -> None:
    """The order is the upstream's. A page that lacks a result later takes none away."""
    both = COMPLETED.replace(b'"$LINK"', b'"$LINK?0", "$LINK?1"')
    second = COMPLETED.replace(b'"$LINK"', b'null, "$LINK?1"')
    task = await submitted(here, server, second)
    await called(here, server, task, second)

    async def one() -> bool:
        now = await here.task(task["id"])
        assert now["state"] == "submitted"
        return [image["index"] for image in now["images"]] == [1]

    await wait_until(one)
    server.bodies["query", server.names[task["upstream_id"]]] = [both]
    task = await here.ended(task["id"])
    await stored(here, task, picture(), picture())


async def test_a_task_without_results_fails_only_after_its_time(
    impatient: World, server: Said
) -> None:
    """The last result that never came is lost. The other one is listed."""
    empty = COMPLETED.replace(b'"$LINK"', b"")
    task = await ended(impatient, server, empty, callback=empty)
    assert (task["state"], task["error"]["code"]) == ("failed", "no_results")
    assert asked(server, task) >= 2
    half = COMPLETED.replace(b'"$LINK"', b'"$LINK", ""')
    task = await ended(impatient, server, half, callback=half)
    assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")
    assert [image["index"] for image in task["images"]] == [0]


async def test_a_result_after_that_time_is_stored_too(impatient: World, server: Said) -> None:
    """The task stays failed, and operators are told once."""
    empty = COMPLETED.replace(b'"$LINK"', b"")
    task = await ended(impatient, server, empty, callback=empty)
    assert task["error"]["code"] == "no_results"
    before = asked(server, task)
    server.bodies["query", server.names[task["upstream_id"]]] = [COMPLETED]
    for _ in range(2):
        assert (await impatient.client.post(f"/v1/tasks/{task['id']}/reconcile")).status_code == 200

        async def saved() -> bool:
            return bool((await impatient.task(task["id"]))["images"])

        await wait_until(saved)
    assert (await impatient.task(task["id"]))["state"] == "failed"
    await wait_until(lambda: asked(server, task) >= before + 2)
    told = await impatient.events(task=task["id"], type="task.late_result")
    assert [event["data"]["stored"] for event in told] == [1]


async def test_without_confirmation_a_callback_without_results_is_asked_about(
    server: Said, tmp_path: Path
) -> None:
    """With `EVOLINK_CONFIRM=never` a callback settles a task only if it names the results."""
    settings: JSON = {"evolink_base_url": server.url, "evolink_confirm": "never"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "results_wait", lambda _: 0.05)
        async with world(tmp_path, reconcile_after_s=600, **settings) as here:
            empty = COMPLETED.replace(b'"$LINK"', b"")
            task = await ended(here, server, empty, COMPLETED, callback=empty)
            await stored(here, task)
            task = await ended(here, server, empty)
            await stored(here, task)
            assert asked(server, task) == 0


async def test_the_callbacks_link_counts_if_the_query_has_none(
    impatient: World, server: Said
) -> None:
    """The query confirms that the task is completed. The token proves who named the link."""
    task = await ended(impatient, server, COMPLETED.replace(b'"$LINK"', b""))
    await stored(impatient, task)
    assert await called(impatient, server, task) == "duplicate"


# --- results in the answer to the submission

AT_ONCE = {
    "as OpenAI sends it": b'{"created": 1757165031, "data": [{"url": "$LINK"}]}',
    "with more": b'{"data": [{"url": "$LINK", "revised_prompt": "cut \\ud83d"}], "usage": NaN}',
    "with a status": b'{"status": "completed", "data": [{"url": "$LINK"}]}',
    "an object": b'{"created": 1, "data": {"url": "$LINK"}}',
    "texts": b'{"created": 1, "data": ["$LINK\\n"]}',
    "the usual place": b'{"results": ["$LINK"]}',
    "an empty id": b'{"id": "", "task_id": null, "data": [{"url": "$LINK"}]}',
    "a large part": b'{"data": [{"url": "$LINK", "b64_json": "' + b"A" * 1_200_000 + b'"}]}',
}


@pytest.mark.parametrize("kind", AT_ONCE)
async def test_results_in_answer_to_the_submission_end_the_task(
    kind: str, here: World, server: Said
) -> None:
    """The picture is saved. There is no id, so nothing is asked again, also by hand."""
    task = await submitted(here, server, first=AT_ONCE[kind])
    task = await here.ended(task["id"])
    await stored(here, task)
    assert (task["upstream_id"], task["error"], task["progress"]) == (None, None, 100)
    answer = await here.client.post(f"/v1/tasks/{task['id']}/reconcile")
    assert answer.status_code == 200
    types = [event["type"] for event in await here.events(task=task["id"])]
    assert types == ["image.task.submitted", "image.task.completed"]
    name = f"order-{(await here.task(task['id']))['prompt'].removeprefix('order-')}"
    assert [each for each in server.asked if each[1] == name] == [
        ("submission", name),
        ("picture", name),
    ]


async def test_each_result_in_answer_to_the_submission_counts(here: World, server: Said) -> None:
    """One without a link is lost. The others are stored and listed."""
    first = b'{"created": 1, "data": [{"url": "$LINK?0"}, {"b64_json": ""}, {"url": "$LINK?2"}]}'
    task = await here.ended((await submitted(here, server, first=first))["id"])
    assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")
    assert [image["index"] for image in task["images"]] == [0, 2]


async def test_a_late_callback_changes_no_task_that_ended_at_once(
    here: World, server: Said
) -> None:
    """It binds the id that the answer lacked."""
    task = await submitted(here, server, first=AT_ONCE["as OpenAI sends it"])
    task = await here.ended(task["id"])
    id = next(id for id, name in server.names.items() if name == task["prompt"])
    body = server.filled(COMPLETED, id).decode().replace("$ID", id).encode()
    assert await verdict(here, task, body) == "duplicate"
    assert (await here.task(task["id"]))["state"] == "completed"
    assert len(await here.events(task=task["id"])) == 2


@pytest.mark.parametrize(
    "first",
    [
        b'{"created": 1, "data": []}',
        b'{"created": 1, "data": [{"url": ""}]}',
        b'{"created": 1, "data": [{"url": "data:image/png;base64,iVBO"}]}',
        b'{"status": "failed", "data": [{"url": "$LINK"}]}',
        b'{"status": "processing", "data": [{"url": "$LINK"}]}',
        b'{"error": {"code": "x"}, "data": [{"url": "$LINK"}]}',
        b'{"id": 7, "data": [{"url": "$LINK"}]}',
    ],
)
async def test_an_answer_without_id_and_results_proves_nothing(
    first: bytes, here: World, server: Said
) -> None:
    assert (await submitted(here, server, first=first))["state"] == "uncertain"


@pytest.mark.parametrize("ids", [b'"task_id": "$ID"', b'"id": null, "task_id": "$ID"'])
async def test_a_task_id_is_taken_for_the_id(ids: bytes, here: World, server: Said) -> None:
    task = await submitted(here, server, COMPLETED, first=b"{" + ids + b', "status": "pending"}')
    assert task["state"] == "submitted"
    body = COMPLETED.replace(b'"id": "$ID"', ids)
    await called(here, server, task, body)
    await stored(here, await here.ended(task["id"]))


# --- images in the answer itself


def data(content: bytes, head: str = "data:image/png;base64") -> bytes:
    return f"{head},{base64.b64encode(content).decode()}".encode()


def lines(content: bytes) -> bytes:
    return data(content).replace(b"A", b"A\\r\\n ")


DATA = {
    "usual": data(picture()),
    "capitals": data(picture(), "DATA:image/png;BASE64"),
    "no type": data(picture(), "data:;base64"),
    "parameters": data(picture(), "data:image/png;charset=x;base64"),
    "no padding": data(picture()).rstrip(b"="),
    "lines": lines(picture()),
    "the alphabet of URLs": data(picture()).translate(bytes.maketrans(b"+/", b"-_"))[:0]
    + data(picture()).partition(b",")[0]
    + b","
    + base64.urlsafe_b64encode(picture()),
    "percent signs": b"data:image/png," + quote_from_bytes(picture()).encode(),
    "percent signs in base64": data(picture()).replace(b"=", b"%3D").replace(b"+", b"%2B"),
    "a fragment": data(picture()) + b"#x",
}


@pytest.mark.parametrize("kind", DATA)
async def test_an_image_in_the_answer_is_stored(kind: str, here: World, server: Said) -> None:
    body = COMPLETED.replace(b"$LINK", DATA[kind])
    task = await ended(here, server, body, callback=body)
    await stored(here, task)
    assert await called(here, server, task, body) == "duplicate"


BASE64 = [
    b'"results": [{"b64_json": "%b"}]',
    b'"data": [{"b64_json":"%b"}]',
    b'"output": {"base64": "%b"}',
]


@pytest.mark.parametrize("shape", BASE64)
@pytest.mark.parametrize("size", [(64, 48), (800, 800)])
async def test_an_image_in_base64_is_stored(
    size: tuple[int, int], shape: bytes, here: World, server: Said
) -> None:
    """It needs no `data:` around it. JSON may write its slashes as escapes."""
    image = noise(size=size)
    text = base64.b64encode(image).replace(b"/", b"\\/")
    body = b'{"id": "$ID", "status": "completed", %b}' % (shape % text)
    await stored(here, await ended(here, server, body, callback=b'{"status": "failed"}'), image)


async def test_an_image_in_the_answer_may_be_as_large_as_any(here: World, server: Said) -> None:
    """A link beside it is stored too. An image over `MAX_IMAGE_BYTES` is lost, and told."""
    large = noise(size=(800, 800))
    assert 1_500_000 < len(large) < MAX_BYTES
    body = COMPLETED.replace(b'"$LINK"', b'"$LINK", {"url": "%b"}' % data(large))
    await stored(here, await ended(here, server, body), picture(), large)
    body = COMPLETED.replace(b"$LINK", data(large + bytes(MAX_BYTES)))
    task = await ended(here, server, body, callback=b'{"status": "completed"}')
    assert task["error"]["code"] == "results_lost"
    assert f"over {MAX_BYTES} bytes" in task["error"]["message"]


async def test_an_answer_may_hold_as_many_images_as_any_model_makes(
    here: World, server: Said
) -> None:
    """Each of the largest size. The service stores them in their order."""
    rules = [entry.fields.get("n") for entry in load_catalogue().models.values()]
    assert INLINE_IMAGES >= max(rule.document().get("max") or 0 for rule in rules if rule) > 9
    images = [noise(size=(800, 800)) + bytes([number]) for number in range(6)]
    links = b", ".join(b'"%b"' % data(image) for image in images)
    assert len(links) > 14_000_000
    body = COMPLETED.replace(b'"$LINK"', links)
    await stored(here, await ended(here, server, body, callback=b'{"status": "failed"}'), *images)


async def test_a_large_answer_that_stalls_holds_up_no_other(here: World, server: Said) -> None:
    """It takes the place among large answers once it is whole. Meanwhile another submission is paid
    for and answered.
    """
    large = COMPLETED.replace(b"$LINK", data(noise(size=(800, 800))))
    stalled = await submitted(here, server, large)
    server.shapes["query", server.names[stalled["upstream_id"]]] = Shape(
        lambda body: PLAIN(body)[:-9]
    )
    await called(here, server, stalled)
    await wait_until(lambda: asked(server, stalled) == 1)
    padded = b'{"log": "' + b"x" * 1_500_000 + b'", ' + PENDING[1:]
    for _ in range(3):
        task = await submitted(here, server, large, first=padded)
        assert task["state"] == "submitted", await here.steps(task["id"])
        await called(here, server, task, b'{"status": "failed"}')
        await stored(here, await here.ended(task["id"]), noise(size=(800, 800)))
    assert (await here.task(stalled["id"]))["state"] == "submitted"


DEEP = b'"debug": ' + b"[" * 5_000 + b"]" * 5_000
OVERSIZED = {
    "deep": b"{" + DEEP + b", %b}",
    "deep behind the rest": b"{%b, " + DEEP.replace(b"[", b'{"x": [').replace(b"]", b"]}") + b"}",
    "deep in a part that is needed": b'{"usage": ' + DEEP[9:] + b", %b}",
    "numbers": b'{%b, "embedding": [' + b"0.5, " * 300_000 + b"1]}",
    "log lines": b'{"log": ["' + b'a \\"line\\"", "' * 80_000 + b'"], %b}',
    "a long text": b'{"html": "' + b"<br>\\n" * 200_000 + b'", %b}',
    "base64 that is no link": b'{%b, "b64_json": "' + b"iVBO" * 300_000 + b'"}',
    "a long message": b'{"error": {"message": "' + b"x" * 1_200_000 + b'"}, %b}',
}


@pytest.mark.parametrize("kind", OVERSIZED)
async def test_a_deep_or_large_part_costs_nothing(kind: str, here: World, server: Said) -> None:
    """Neither the submission nor the query is lost, and nothing is asked twice."""
    first, then = (OVERSIZED[kind] % body[1:-1] for body in (PENDING, COMPLETED))
    task = await submitted(here, server, then, first=first)
    assert task["state"] == "submitted", await here.steps(task["id"])
    await called(here, server, task)
    await stored(here, await here.ended(task["id"]))
    assert asked(server, task) == 1


async def test_a_deep_callback_is_read_too(here: World, server: Said) -> None:
    task = await submitted(here, server, COMPLETED)
    assert await called(here, server, task, b"{" + DEEP + b", " + COMPLETED[1:]) == "accepted"
    await stored(here, await here.ended(task["id"]))


ESCAPED = [r"\n data:image/png;base64,{}", r"[\"data:;base64,{}\"]", r"\tDATA:;base64, {}\r\n"]


@pytest.mark.parametrize("inner", ESCAPED)
async def test_an_image_with_escapes_around_it_is_stored(
    inner: str, here: World, server: Said
) -> None:
    """JSON may write a slash as an escape, and may hold JSON in a text."""
    text = base64.b64encode(picture()).decode().replace("/", r"\/")
    body = COMPLETED.replace(b"$LINK", inner.format(text).encode())
    await stored(here, await ended(here, server, body, callback=body))
