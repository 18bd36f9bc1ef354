"""Query parameters and body fields that a request has too many: a filter that is ignored gives a
wrong list, and a misspelt field a wrong picture.
"""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.web.routes.operation import Spec
from service.web.routes.table import PAGE, SPECS
from tests.api import ASYNC, SUBMIT, TIME, UNTIL_DONE, got, listed, order, refused, submitted
from tests.callbacks import connected
from tests.inputs import photo, upload
from tests.world import ADMIN_KEY, World

JSON = dict[str, Any]
LISTS = ("/v1/tasks", "/v1/endpoints", "/v1/deliveries", "/v1/keys", "/v1/files")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.method} {spec.path}")
async def test_every_route_refuses_an_unknown_parameter_and_names_the_known_ones(
    still: World, spec: Spec
) -> None:
    """The answer is 400, before anything happens. A known parameter beside it changes nothing."""
    path = re.sub(r"\{\w+\}", "nothing", spec.path)
    for query in ("promt=1", f"promt&{spec.query[-1]}=1" if spec.query else "promt"):
        answer = await still.client.request(spec.method, f"{path}?{query}")
        message = refused(answer, 400, "invalid_request", param="promt")["message"]
        assert spec.path in message
        assert all(name in message for name in spec.query or ("none",))


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("created_after=2026-01-01T00:00:00Z", "created_after"),
        ("Since=2026-01-01T00:00:00Z", "Since"),
        ("limit=1&page=2", "page"),
        ("status=completed", "status"),
        ("metadata=red", "metadata"),
        ("metadata[colour]=red", "metadata[colour]"),
        ("state.x=1", "state.x"),
        ("=1", ""),
        ("%20limit=1", " limit"),
        ("%F0%9F%98%80=1", "😀"),
        ("%ff=1", "\ufffd"),
        ("a" * 300 + "=1", "a" * 100),
        ("%00=1", "\0"),
    ],
)
async def test_a_parameter_that_resembles_a_known_one_is_unknown(
    still: World, query: str, param: str
) -> None:
    """Names are compared as they are. A long name is cut in the answer."""
    refused(await still.client.get(f"/v1/tasks?{query}"), 400, "invalid_request", param=param)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("state=completed&state=failed", "state"),
        ("metadata.k=1&metadata.k=1", "metadata.k"),
        ("limit=1&state=failed&limit=1000", "limit"),
    ],
)
async def test_a_parameter_that_is_given_twice_is_refused(
    still: World, query: str, param: str
) -> None:
    """Only one of its values could act. A list of event types may come in several."""
    refused(await still.client.get(f"/v1/tasks?{query}"), 400, "invalid_request", param=param)
    got(await still.client.get("/v1/events?type=image.task.failed&type=image.task.completed"))


async def sent(here: World, head: bytes, body: bytes = b"") -> tuple[int, JSON]:
    """Status and document of the answer to these very bytes."""
    async with connected(here.url) as (reader, writer):
        key = b"host: x\r\nconnection: close\r\nauthorization: Bearer %b" % ADMIN_KEY.encode()
        length = b"content-length: %d" % len(body)
        writer.write(b"\r\n".join([head, key, length, b"", body]))
        answer = await reader.read()
    head, _, rest = answer.partition(b"\r\n\r\n")
    document: JSON = json.loads(rest)
    return int(head.split()[1]), document


@pytest.mark.parametrize(
    ("target", "param"),
    [
        (b"/v1/tasks?created_after=2026-01-01T00:00:00Z", "created_after"),
        (b"/v1/tasks?since=2026-01-01T00:00:00Z&ower=x", "ower"),
        (b"/v1/tasks?%6Cimit=1&%6Fwer=x", "ower"),
        (b"/v1/tasks?limit=1;page=2", "limit"),
        (b"/v1/tasks?limit=1&&&x", "x"),
        (b"/v1/tasks?limit=1&%FF=2", "\ufffd"),
        (b"/v1/tasks?limit=1?page=2", "limit"),
        (b"http://x/v1/tasks?page=2", "page"),
        (b"/v1/tasks?+limit=1", " limit"),
    ],
)
async def test_raw_queries_are_checked_too(still: World, target: bytes, param: str) -> None:
    """No client library has changed them before."""
    status, document = await sent(still, b"GET %b HTTP/1.1" % target)
    assert (status, document["error"]["param"]) == (400, param), document


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/tasks?since=2026-01-01T00:00:00Z&owner=nobody",
        b"/v1/tasks?%73ince=2026-01-01T00%3A00%3A00%2B00%3A00&limit=1",
        b"/v1/tasks?",
        b"/v1/tasks?&",
        b"http://x/v1/tasks?until=2020-01-01T00:00:00Z",
    ],
)
async def test_raw_queries_with_known_names_are_answered(still: World, target: bytes) -> None:
    status, document = await sent(still, b"GET %b HTTP/1.1" % target)
    assert (status, isinstance(document.get("data"), list)) == (200, True), document


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        (b'"promt": "x"', "promt"),
        (b'"\\u0070romt": 1', "promt"),
        (b'"Size": "1x1"', "Size"),
        (b'"negativ_prompt": null', "negativ_prompt"),
        (b'"image_url": ["https://x.test/a.png"]', "image_url"),
    ],
)
async def test_raw_bodies_with_typos_are_warned_of(
    still: World, fields: bytes, warned: str
) -> None:
    """Also behind a byte order mark. The fields are passed on."""
    body = b'\xef\xbb\xbf{"model": "wan2.5-text-to-image", "prompt": "a", %b}' % fields
    head = b"POST /v1/images/generations HTTP/1.1\r\nprefer: respond-async"
    status, task = await sent(still, head, body)
    assert status == 200, task
    assert any(warned in warning for warning in task["warnings"]), task["warnings"]
    assert warned in task["request"]


