"""Requests that are rejected before any work, and the marks that every answer and error carries."""

import asyncio
import gzip
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.app import Role
from service.web import bodies
from tests.api import ASYNC, SUBMIT, an_id, got, listed, order, refused, submitted
from tests.waiting import wait_until
from tests.world import World, world

JSON = dict[str, Any]


# --- what is refused
# -------------------------------------------------------------------------------------------------

SURROGATE = b'{"model": "m", "prompt": "a\\ud800b"}'


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_request"),
        (b"not json", 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
        (b'"text"', 400, "invalid_request"),
        (b"null", 400, "invalid_request"),
        (b'{"model": "m"', 400, "invalid_request"),
        (b'{"model": "m"} {}', 400, "invalid_request"),
        (b"\xef\xbb\xbf", 400, "invalid_request"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", 400, "invalid_request"),
        (b" \xef\xbb\xbf{}", 400, "invalid_request"),
        (b"{}\xef\xbb\xbf", 400, "invalid_request"),
        ('{"model": "m"}'.encode("utf-16"), 400, "invalid_request"),
        (b'{"model": "\xff"}', 400, "invalid_request"),
        (b'{"model": "a\\u0000"}', 400, "invalid_request"),
        (b'{"model": "m", "a\\u0000": 1}', 400, "invalid_request"),
        (SURROGATE, 400, "invalid_request"),
        (b'{"model": "m", "x": [{"\\udfff": 1}]}', 400, "invalid_request"),
        (b'{"model": "m", "model": "m"}', 400, "invalid_request"),
        (b'{"model": "m", "x": {"a": 1, "a": 1}}', 400, "invalid_request"),
        (b'{"model": "m", "x": NaN}', 400, "invalid_request"),
        (b'{"model": "m", "x": -Infinity}', 400, "invalid_request"),
        (b'{"model": "m", "x": 1e400}', 400, "invalid_request"),
        (b'{"model": "m", "x": ' + b"9" * 5000 + b"}", 400, "invalid_request"),
        (b'{"model": "m", "x": ' + b"[" * 101 + b"]" * 101 + b"}", 400, "invalid_request"),
        (b'{"x":' * 100_000, 400, "invalid_request"),
        (b'{"model": "m", "x": "' + b"a" * (1 << 20) + b'"}', 413, "body_too_large"),
        (b'{"model": "m"}' + b" " * ((1 << 20) - 13), 413, "body_too_large"),
    ],
)
async def test_a_body_that_is_no_plain_json_object_is_refused(
    still: World, content: bytes, status: int, code: str
) -> None:
    """The service rejects input that JSON leaves open to interpretation. It guesses, stores and
    forwards nothing.
    """
    for path in (SUBMIT, "/v1/endpoints"):
        answer = await still.client.post(
            path, content=content, headers=ASYNC | {"content-type": "application/json"}
        )
        refused(answer, status, code)


async def test_what_json_does_allow_is_taken_and_comes_back(still: World) -> None:
    """Nesting within the limit, large numbers, surrogate pairs, escapes, and a body just under the
    size limit are accepted.
    """
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    odd = {
        "deep": deep,
        "large": 10**300,
        "small": 5e-324,
        "emoji": "😀",
        "control": "\x01\x7f\u2028",
    }
    assert (await submitted(still.client, model="m", **odd))["request"] == {
        "size": "768x768",
        **odd,
    }
    body = json.dumps({"model": "m", "x": ""})
    whole = body.replace('""', '"' + "a" * ((1 << 20) - len(body)) + '"')
    answer = await still.client.post(
        SUBMIT, content=whole, headers=ASYNC | {"content-type": "application/json; charset=utf-8"}
    )
    assert len(got(answer)["request"]["x"]) == (1 << 20) - len(body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"model": "m" * 201}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a" * 2001}, "prompt"),
        ({"n": 5}, "n"),
        ({"size": "10x10"}, "size"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": "ü" * 1024}}, "metadata"),
        ({"callback_url": 7}, "callback_url"),
        ({"callback_url": "ftp://x.test/"}, "callback_url"),
        ({"callback_url": "http://8.8.8.8/"}, "callback_url"),
        ({"callback_url": "https://10.0.0.1/"}, "callback_url"),
        ({"callback_url": "https://user@x.test/"}, "callback_url"),
        ({"model_params": {"task_id": "task_aaaaaaaaaaaaaaaaaaaaaaaaaa"}}, "model_params.task_id"),
    ],
)
async def test_a_field_over_its_limit_is_refused_by_name_and_leaves_no_task(
    still: World, fields: JSON, param: str
) -> None:
    """The answer is 400 and names the field. No task is committed."""
    async with still.owner() as client:
        answer = await client.post(SUBMIT, json=order(**fields), headers=ASYNC)
        said = refused(answer, 400, param=param)
        assert param.rsplit(".", maxsplit=1)[-1] in said["message"]
        assert await listed(client) == []


