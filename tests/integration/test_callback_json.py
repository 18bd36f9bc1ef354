"""Callback bodies with wrong types, invalid JSON, or unreadable bytes. A callback with the right
token always gets an answer.
"""

import asyncio
import gzip
import json
import os
from typing import Any

import pytest
from sqlalchemy import Connection, select

from service.db import tables
from tests.callbacks import heard, json_test_suite, quick_world, said, verdict
from tests.upstream import Upstream, failed
from tests.world import World

WORLD = quick_world

pytestmark = pytest.mark.slow

JSON = dict[str, Any]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\x00{not json",
        b'{"status": 7}',
        b'{"status": "failed", "status": "completed"}',
        b'{"status":"\\ud800"}',
        b"[" * 200_000,
    ],
    ids=["empty", "list", "garbage", "no status", "twice", "surrogate", "deep"],
)
async def test_an_unreadable_body_gets_the_upstream_asked(
    body: bytes, here: World, upstream: Upstream
) -> None:
    """The token proves the sender. The answer is 200 `unreadable`, a part of the body is stored,
    and the service queries the upstream once however often the body arrives.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    assert await verdict(here, task, body) == "unreadable"
    await here.ended(task["id"])
    assert await verdict(here, task, body) == "unreadable"
    assert await heard(here, task) == [("unreadable", None, 2)]
    assert upstream.asked[task["upstream_id"]] == 1


async def test_what_is_kept_of_an_unreadable_body_is_capped(here: World) -> None:
    """At most 16 KiB of an unreadable body are stored."""
    task = await here.submit()
    assert await verdict(here, task, b"x" * 100_000) == "unreadable"
    found = await here.context.resources.store.read(kept_bytes, task["id"])
    assert found == [16 * 1024]


def kept_bytes(connection: Connection, task_id: str) -> list[int]:
    return [
        len(body)
        for body in connection.execute(
            select(tables.callbacks.c.body).where(tables.callbacks.c.task_id == task_id)
        ).scalars()
    ]


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
async def test_a_compressed_body_is_unreadable(
    coding: str, here: World, upstream: Upstream
) -> None:
    """The upstream documents no content coding, and decompression is a risk. The service reads the
    bytes as they are and queries the upstream.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    packed = gzip.compress(said(task, "completed"))
    assert await verdict(here, task, packed, content_encoding=coding) == "unreadable"
    assert (await here.ended(task["id"]))["state"] == "failed"
    assert await verdict(here, task, said(task, "failed"), content_encoding=coding) == "duplicate"


@pytest.mark.parametrize(
    "type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "x" * 5000,
    ],
)
async def test_the_media_type_of_a_callback_is_ignored(
    type: str, here: World, upstream: Upstream
) -> None:
    """The upstream documents no headers, so the service parses the body whatever its media type."""
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    assert await verdict(here, task, said(task, "failed"), content_type=type) == "accepted"
    await here.ended(task["id"])


HUGE = "9" * 4300
VALUES = (
    "null",
    "true",
    "7",
    "-1",
    "1.5",
    "1e400",
    "-1e400",
    "1e-400",
    HUGE,
    '""',
    '"x"',
    "[]",
    "[[]]",
    "[null, 7, {}]",
    "{}",
    '{"a": [1]}',
)
FIELDS = (
    "results",
    "result_data",
    "error",
    "progress",
    "model",
    "created",
    "task_info",
    "usage",
    "type",
)
NESTED = {
    "error": ("code", "message", "type"),
    "task_info": ("can_cancel", "estimated_time"),
    "usage": ("billing_rule", "credits_reserved", "credits_used", "user_group"),
}


EACH = 1 if "DARKROOM_TEST_ALL" in os.environ else 3
STATES = ("processing", "failed", "completed")


def bodies(task: JSON, field: str, status: str) -> list[bytes]:
    """Bodies with each value in the field, and with an object of every value in it. The three
    states of a task share the bodies, unless DARKROOM_TEST_ALL is set.
    """
    start = f'{{"id": "{task["upstream_id"]}", "status": "{status}", "{field}": '
    inner = [f'{{"{name}": {value}}}' for name in NESTED.get(field, ("url",)) for value in VALUES]
    return [
        f"{start}{value}}}".encode()
        for value in (*VALUES, *inner, *(f"[{value}]" for value in inner))
    ][STATES.index(status) % EACH :: EACH]


