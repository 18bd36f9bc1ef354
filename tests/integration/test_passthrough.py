"""Requests that the upstream answers: credits, models, tasks from outside this service, and ids in
`model_params`.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.app import Role
from service.tasks import upstream_check
from tests.api import ASYNC, SUBMIT, got, order, refused, submitted
from tests.upstream import Upstream, error, page
from tests.waiting import wait_until
from tests.world import World, world

pytestmark = pytest.mark.slow

JSON = dict[str, Any]
THEIRS = "task-unified-1757165031-uyujaw3d"
QUERY = f"/v1/tasks/{THEIRS}"
EVERY_PATH = pytest.mark.parametrize("path", ["/v1/credits", "/v1/models", QUERY])


@dataclass(slots=True)
class Elsewhere:
    """An upstream with one answer to every request. `asked` has the targets of its requests,
    unchanged.
    """

    answer: Response = field(default_factory=Response)
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    async def take(self, request: Request) -> Response:
        self.asked.append(request.scope["raw_path"].decode())
        self.headers.append(dict(request.headers))
        return self.answer


@pytest.fixture(scope="module")
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture(scope="module")
async def there(
    elsewhere: Elsewhere, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """The service makes no call of its own after the first."""
    app, role = Starlette(routes=[Route("/{path:path}", elsewhere.take)]), Role(workers=False)
    folder = tmp_path_factory.mktemp("there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream_check, "WAITS_S", (3600.0,))
        async with world(folder, role=role, upstream=app, submit_schedule="3600") as made:
            await wait_until(lambda: elsewhere.asked)
            yield made


@pytest.fixture
async def reader(there: World) -> AsyncIterator[httpx.AsyncClient]:
    async with there.owner("admin") as client:
        yield client


# --- credits and models
# ----------------------------------------------------------------------------------------------


async def test_credits_and_models_are_the_sandboxs_own_answers(here: World) -> None:
    """The service passes these answers through byte for byte."""
    for path in ("/v1/credits", "/v1/models"):
        answer = await here.client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert answer.content == (await here.sandbox.get(path)).content


@pytest.mark.parametrize("path", ["/v1/credits", "/v1/models"])
@pytest.mark.parametrize("status", [200, 203, 400, 402, 403, 404, 418, 429])
async def test_an_answer_in_json_keeps_its_status_and_its_bytes(
    elsewhere: Elsewhere, reader: httpx.AsyncClient, path: str, status: int
) -> None:
    """The client gets no cookie or other header of the upstream, and the media type is always JSON.
    The upstream gets the service's key, and no cookie or request id of the client.
    """
    body = b'{"error": {"code":401,\n "message":"\xc3\xbc"}}'
    elsewhere.answer = Response(
        body, status, {"set-cookie": "a=b", "content-type": "text/html", "x-secret": "1"}
    )
    answer = await reader.get(path, headers={"cookie": "c=d", "x-request-id": "mine"})
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (
        status,
        body,
        "application/json",
    )
    assert not {"set-cookie", "x-secret"} & answer.headers.keys()
    assert ("retry-after" in answer.headers) is (status == 429)
    assert elsewhere.asked[-1] == path
    assert elsewhere.headers[-1]["authorization"] == "Bearer sandbox"
    assert not {"cookie", "x-request-id"} & elsewhere.headers[-1].keys()


@EVERY_PATH
@pytest.mark.parametrize(
    "answer",
    [
        error(500, "internal_error"),
        error(502, "upstream_error"),
        error(503, "service_unavailable"),
        page(200),
        page(403),
        page(524),
        Response(b"", 200),
        Response(b'{"id": "' + THEIRS.encode(), 200),
        Response(b"[" * 100_000, 200),
        Response(b'"text"', 200),
        Response(b"", 302, {"location": "/v1/credits"}),
    ],
    ids=lambda answer: f"{answer.status_code}-{len(answer.body)}",
)
async def test_an_unusable_upstream_answer_is_503_in_the_common_form(
    elsewhere: Elsewhere, reader: httpx.AsyncClient, path: str, answer: Response
) -> None:
    """Upstream faults, gateway pages, redirects and truncated answers become 503, so that the
    client retries and sees no 5xx of the service itself.
    """
    elsewhere.answer = answer
    refused(await reader.get(path), 503, "upstream_unavailable")


@EVERY_PATH
@pytest.mark.parametrize(
    "answer",
    [
        error(401, "unauthorized"),
        JSONResponse({"error": {"code": 401, "message": "the API key is missing or wrong"}}, 401),
        page(401),
        Response(b"", 401),
        error(403, "key_disabled"),
        error(403, "ip_restricted"),
    ],
    ids=["401", "old 401", "page", "empty", "key", "ip"],
)
async def test_a_refusal_of_our_key_is_not_shown_as_the_clients(
    elsewhere: Elsewhere, reader: httpx.AsyncClient, path: str, answer: Response
) -> None:
    """The client's own key is in order, so the status is 503 with a code of its own."""
    elsewhere.answer = answer
    said = await reader.get(path)
    assert refused(said, 503, "upstream_account_refused")["message"].startswith("the upstream")
    assert said.headers["retry-after"] == "60"