async def test_metadata_up_to_its_limits_is_taken(still: World) -> None:
    """16 pairs and 2 KiB, counted in bytes, are accepted. null counts as no metadata."""
    metadata = {f"{number:02}": "ü" * 63 for number in range(16)}  # 16 × (2 + 126) = 2048
    assert (await submitted(still.client, metadata=metadata))["metadata"] == metadata
    answer = await still.client.post(
        SUBMIT, json=order() | {"metadata": None, "callback_url": None}, headers=ASYNC
    )
    assert got(answer)["metadata"] == {}


FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", FORM, "application/jsonp", ""]
)
async def test_another_media_type_is_refused(still: World, kind: str) -> None:
    """The answer is 415, before the body is parsed."""
    for path in (SUBMIT, "/v1/endpoints", "/v1/keys"):
        answer = await still.client.post(path, content=b"{}", headers={"content-type": kind})
        refused(answer, 415, "unsupported_media_type")


async def test_json_under_another_of_its_names_is_taken(still: World) -> None:
    """A missing media type counts as JSON, and so does a `+json` type."""
    for headers in (
        {},
        {"content-type": "Application/JSON"},
        {"content-type": "application/vnd.x+json"},
    ):
        got(await still.client.post(SUBMIT, content=json.dumps(order()), headers=ASYNC | headers))


@pytest.mark.parametrize(
    "text", ["{}", " {}\n", "{}\r\n", json.dumps(order()), json.dumps(order(prompt="\ufeff猫"))]
)
async def test_a_byte_order_mark_before_json_is_ignored(still: World, text: str) -> None:
    """Editors and programs on Windows write one (RFC 8259, 8.1). The service reads the rest as
    without it, also under the same idempotency key.
    """
    headers = ASYNC | {"content-type": "application/json", "idempotency-key": text.encode().hex()}
    marked, plain = [
        await still.client.post(SUBMIT, content=text.encode(encoding), headers=headers)
        for encoding in ("utf-8-sig", "utf-8")
    ]
    if "model" in text:
        assert got(marked) == got(plain)
        assert plain.headers["idempotency-replayed"] == "true"
    else:
        refused(marked, 400, "invalid_request", param="model")


async def test_a_byte_order_mark_alone_is_no_body(still: World) -> None:
    """Where the body may be missing, it may be a mark."""
    endpoint = got(
        await still.client.post("/v1/endpoints", json={"url": "http://127.0.0.1:9/"}), 201
    )
    path = f"/v1/endpoints/{endpoint['id']}/rotate"
    got(await still.client.post(path, content=b"\xef\xbb\xbf"))


@pytest.mark.parametrize(
    "coding", ["gzip", "GZIP", "x-gzip", "br", "zstd", "deflate", "identity, gzip", "aws-chunked"]
)
async def test_a_body_in_a_content_coding_is_refused(still: World, coding: str) -> None:
    """The answer is 415 and names the coding that the service reads, whatever the body is."""
    for method, path in (("POST", SUBMIT), ("POST", "/v1/keys"), ("DELETE", "/v1/keys/nothing")):
        for content in (gzip.compress(json.dumps(order()).encode()), json.dumps(order()), b""):
            answer = await still.client.request(
                method, path, content=content, headers={"content-encoding": coding}
            )
            said = refused(answer, 415, "unsupported_media_type", param="Content-Encoding")
            assert coding in said["message"]
            assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("coding", ["identity", "Identity", "", "identity, identity"])