async def test_what_a_request_without_its_right_asks_for_is_not_looked_at(still: World) -> None:
    """A missing key and a missing scope come first."""
    refused(await still.stranger.get("/v1/tasks?promt=1"), 401)
    async with still.owner("submit") as client:
        refused(await client.get("/v1/tasks?promt=1"), 403)


# --- times and owners


@pytest.fixture(scope="module")
async def moments(still: World) -> list[tuple[str, datetime]]:
    """Ids of an owner's tasks, oldest first, each with a time just before it."""
    made = []
    async with still.owner(name="by-time") as client:
        for _ in range(3):
            await asyncio.sleep(0.005)
            now = datetime.now(UTC)
            await asyncio.sleep(0.005)
            made.append(((await submitted(client))["id"], now))
    return made


def written(time: datetime, form: str) -> str:
    local = time.astimezone(UTC)
    if form == "offset":
        local = time + timedelta(hours=2)
        return f"{local:%Y-%m-%dT%H:%M:%S.%f}+02:00"
    if form == "unescaped":
        local = time + timedelta(hours=2)
        return f"{local:%Y-%m-%dT%H:%M:%S.%f} 02:00"
    if form == "unix":
        return str(time.timestamp())
    return f"{local:%Y-%m-%d{'T' if form == 'Z' else ' '}%H:%M:%S.%f}Z"


@pytest.mark.parametrize("form", ["Z", "offset", "unescaped", "unix", "blank"])
async def test_a_list_has_what_was_created_since_and_until(
    still: World, moments: list[tuple[str, datetime]], form: str
) -> None:
    """A time has an offset. An unescaped plus, which arrives as a blank, is read as a plus."""
    (one, _), (two, second), (three, third) = moments
    since, until = written(second, form), written(third, form)
    mine = {"owner": "by-time"}
    assert await listed(still.client, **mine) == [three, two, one]
    assert await listed(still.client, **mine, since=since) == [three, two]
    assert await listed(still.client, **mine, until=until) == [two, one]
    assert await listed(still.client, **mine, since=since, until=until) == [two]
    assert await listed(still.client, **mine, since=since, until=since) == []


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("name", ["since", "until"])
@pytest.mark.parametrize(
    "time", ["", "yesterday", "2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z", "nan"]
)
async def test_a_time_that_is_none_is_refused_by_name(
    still: World, path: str, name: str, time: str
) -> None:
    answer = await still.client.get(path, params={name: time})
    assert name in refused(answer, 400, "invalid_request", param=name)["message"]


@pytest.mark.parametrize("path", LISTS)
async def test_every_list_is_limited_by_owner_and_time(still: World, path: str) -> None:
    """An admin names any owner. Between a time and an earlier one there is nothing."""
    past, future = "2001-01-01T00:00:00Z", "2099-01-01T00:00:00Z"
    name = f"lists{path.replace('/', '-')}"
    async with still.owner(name=name) as client:
        await submitted(client)
        got(await client.post("/v1/endpoints", json={"url": "http://127.0.0.1:9/"}), 201)
        got(await upload(client, photo()), 201)
    for query, count in (
        ({"owner": name}, 1),
        ({"owner": name, "since": past, "until": future}, 1),
        ({"owner": name, "since": future}, 0),
        ({"owner": name, "until": past}, 0),
        ({"owner": "nobody"}, 0),
    ):
        found = got(await still.client.get(path, params=query))["data"]
        assert len(found) == (0 if path == "/v1/deliveries" else count), query
    answer = await still.client.get(path, params={"since": future, "until": past})
    assert got(answer)["data"] == []


