"""What a key can make the service reach. A submit key opens no connection that its holder could not
open from outside.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator

import pytest
from starlette.responses import Response

from tests.api import ASYNC, SUBMIT, an_id, got, order, refused, submitted
from tests.hostile import Guarded, guarded, place
from tests.upstream import document, picture
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, subscriber


@pytest.fixture(scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path_factory.mktemp("reach")) as made:
        await wait_until(lambda: made.recorded.requests)  # the start's own call
        yield made


@pytest.fixture
def here(there: Guarded) -> Iterator[World]:
    """The world. At the end of the test only the service and its upstream were connected to."""
    with there.watched():
        yield there.world


async def test_the_key_stays_with_the_upstream(here: World, there: Guarded) -> None:
    """No download sends the upstream's key: not to the host of a result link, and not to the
    upstream itself after a redirect.
    """
    there.upstream.files["last"] = [Response(picture(), media_type="image/png")]

    def onward(_number: int, _request: object) -> Response:
        return Response(status_code=302, headers={"location": f"{here.sandbox_url}/files/last"})

    async with subscriber() as files:
        there.allowed.add(place(files.url))
        files.answer = onward
        task = await there.completed(f"{files.url}/first")
        assert task["state"] == "completed"
        fetched = [
            headers for target, headers in there.recorded.requests if target == "GET /files/last"
        ]
        for headers in (files.received[0].headers, fetched[-1]):
            assert not {"authorization", "cookie", "idempotency-key"} & headers.keys()
            assert "sandbox" not in " ".join(headers.values())
    asked = [
        headers
        for target, headers in there.recorded.requests
        if not target.startswith("GET /files/")
    ]
    assert {headers["authorization"] for headers in asked} == {"Bearer sandbox"}


async def test_no_call_goes_by_a_proxy_of_the_environment(
    here: World, there: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would resolve names itself and see the key. Submissions, queries and downloads use no
    proxy and no password from a netrc.
    """
    netrc = here.settings.data_dir / "netrc"
    netrc.write_text("machine 127.0.0.1 login nobody password hidden\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        monkeypatch.setenv(name, f"http://127.0.0.1:{there.trap.port}")
    there.upstream.files["direct"] = [Response(picture(), media_type="image/png")]
    assert (await there.completed(f"{here.sandbox_url}/files/direct"))["state"] == "completed"
    assert "authorization" not in dict(there.recorded.requests)["GET /files/direct"]


# --- requests with a submit key
# --------------------------------------------------------------------------------------


async def test_what_is_passed_on_is_not_looked_at(here: World, there: Guarded) -> None:
    """The service passes links in every field but `callback_url` on and follows none. The upstream
    always gets the service's own `callback_url`, although the client sends similar names.
    """
    link, known = f"http://127.0.0.2:{there.trap.port}/a.png", len(there.recorded.requests)
    public = f"https://private.evil.test:{there.trap.port}/a.png"  # by its text
    fields = {
        "image_urls": [public],
        "mask_url": public,
        "webhook": link,
        "Callback_URL": link,
        "callbackUrl": link,
        "base_url": link,
    }
    inside = {"callback_url": link, "url": link}
    async with here.owner("submit") as client:
        task = await submitted(
            client, {}, model="another", prompt="passed on", model_params=inside, **fields
        )
    sent = json.loads(there.upstream.received["passed on"][0].body)
    assert sent.items() >= (fields | {"model_params": inside}).items()
    assert list(sent)[-1] == "callback_url"  # a reader that ignores case takes the last
    assert sent["callback_url"].startswith(f"{here.url}/callbacks/evolink/{task['id']}/")
    assert [target for target, _ in there.recorded.requests[known:]] == [
        "POST /v1/images/generations"
    ]


PATHS = (
    *(
        "task-unified-../../v1/credits",
        "task-unified-/../../credits",
        "task-unified-%2F..%2F..%2Fcredits",
        "task-unified-%2e%2e%2fx",
    ),
    *(
        "task-unified-%252F..%252Fcredits",
        "task-unified-..%5C..%5Ccredits",
        "task-unified-x%3Fa=b",
        "task-unified-x%23",
        "task-unified-x;a=b",
    ),
    *(
        "task-unified-x%00",
        "task-unified-x%0d%0aX:%20y",
        "task-unified-x%20HTTP/1.1",
        "task-unified-@127.0.0.2",
        "task-unified-%C3%BC",
    ),
    *(
        "../credits",
        "%2e%2e/credits",
        "..%2Fcredits",
        "task-unified-x/timeline",
        "task-unified-",
        "TASK-UNIFIED-x",
        "task-unified-..",
    ),
)


async def asked(here: World, target: str, host: str, key: str) -> int:
    """The status of a GET whose target and Host are sent unchanged."""
    place = here.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(place[0], int(place[1]))
    writer.write(
        (
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nConnection:"
            " close\r\n\r\n"
        ).encode()
    )
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer.split(b" ")[1])