@EVERY_PATH
@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        (429, "7", "7"),
        (429, None, "60"),
        (429, "0", "1"),
        (503, "9", "9"),
        (503, None, "30"),
        (502, "soon", "5"),
    ],
)
async def test_when_to_come_again_is_the_upstreams_word(
    elsewhere: Elsewhere,
    reader: httpx.AsyncClient,
    path: str,
    status: int,
    said: str | None,
    told: str,
) -> None:
    """`Retry-After` comes from the upstream. Without a valid value the service uses its default for
    the status.
    """
    elsewhere.answer = error(status, "busy", **({} if said is None else {"retry_after": said}))
    answer = await reader.get(path)
    assert (answer.status_code, answer.headers["retry-after"]) == (
        429 if status == 429 else 503,
        told,
    )


async def test_without_an_upstream_the_answer_is_503(tmp_path: Path) -> None:
    """A refused connection is no fault of the client."""
    async with world(
        tmp_path, role=Role(workers=False), evolink_base_url="http://127.0.0.1:9"
    ) as alone:
        for path in ("/v1/credits", "/v1/models", QUERY):
            refused(await alone.client.get(path), 503, "upstream_unavailable")


# --- tasks
# --------------------------------------------------------------------------------------------------


async def test_a_task_that_was_submitted_past_this_service_is_shown_as_the_upstream_shows_it(
    here: World,
) -> None:
    """The service shows the task byte for byte to every client that has its id. It has no timeline
    and no cancel for it.
    """
    theirs = (await here.sandbox.post(SUBMIT, json=order(sandbox={"delay": 600}))).json()["id"]
    async with here.owner("read", "submit") as client:
        answer = await client.get(f"/v1/tasks/{theirs}")
        assert "state" not in got(answer)
        assert answer.content == (await here.sandbox.get(f"/v1/tasks/{theirs}")).content
        refused(await client.get(f"/v1/tasks/{theirs}/timeline"), 404, "task_not_found")
        refused(await client.post(f"/v1/tasks/{theirs}/cancel"), 404, "task_not_found")


async def test_a_task_that_nobody_has_is_404_in_the_one_form(here: World) -> None:
    """An admin gets the same answer."""
    async with here.owner("read") as client:
        for each in (client, here.client):
            refused(await each.get(QUERY), 404, "task_not_found")


@pytest.mark.parametrize(
    "name",
    [
        "1%3fa=b",
        "%2e%2e",
        "1;a",
        "1%3ba",
        "1.json",
        "1%23",
        "1%5c..",
        "1%25",
        "%c3%bc",
        "1%0d",
        "",
        "1%20",
        "1:2",
    ],
)
async def test_a_name_that_could_be_read_as_more_is_never_sent(
    there: World, elsewhere: Elsewhere, name: str
) -> None:
    """The service sends no id that could contain a path, a query or a path parameter. It answers
    404 without a call.
    """
    before = len(elsewhere.asked)
    refused(await there.client.get(f"/v1/tasks/task-unified-{name}"), 404)
    assert len(elsewhere.asked) == before


@pytest.mark.parametrize(
    "id", [None, "task-unified-1757165031-UYUJAW3D", "task-unified-1757165031-other000", 7]
)
async def test_an_upstream_answer_about_another_task_is_rejected(
    elsewhere: Elsewhere, reader: httpx.AsyncClient, id: object
) -> None:
    """The service rejects an upstream answer with another id, so it shows no owner another owner's
    task.
    """
    elsewhere.answer = JSONResponse(
        {"id": id, "status": "completed", "results": ["https://files.evolink.ai/secret.png"]}
    )
    refused(await reader.get(QUERY), 404, "task_not_found")
    elsewhere.answer = JSONResponse({"id": THEIRS, "status": "completed"})
    assert got(await reader.get(QUERY)) == {"id": THEIRS, "status": "completed"}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 422])