@pytest.mark.parametrize("field", FIELDS)
async def test_a_field_may_have_any_type(field: str, here: World, upstream: Upstream) -> None:
    """Only `id` and `status` have required types. Values of other types in the remaining fields
    break nothing, in any state of the task.
    """
    task = await here.submit()
    sent = bodies(task, field, "processing")
    assert set(await asyncio.gather(*(verdict(here, task, body) for body in sent))) == {"accepted"}
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    sent = [*bodies(task, field, "failed"), *bodies(task, field, "completed")]
    assert set(await asyncio.gather(*(verdict(here, task, body) for body in sent))) <= {
        "accepted",
        "duplicate",
        "conflict",
    }
    assert (await here.ended(task["id"]))["error"]["code"] == "service_error"


@pytest.mark.parametrize("field", ["id", "status"])
async def test_an_id_or_a_status_of_another_type_is_unreadable(
    field: str, here: World, upstream: Upstream
) -> None:
    """A body without a status, or with an id that no task can have, is unreadable."""
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    usual = {"id": task["upstream_id"], "status": "completed"}
    values: list[object] = [7, 1.5, True, [], {}, [task["upstream_id"]]]
    for value in values:
        assert (
            await verdict(here, task, json.dumps(usual | {field: value}).encode()) == "unreadable"
        )
    assert (await here.ended(task["id"]))["state"] == "failed"


@pytest.mark.parametrize(
    "body",
    [b"%s{}", b"[%s]", b"\xff%s", b"/* */ %s"],
    ids=["twice", "in a list", "no UTF-8", "comment"],
)
async def test_what_is_not_quite_an_object_is_unreadable(
    body: bytes, here: World, upstream: Upstream
) -> None:
    """Which part of the body is the object would be a guess. The service rejects the body and
    queries the upstream.
    """
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    assert await verdict(here, task, body % said(task, "completed")) == "unreadable"
    assert (await here.ended(task["id"]))["state"] == "failed"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
async def test_an_encoding_other_than_utf_8_is_unreadable(
    encoding: str, here: World, upstream: Upstream
) -> None:
    """JSON between systems is UTF-8 (RFC 8259, 8.1)."""
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    assert (
        await verdict(here, task, said(task, "completed").decode().encode(encoding)) == "unreadable"
    )
    assert (await here.ended(task["id"]))["state"] == "failed"


@pytest.mark.parametrize("value", ['"', "[1", "{1}", "1]"])
async def test_a_value_that_ends_the_parsing_makes_a_body_unreadable(
    value: str, here: World, upstream: Upstream
) -> None:
    """What follows it would be a guess. tests/partial.py has the values that do not end it."""
    task = await here.submit()
    upstream.queries[task["upstream_id"]] = [failed("service_error")]
    body = said(task, "completed", extra="?").replace(b'"?"', value.encode())
    assert await verdict(here, task, body) == "unreadable"
    assert (await here.ended(task["id"]))["state"] == "failed"


# Of what is no JSON, some is read all the same, such as NaN or a text with a line end.
KINDS = {"y": {"accepted"}, "n": {"accepted", "unreadable"}, "i": {"accepted", "unreadable"}}


async def test_the_public_json_test_suite_as_bodies(here: World, upstream: Upstream) -> None:
    """Each of its 318 files arrives as a body and as a field of one. All JSON is accepted, nothing
    else breaks the service, and the tasks end.
    """
    suite = list(json_test_suite().items())
    assert len(suite) == 318

    async def send(task: JSON, name: str, text: bytes) -> None:
        assert await verdict(here, task, text) == "unreadable", name  # no file has a status
        within = said(task, "processing", extra="?").replace(b'"?"', text)
        assert await verdict(here, task, within) in KINDS[name[0]], name

    for start in range(6):
        task = await here.submit()
        await asyncio.gather(*(send(task, *file) for file in suite[start::6]))
        upstream.queries[task["upstream_id"]] = [failed("service_error")]
        assert await verdict(here, task, said(task, "failed")) == "accepted"
        assert (await here.ended(task["id"]))["error"]["code"] == "service_error"
