"""A request without the right token gets no data and costs little, and the service never reveals a
token.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from starlette.responses import Response

from service.app import Role
from service.db.sqlite import SqliteStore
from service.queue import worker
from service.web import overload
from service.web.routes import callback_route
from tests.callbacks import LIMIT, call, chunk, counted, heard, judged, quick_world, raw, said
from tests.logs import logged
from tests.upstream import Upstream, document, failed, picture
from tests.world import World, world

WORLD = quick_world


async def test_a_wrong_token_is_refused_without_touching_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is 401 for any task. The refusal is counted and logged without the token, and the
    store gets no statement.
    """
    monkeypatch.setattr(worker, "LOOK_S", 60.0)  # no look of the upkeep meanwhile
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    # Without the upstream's key, the process does not check its account meanwhile.
    async with world(tmp_path, role=Role(workers=False), evolink_api_key=None) as here:
        task = await here.submit(headers={"prefer": "respond-async"})
        store = here.context.resources.store
        assert isinstance(store, SqliteStore)
        for engine in (store._engine, store._reading):
            event.listen(engine, "before_cursor_execute", note)
        for task_id in (task["id"], "task_unknown", "%00"):
            for token in (
                "wrong",
                here.context.resources.keyring.callback_token("evolink", "another"),
            ):
                answer = await here.stranger.post(
                    here.callback_url(task_id, token), content=said(task, "completed")
                )
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        right = here.callback_url(task["id"]).replace("/evolink/", "/other/")
        assert (await here.stranger.post(right, content=said(task, "completed"))).status_code == 401
        assert statements == []
        assert counted(here, "wrong_token") == 7
        assert await heard(here, task) == []


async def test_no_line_of_the_log_holds_a_token(here: World, upstream: Upstream) -> None:
    """The token is in no log line of the service or of a library, whether it is right or wrong,
    accepted or refused.
    """
    upstream.files["0.png"] = [Response(picture(), media_type="image/png")]
    result = f"{here.sandbox_url}/files/0.png"
    with logged() as stream:
        task = await here.submit()
        upstream.queries[task["upstream_id"]] = [document("completed", result)]
        for body in (
            b"garbage",
            said(task, "processing"),
            said(task, "completed", results=[result]),
            b"x" * (LIMIT + 1),
        ):
            await call(here, task, body)
        token = here.callback_url(task["id"]).rsplit("/", 1)[1]
        await here.stranger.post(here.callback_url(task["id"], "wrong" + token), content=b"{}")
        await call(here, "task_gone", b"{}")
        assert (await here.ended(task["id"]))["state"] == "completed"
    lines = stream.getvalue()
    names = {json.loads(line)["event"] for line in lines.splitlines()}
    assert names >= {"callback.received", "callback.refused", "http.request", "task.settled"}
    assert token not in lines
    assert here.callback_url("task_gone").rsplit("/", 1)[1] not in lines