@pytest.mark.parametrize("path", PATHS)
async def test_no_id_reaches_past_the_upstreams_tasks(
    path: str, here: World, there: Guarded
) -> None:
    """The service never sends an id upstream that a proxy could read as a path, a query or a
    header.
    """
    known = len(there.recorded.requests)
    for ending in ("", "/timeline"):
        assert await asked(here, f"/v1/tasks/{path}{ending}", "darkroom.test", ADMIN_KEY) in (
            400,
            404,
        )
    for target in (f"/v1/tasks/{path}?url=http://127.0.0.2/", f"http://127.0.0.2/v1/tasks/{path}"):
        assert await asked(here, target, "127.0.0.2", ADMIN_KEY) in (400, 404)
    later = [target for target, _ in there.recorded.requests[known:]]
    assert [target for target in later if target != "GET /v1/credits"] == []  # the start asks that


async def test_an_unknown_task_is_asked_for_by_its_id_alone(here: World, there: Guarded) -> None:
    """The Host, the forwarding headers and an absolute target of a request change neither the URL
    nor the host of the query to the upstream.
    """
    there.upstream.queries["task-unified-1-aB_9"] = [
        document("processing", id="task-unified-1-aB_9")
    ]
    known, elsewhere = len(there.recorded.requests), f"127.0.0.2:{there.trap.port}"
    for target in (
        "/v1/tasks/task-unified-1-aB_9",
        f"http://{elsewhere}/v1/tasks/task-unified-1-aB_9",
    ):
        assert (
            await asked(
                here,
                target,
                f"{elsewhere}\r\nX-Forwarded-Host: {elsewhere}\r\nForwarded: host={elsewhere}",
                ADMIN_KEY,
            )
            == 200
        )
    assert [target for target, _ in there.recorded.requests[known:]] == [
        "GET /v1/tasks/task-unified-1-aB_9"
    ] * 2
    assert {headers["host"] for _, headers in there.recorded.requests[known:]} == {
        here.sandbox_url.removeprefix("http://")
    }


async def test_links_do_not_follow_the_host_header(here: World, there: Guarded) -> None:
    """A task's links lead to the service's address, although the request names another host."""
    there.upstream.files["linked"] = [Response(picture(), media_type="image/png")]
    task = await there.completed(f"{here.sandbox_url}/files/linked")
    answer = await here.client.get(
        f"/v1/tasks/{task['id']}", headers={"host": "evil.test", "x-forwarded-host": "evil.test"}
    )
    assert re.fullmatch(f"{here.url}/images/{an_id('img')}.png", got(answer)["results"][0])


async def test_nobody_builds_on_another_owners_task(here: World, there: Guarded) -> None:
    """`model_params.task_id` accepts only a task of the caller's owner, by the service's id and by
    the upstream's id.
    """
    async with here.owner("submit") as mine, here.owner("submit") as yours:
        task = await submitted(mine, {}, prompt="mine")
        assert task["upstream_id"]
        for name in (task["id"], task["upstream_id"]):
            stolen = await yours.post(
                SUBMIT, json=order(prompt="stolen", model_params={"task_id": name}), headers=ASYNC
            )
            refused(stolen, 400, "invalid_parameter", param="model_params.task_id")
            await submitted(mine, {}, prompt=f"own {name}", model_params={"task_id": name})
            assert json.loads(there.upstream.received[f"own {name}"][0].body)["model_params"] == {
                "task_id": task["upstream_id"]
            }
    assert "stolen" not in there.upstream.received