async def test_a_body_without_a_content_coding_may_say_so(still: World, coding: str) -> None:
    got(await still.client.post(SUBMIT, json=order(), headers=ASYNC | {"content-encoding": coding}))


async def test_a_second_content_coding_in_a_line_of_its_own_is_seen(still: World) -> None:
    """Lines of one field are one list."""
    lines = [("content-encoding", "identity"), ("content-encoding", "br")]
    answer = await still.client.post(SUBMIT, json=order(), headers=lines)
    refused(answer, 415, param="Content-Encoding")


async def test_a_body_that_does_not_come_is_given_up(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is 408 after the time limit. A client that disconnects is no error."""
    monkeypatch.setattr(bodies, "BODY_S", 0.05)
    host, port = still.url.removeprefix("http://").split(":")
    wanted = f"content-type: application/json\r\ncontent-length: 10\r\n{key_of(still.client)}"
    head = f"POST {SUBMIT} HTTP/1.1\r\nhost: x\r\n{wanted}\r\n{{".encode()
    with capture_logs() as lines:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()
        monkeypatch.setattr(bodies, "BODY_S", 20)
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        await writer.drain()
        writer.close()

        def both() -> bool:
            return [line["status"] for line in lines if line["event"] == "http.request"] == [
                408,
                408,
            ]

        await wait_until(both)
    assert [line["event"] for line in lines] == ["http.request", "http.request"]


def key_of(client: httpx.AsyncClient) -> str:
    return f"authorization: {client.headers['authorization']}\r\n"


async def test_a_method_that_a_path_does_not_have_is_refused_with_those_it_has(
    still: World,
) -> None:
    """405 lists every method of the path."""
    for method, path, allowed in (
        ("GET", SUBMIT, {"POST"}),
        ("PUT", "/v1/endpoints", {"GET", "HEAD", "POST"}),
        ("POST", "/v1/endpoints/ep_x", {"GET", "HEAD", "PATCH", "DELETE"}),
        ("DELETE", "/healthz", {"GET", "HEAD"}),
    ):
        answer = await still.client.request(method, path)
        refused(answer, 405, "method_not_allowed")
        assert set(answer.headers["allow"].split(", ")) == allowed


async def test_an_unknown_path_is_not_found(still: World) -> None:
    """The answer is 404 in the common error form, with a key and without."""
    for client in (still.client, still.stranger):
        for path in ("/", "/v1", "/v1/nothing", "/v2/tasks", "/callbacks/evolink"):
            refused(await client.get(path), 404, "not_found")


async def test_without_room_for_images_nothing_new_is_taken(tmp_path: Path) -> None:
    """The answer is 503 with `Retry-After`, and no task is created. Existing tasks can still be
    read.
    """
    async with world(tmp_path, role=Role(workers=False), min_free_bytes=2**62) as here:
        refused(await here.client.post(SUBMIT, json=order(), headers=ASYNC), 503, "no_space")
        assert await listed(here.client) == []


# --- request ids
# --------------------------------------------------------------------------------------------------


async def test_a_plain_request_id_of_the_clients_is_kept(still: World) -> None:
    for given in ("abc", "A.b_c-9", "x" * 64):
        answer = await still.client.get("/v1/tasks/unknown", headers={"x-request-id": given})
        assert refused(answer, 404)["request_id"] == given


async def test_any_other_request_id_is_replaced_by_one_of_ours(still: World) -> None:
    """Characters that could break a log line or a header are not copied."""
    for given in ("", "x" * 65, "a b", 'a"b', "a;b"):
        answer = await still.client.get("/healthz", headers={"x-request-id": given})
        assert re.fullmatch(an_id("req"), answer.headers["x-request-id"])