def forged(here: World, task: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """Callback URLs that are nearly right, keyed by the error in them."""
    right, keyring = here.callback_url(task["id"]), here.context.resources.keyring
    token = right.rsplit("/", 1)[1]
    wrong = {
        "another task's": keyring.callback_token("evolink", other["id"]),
        "another upstream's": keyring.callback_token("sandbox", task["id"]),
        "cut": token[:-1],
        "longer": token + "a",
        "twice": token * 2,
        "in capitals": token.upper(),
        "padded": token + "%3D",
        "with a space": token + "%20",
        "with a NUL": token + "%00",
        "with half a character": token + "%C3",
        "not text": "%FF%FE",
        "encoded twice": "".join(f"%25{ord(letter):02x}" for letter in token),
        "very long": "a" * 50_000,
    }
    paths = {name: here.callback_url(task["id"], value) for name, value in wrong.items()}
    paths["for another task's name"] = right.replace(task["id"], task["id"].upper())
    paths["with a very long task"] = right.replace(task["id"], task["id"] + "a" * 50_000)
    paths["of another upstream's task"] = right.replace("/evolink/", "/EvoLink/")
    return paths


async def test_what_is_nearly_the_right_token_is_a_wrong_one(here: World) -> None:
    """Another task's token, another upstream's, a shorter, longer, doubly encoded one, and one in
    another case get 401. The task does not change.
    """
    task, other = await here.submit(), await here.submit()
    for name, url in forged(here, task, other).items():
        status, headers, body = await raw(
            url, said(task, "failed"), headers=f"content-length: {len(said(task, 'failed'))}\r\n"
        )
        assert (status, json.loads(body)["error"]["code"]) == (401, "unauthorized"), name
        assert "connection" not in headers, name
    assert await heard(here, task) == []


async def test_a_path_that_is_not_a_callbacks_is_not_found(here: World) -> None:
    """A slash inside a part (plain or encoded), a missing part, and an empty part are 404. The
    answer says nothing about tokens.
    """
    task = await here.submit()
    right = here.callback_url(task["id"])
    token = right.rsplit("/", 1)[1]
    for url in (
        right + "/",
        right.replace(token, token[:9] + "%2F" + token[9:]),
        right.rsplit("/", 1)[0],
        right.replace("/evolink/", "//"),
    ):
        assert (await raw(url, b"{}", headers="content-length: 2\r\n"))[0] == 404, url
    assert await heard(here, task) == []


async def test_an_encoded_token_is_the_token(here: World, upstream: Upstream) -> None:
    """Percent-encoding spells the same address, and a query string changes nothing."""
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    right, body = here.callback_url(task["id"]), said(task, "failed")
    token = right.rsplit("/", 1)[1]
    encoded = right.replace(token, "".join(f"%{ord(letter):02x}" for letter in token))
    for url in (encoded + "?token=wrong", right):
        status, _, answer = await raw(url, body, headers=f"content-length: {len(body)}\r\n")
        assert status == 200, answer
        await judged(task["id"], body)
    await here.ended(task["id"])
    assert await heard(here, task) == [("accepted", "failed", 2)]


async def test_a_callback_is_sent_and_nothing_else(here: World, upstream: Upstream) -> None:
    """POST and PUT are accepted, because the upstream documents no method. Every other method is
    405 with any token, so it reveals nothing about the token.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    right, wrong = here.callback_url(task["id"]), here.callback_url(task["id"], "wrong")
    for method in ("GET", "HEAD", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE"):
        answers = [
            await here.stranger.request(method, url, content=said(task, "failed"))
            for url in (right, wrong)
        ]
        assert [answer.status_code for answer in answers] == [405, 405], method
        assert [set(answer.headers["allow"].split(", ")) for answer in answers] == [
            {"POST", "PUT"}
        ] * 2
    assert await heard(here, task) == []
    assert (await here.stranger.put(wrong, content=said(task, "failed"))).status_code == 401
    put = await here.stranger.put(right, content=said(task, "failed"))
    assert (put.status_code, put.json()) == (200, {"status": "accepted"})
    await here.ended(task["id"])


@pytest.mark.parametrize("method", ["POST", "GET"], ids=["wrong token", "wrong method"])
@pytest.mark.parametrize(
    "headers",
    [
        "transfer-encoding: chunked\r\n",
        "content-length: 1000000000000\r\n",
        "content-length: 1048577\r\nexpect: 100-continue\r\n",
    ],
    ids=["without end", "huge", "on demand"],
)
async def test_the_body_of_a_refused_request_is_not_read(
    method: str, headers: str, here: World
) -> None:
    """The answer arrives while the body is still in transit. The server sends no `100 Continue`,
    and it closes the connection after the answer.
    """
    url = here.callback_url("task_x", "wrong")
    endless = chunk(b"x" * 1000) if "chunked" in headers else b"x" * 1000
    parts = () if "expect" in headers else (endless,)
    status, answered, _ = await raw(url, *parts, method=method, headers=headers)
    assert status == (401 if method == "POST" else 405)
    assert answered["connection"] == "close"


@pytest.mark.parametrize(
    "length", [0, 2, callback_route.SMALL_BODY], ids=["none", "short", "at the limit"]
)
async def test_a_connection_survives_a_refused_request_with_a_short_body(
    length: int, here: World
) -> None:
    """A sender with an old token keeps its connection. The next request on it gets an answer."""
    url = httpx.URL(here.callback_url("task_gone", "wrong"))
    right = httpx.URL(here.callback_url("task_gone"))
    reader, writer = await asyncio.open_connection(url.host, url.port)
    with closing(writer):
        for path, status in ((url.path, b"401"), (right.path, b"200"), (url.path, b"401")):
            writer.write(
                f"POST {path} HTTP/1.1\r\nhost: here\r\ncontent-length: {length}\r\n\r\n".encode()
                + b"x" * length
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split(b" ", 2)[1] == status
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r")[0]))


@pytest.fixture
async def flooded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A world where every refusal after the first is delayed and gets no log line of its own for a
    second.
    """
    monkeypatch.setattr(overload, "RATE", 0.001)
    monkeypatch.setattr(overload, "BURST", 0.001)
    async with world(tmp_path, role=Role(workers=False)) as made:
        yield made


async def test_refusals_in_a_flood_are_counted_and_share_few_lines(flooded: World) -> None:
    """The metric counts every refusal. Each one has its own log line or is in another line's
    `withheld` number.
    """
    before, url = counted(flooded, "wrong_token"), flooded.callback_url("task_x", "wrong")
    with logged("info") as stream:
        flood = await asyncio.gather(
            *(flooded.stranger.post(url, content=b"{}") for _ in range(60))
        )
        assert {answer.status_code for answer in flood} == {401}
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    refusals = [line for line in lines if line["event"] == "callback.refused"]
    assert counted(flooded, "wrong_token") == before + 60
    assert {line["reason"] for line in refusals} <= {"wrong_token"}
    assert len(refusals) < 30


async def test_a_flood_fills_no_memory(flooded: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of delayed requests with a long body is limited. A request beyond the limit is
    answered at once, and its connection closes.
    """
    monkeypatch.setattr(callback_route, "MAX_DELAYED_BODIES", 0)
    monkeypatch.setattr(overload, "MAX_DELAY_S", 600)
    url = flooded.callback_url("task_x", "wrong")
    for _ in range(3):
        status, answered, _ = await raw(url, chunk(b"x"), headers="transfer-encoding: chunked\r\n")
        assert (status, answered["connection"]) == (401, "close")