@pytest.mark.parametrize("path", LISTS[:3])
async def test_only_an_admin_lists_what_others_own(still: World, path: str) -> None:
    """An owner may name itself."""
    async with still.owner(name="by-itself") as client:
        got(await client.get(path, params={"owner": "by-itself"}))
        for owner in ("admin", "nobody"):
            answer = await client.get(path, params={"owner": owner})
            refused(answer, 403, "permission_denied", param="owner")
    for owner in ("", "X", "a b", "x" * 65, "*"):
        answer = await still.client.get(path, params={"owner": owner})
        refused(answer, 400, "invalid_request", param="owner")


def test_a_list_has_the_parameters_of_every_list() -> None:
    """A route with a cursor has all of them. Budgets have no time."""
    lists = {spec.path: spec.query[-5:] for spec in SPECS if "cursor" in spec.query}
    assert lists.pop("/v1/budgets") == ("owner", "limit", "cursor")
    assert lists == dict.fromkeys(LISTS, tuple(PAGE.split("&")))


async def test_a_task_says_whose_it_is_and_when_it_ended_and_was_erased(here: World) -> None:
    """The three are in the answer, in the list and in the task's events."""
    async with here.owner(name="dated") as client:
        started = datetime.now(UTC)
        path = f"/v1/tasks/{(await submitted(client, UNTIL_DONE))['id']}"
        task = got(await client.get(path))
        assert (task["owner"], task["erased_at"]) == ("dated", None)
        assert re.fullmatch(TIME, task["ended_at"])
        ended = datetime.fromisoformat(task["ended_at"])
        assert timedelta(seconds=-1) < ended - started < timedelta(minutes=1)
        begun, terminal = got(await client.get("/v1/events"))["data"]
        assert (begun["data"]["owner"], begun["data"]["ended_at"]) == ("dated", None)
        assert terminal["data"]["ended_at"] == task["ended_at"]
        assert (await client.delete(path)).status_code == 204
        (erased,) = got(await client.get("/v1/tasks"))["data"]
        assert erased["ended_at"] == task["ended_at"]
        assert re.fullmatch(TIME, erased["erased_at"])
        assert erased["erased_at"] > task["ended_at"]


# --- fields of a body


@pytest.mark.parametrize(
    "fields",
    [
        {"promt": "a typo"},
        {"negativ_prompt": None},
        {"Size": "1x1"},
        {"image_url": "https://x.test/1.png"},
        {"seed": 7, "quality": {"deep": [1]}},
        {"image_urls": ["https://x.test/1.png"]},
        {"Ümlaut\n": 1, "": 2},
    ],
)
async def test_a_field_that_a_known_model_does_not_have_is_passed_on_with_a_warning(
    still: World, fields: JSON
) -> None:
    """A replay under the same key has the same warnings."""
    answer = await still.client.post(SUBMIT, json=order(**fields) | fields, headers=ASYNC)
    task = got(answer)
    assert task["request"] == {"size": "768x768", **fields}
    assert len(task["warnings"]) == len(fields)
    for name, warning in zip(fields, task["warnings"], strict=True):
        assert warning.startswith(f"{name} ")
        assert task["model"] in warning


async def test_the_warnings_come_again_with_a_replay(still: World) -> None:
    """The answer to a repeated request is that of the first one."""
    headers = ASYNC | {"idempotency-key": "warned"}
    first, again = [
        got(await still.client.post(SUBMIT, json=order(promt="x"), headers=headers))
        for _ in range(2)
    ]
    assert first == again
    assert len(first["warnings"]) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "prompt_extend": True, "negative_prompt": "rain", "metadata": {"promt": "x"}},
        {"callback_url": "http://127.0.0.1:9/", "size": None},
        {"model": "wan2.5-image-to-image", "image_urls": ["https://x.test/1.png"]},
        {
            "model": "gemini-3.1-flash-image-preview",
            "size": "16:9",
            "image_urls": None,
            "model_params": {},
        },
        {"model": "another-model", "promt": "x", "seed": 1},
    ],
)
async def test_known_fields_and_unknown_models_have_no_warnings(still: World, fields: JSON) -> None:
    """The service knows nothing of the fields of a model that is not in its catalogue."""
    assert (await submitted(still.client, **fields))["warnings"] == []


async def test_a_body_full_of_unknown_fields_has_16_short_warnings(still: World) -> None:
    """The answer stays small."""
    fields: JSON = {f"{number}{'x' * 200}": 1 for number in range(3000)}
    warnings = (await submitted(still.client, **fields))["warnings"]
    assert len(warnings) == 16
    assert all(len(warning) < 200 for warning in warnings)