async def test_a_refusal_to_show_a_task_is_404_or_our_fault(
    elsewhere: Elsewhere, reader: httpx.AsyncClient, status: int
) -> None:
    """A refusal in any words becomes 404. A refusal of the service's own key becomes 503, because a
    client cannot fix it. So does a 403 for another reason, because it does not say whether there
    is such a task.
    """
    elsewhere.answer = error(status, "whatever")
    refused(
        await reader.get(QUERY),
        *{401: (503, "upstream_account_refused"), 403: (503, "upstream_unavailable")}.get(
            status, (404, "task_not_found")
        ),
    )


# --- a task whose id is not known yet
# --------------------------------------------------------------------------------


async def test_nobody_else_sees_a_task_whose_submission_brought_no_answer(tmp_path: Path) -> None:
    """The upstream knows the task, and the service does not know its id. Only its owner and admins
    see such a task.
    """
    async with world(tmp_path) as here, here.owner() as ann, here.owner() as bob:
        task = await submitted(ann, {}, sandbox={"lose_answer": True, "delay": 600})
        assert (task["state"], task["upstream_id"]) == ("uncertain", None)
        (created,) = (await here.sandbox.get("/sandbox/tasks")).json()["data"]
        path = f"/v1/tasks/{created['id']}"
        for client in (ann, here.client):
            assert got(await client.get(path))["id"] == created["id"]
        refused(await bob.get(path), 404, "task_not_found")


# --- model_params.task_id
# --------------------------------------------------------------------------------------------


async def naming(
    client: httpx.AsyncClient, task_id: object, headers: dict[str, str] = ASYNC
) -> httpx.Response:
    return await client.post(
        SUBMIT,
        json=order(prompt="follows", model_params={"task_id": task_id, "k": 1}),
        headers=headers,
    )


async def test_a_task_is_built_on_by_either_id(tmp_path: Path) -> None:
    """The service translates its own id and sends the upstream's id unchanged. `request` has the
    client's value.
    """
    upstream = Upstream()
    async with world(tmp_path, upstream=upstream.app) as here, here.owner() as client:
        first = await submitted(client, {})
        for number, name in enumerate((first["id"], first["upstream_id"])):
            task = got(await naming(client, name, {}))
            assert task["request"]["model_params"] == {"task_id": name, "k": 1}
            assert json.loads(upstream.received["follows"][number].body)["model_params"] == {
                "task_id": first["upstream_id"],
                "k": 1,
            }


async def test_a_task_that_the_upstream_does_not_have_yet_cannot_be_built_on(still: World) -> None:
    """The answer is 409 while the task waits, and 400 once it can no longer be submitted."""
    async with still.owner() as client:
        task = await submitted(client)
        refused(
            await naming(client, task["id"]),
            409,
            "task_not_submitted",
            param="model_params.task_id",
        )
        got(await client.post(f"/v1/tasks/{task['id']}/cancel"))
        refused(
            await naming(client, task["id"]), 400, "invalid_parameter", param="model_params.task_id"
        )
        assert len(got(await client.get("/v1/tasks"))["data"]) == 1


async def test_nothing_but_ones_own_can_be_built_on(here: World) -> None:
    """Another owner's task and an unknown task get the same error message, by either id. The
    service stores and sends nothing.
    """
    async with here.owner() as ann, here.owner() as bob:
        task = await submitted(ann, {}, sandbox={"delay": 600})
        names = (task["id"], task["upstream_id"], "task_aaaaaaaaaaaaaaaaaaaaaaaaaa", THEIRS)
        said = [
            refused(await naming(bob, name), 400, "invalid_parameter", param="model_params.task_id")
            for name in names
        ]
        assert len({each["message"] for each in said}) == 1
        assert got(await bob.get("/v1/tasks"))["data"] == []
        got(await naming(bob, 7, {}))


async def test_an_admin_builds_on_anybodys(tmp_path: Path) -> None:
    """An admin may also build on a task from outside this service."""
    upstream = Upstream()
    async with world(tmp_path, upstream=upstream.app) as here, here.owner() as client:
        task = await submitted(client, {})

        def sent() -> set[str]:
            return {
                json.loads(each.body)["model_params"]["task_id"]
                for each in upstream.received["follows"]
            }

        for name in (task["id"], THEIRS):
            got(await naming(here.client, name))
        await wait_until(lambda: sent() == {task["upstream_id"], THEIRS})
