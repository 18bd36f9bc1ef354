"""A client written for the upstream works against this service unchanged.

Every test runs against both with the same assertions. Only the address and the key differ.
"""

import io
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import ip_network
from typing import Any

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.upstreams.sandbox import SandboxOptions
from tests.api import got
from tests.documented import Callbacks, Cancelled, Client, Failure, Images, Refusal, outcome, saved
from tests.waiting import wait_until
from tests.world import LOOPBACK, World, answering, world

pytestmark = pytest.mark.slow

JSON = dict[str, Any]
ORDER = {"model": "wan2.5-text-to-image", "prompt": "a lighthouse", "size": "768x768"}
KEY = "the-account's-key"
BOTH = ("upstream", "darkroom")
PRICE = Decimal(2)  # of the catalogue


@dataclass(frozen=True, slots=True)
class Address:
    url: str
    key: str

    def client(self, key: str | None = None) -> Client:
        return Client(self.url, key or self.key, wait_until)


async def addresses(here: World) -> dict[str, Address]:
    """The upstream itself, and the service with a key that may see the account's credits."""
    body = {"owner": "client", "scopes": ["submit", "read", "admin"]}
    key = got(await here.client.post("/v1/keys", json=body), 201)["key"]
    return {"upstream": Address(here.sandbox_url, KEY), "darkroom": Address(here.url, key)}


@pytest.fixture(scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Address]]:
    sandbox = SandboxOptions(
        fetch_inputs=False,
        api_key=KEY,
        networks=(ip_network(LOOPBACK),),
        delay_s=0.1,
        callback_delays_s=(0.05, 0.05, 0.05),
    )
    async with world(tmp_path_factory.mktemp("both"), sandbox=sandbox, evolink_api_key=KEY) as here:
        yield await addresses(here)


@pytest.fixture(params=BOTH)
def address(request: pytest.FixtureRequest, both: dict[str, Address]) -> Address:
    return both[request.param]


@pytest.fixture
async def client(address: Address) -> AsyncIterator[Client]:
    async with address.client() as made:
        yield made


# --- submit, poll, read
# ----------------------------------------------------------------------------------------------


async def test_a_submission_is_answered_as_documented(client: Client) -> None:
    """The answer comes at once with a pending task, its reserved credits, and an estimated
    duration.
    """
    task = await client.submit(**ORDER, n=2, prompt_extend=True, sandbox={"delay": 600})
    assert type(task["created"]) is int
    assert (task["object"], task["type"], task["model"]) == (
        "image.generation.task",
        "image",
        ORDER["model"],
    )
    assert (task["status"], task["progress"]) == ("pending", 0)
    assert task["task_info"]["can_cancel"] is True
    assert type(task["task_info"]["estimated_time"]) is int
    assert task["usage"] == task["usage"] | {
        "billing_rule": "per_call",
        "credits_reserved": 2 * PRICE,
        "user_group": "default",
    }
    assert outcome(await client.task(task["id"])) is None


@pytest.mark.parametrize("shape", [None, "objects", "result_data"])
async def test_four_images_are_four_links_to_pictures_of_the_size(
    client: Client, shape: str | None
) -> None:
    """Results come in any of the documented shapes. They are fetched without a key and charged by
    their number.
    """
    task = await client.ended((await client.submit(**ORDER, n=4, sandbox={"results": shape}))["id"])
    end = outcome(task)
    assert isinstance(end, Images)
    assert (task["progress"], len(set(end.urls)), end.credits) == (100, 4, 4 * PRICE)
    files = await saved(end.urls)
    assert len(set(files)) == 4
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(768, 768)}


async def test_images_are_made_from_images(client: Client) -> None:
    """`image_urls` and other models' fields are passed on."""
    inputs = ["https://x.test/a.png"]
    order = await client.submit(
        model="wan2.5-image-to-image", prompt="at night", size="768x768", image_urls=inputs, seed=7
    )
    task = await client.ended(order["id"])
    assert isinstance(outcome(task), Images)


async def test_credits_are_what_is_left(client: Client) -> None:
    """One image costs the documented amount."""
    before = await client.credits()
    await client.ended((await client.submit(**ORDER))["id"])
    assert await client.credits() == before - PRICE


# --- what goes wrong
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"size": "64x64"}, 400, "size"),
        ({"size": "4096x4096"}, 400, "size"),
        ({"size": "3000x200"}, 400, "size"),
        ({"size": "large"}, 400, "size"),
        ({"n": 5}, 400, "n"),
        ({"n": 0}, 400, "n"),
        ({"prompt": "x" * 2001}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"model": None}, 400, "model"),
        ({"negative_prompt": "x" * 501}, 400, "negative_prompt"),
        ({"model": "wan2.5-image-to-image"}, 400, "image_urls"),
        ({"callback_url": "http://10.0.0.1/"}, 400, "callback_url"),
        ({"callback_url": "https://10.0.0.1/"}, 400, "callback_url"),
        ({"callback_url": "https://127.0.0.1/" + "x" * 2048}, 400, "callback_url"),
        ({"model": "another-model"}, 403, "model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
async def test_a_bad_request_is_refused_by_name(
    client: Client, fields: JSON, status: int, param: str
) -> None:
    """The answer is 400 with the field, or 403 for a model that the account may not use. Nothing is
    charged.
    """
    before = await client.credits()
    with pytest.raises(Refusal) as caught:
        await client.submit(**{**ORDER, **fields})
    assert (caught.value.status, caught.value.param) == (status, param)
    assert (
        caught.value.code
        in {
            400: ("invalid_request", "invalid_parameter", "invalid_parameters"),
            403: ("model_access_denied",),
        }[status]
    )
    assert str(caught.value)
    assert await client.credits() == before


async def test_a_body_that_is_too_large_is_413(client: Client) -> None:
    """The documentation names only the status."""
    with pytest.raises(Refusal) as caught:
        await client.submit(**ORDER, more="x" * (1 << 20))
    assert caught.value.status == 413


async def test_a_wrong_key_is_401_everywhere(address: Address, client: Client) -> None:
    task = await client.submit(**ORDER, sandbox={"delay": 600})
    async with address.client("wrong") as stranger:
        for call in (
            stranger.submit(**ORDER),
            stranger.task(task["id"]),
            stranger.task("unknown"),
            stranger.credits(),
        ):
            with pytest.raises(Refusal) as caught:
                await call
            assert (caught.value.status, caught.value.code) == (401, "unauthorized")


@pytest.mark.parametrize(
    "id", ["task-unified-1757165031-uyujaw3d", "task-unified-unknown", "unknown"]
)
async def test_an_unknown_task_is_404(client: Client, id: str) -> None:
    """The form of the id does not matter."""
    with pytest.raises(Refusal) as caught:
        await client.task(id)
    assert (caught.value.status, caught.value.code) == (404, "task_not_found")


@pytest.mark.parametrize(
    "code",
    [
        "content_policy_violation",
        "invalid_parameters",
        "image_processing_error",
        "image_dimension_mismatch",
        "service_error",
        "generation_timeout",
        "resource_exhausted",
        "quota_exceeded",
        "service_unavailable",
        "generation_failed_no_content",
        "unknown_error",
    ],
)
async def test_a_failed_task_says_why_and_costs_nothing(client: Client, code: str) -> None:
    """The test covers every documented code except the ones for a cancelled and for an expired
    task.
    """
    before = await client.credits()
    task = await client.ended((await client.submit(**ORDER, sandbox={"fail": code}))["id"])
    end = outcome(task)
    assert isinstance(end, Failure)
    assert (end.code, task["error"]["type"], bool(end.message), task.get("results", [])) == (
        code,
        "task_error",
        True,
        [],
    )
    assert await client.credits() == before


@pytest.mark.parametrize("form", ["status", "code"])
async def test_a_cancelled_task_is_cancelled_in_either_form(client: Client, form: str) -> None:
    """The status or an error's code marks the cancel."""
    assert (
        outcome(await client.ended((await client.submit(**ORDER, sandbox={"cancel": form}))["id"]))
        == Cancelled()
    )


async def test_too_many_requests_are_sent_again(client: Client) -> None:
    """After a 429, a client that waits for the requested time gets its task."""
    refusal = {"submit_status": {"status": 429, "retry_after": 0, "times": 1}}
    task = await client.submit(**ORDER, idempotency_key=uuid.uuid4().hex, sandbox=refusal)
    assert isinstance(outcome(await client.ended(task["id"])), Images)


async def test_without_credits_it_is_402(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The service and the upstream both answer 402, and an order that the credits cover goes
    through.
    """
    sandbox = SandboxOptions(
        fetch_inputs=False,
        api_key=KEY,
        networks=(ip_network(LOOPBACK),),
        credits=2 * PRICE,
        delay_s=0.05,
    )
    async with world(tmp_path_factory.mktemp("poor"), sandbox=sandbox, evolink_api_key=KEY) as here:
        for address in (await addresses(here)).values():
            async with address.client() as client:
                with pytest.raises(Refusal) as caught:
                    await client.submit(**ORDER, n=4)
                assert (caught.value.status, caught.value.code) == (402, "insufficient_quota")
                await client.submit(**ORDER)


async def test_errors_of_the_older_pages_are_read_like_the_newer_ones(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The code of these errors is the status."""

    async def refuse(_: Request) -> Response:
        return JSONResponse(
            {
                "error": {
                    "code": 400,
                    "message": "no such size",
                    "type": "invalid_request_error",
                    "param": "size",
                }
            },
            400,
        )

    app = Starlette(routes=[Route("/v1/images/generations", refuse, methods=["POST"])])
    async with world(tmp_path_factory.mktemp("old"), upstream=app, evolink_api_key=KEY) as here:
        for address in (await addresses(here)).values():
            async with address.client() as client:
                with pytest.raises(Refusal) as caught:
                    await client.submit(**ORDER)
            said = caught.value
            assert (said.status, said.code, said.param, str(said)) == (
                400,
                "invalid_request",
                "size",
                "no such size",
            )


# --- callbacks and idempotency
# ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Receiver:
    """The client's own `callback_url`. It rejects the first request and accepts every later one."""

    url: str
    callbacks: Callbacks
    refusals: int = 1

    async def take(self, request: Request) -> Response:
        if self.refusals:
            self.refusals -= 1
            return Response(status_code=500)
        self.callbacks.take(request.headers, json.loads(await request.body()))
        return Response(status_code=200)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver("", Callbacks({}))
    async with answering(Starlette(routes=[Route("/done", made.take, methods=["POST"])])) as url:
        made.url = f"{url}/done"
        yield made


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({}, Images),
        ({"fail": "content_policy_violation"}, Failure),
        ({"cancel": "status"}, Cancelled),
    ],
)
async def test_the_end_is_called_back_with_the_querys_body(
    client: Client, receiver: Receiver, fault: JSON, kind: type
) -> None:
    """The task is completed, failed or cancelled. The callback is sent again after the receiver
    failed, and it has the same billing as the query.
    """
    task = await client.submit(**ORDER, n=2, callback_url=receiver.url, sandbox=fault)
    await wait_until(lambda: task["id"] in receiver.callbacks.bodies)
    called, asked = receiver.callbacks.bodies[task["id"]], await client.ended(task["id"])
    assert isinstance(outcome(called), kind)
    assert outcome(called) == outcome(asked)
    told = ("id", "created", "model", "object", "type", "status", "progress", "usage", "error")
    assert {name: called.get(name) for name in told} == {name: asked.get(name) for name in told}
    if (end := outcome(called)) and isinstance(end, Images):
        assert len(await saved(end.urls)) == 2


async def test_one_idempotency_key_is_one_task(client: Client) -> None:
    """The same body returns the same task, and another body is a conflict."""
    key = uuid.uuid4().hex
    task, replayed = await client.submission(key, **ORDER)
    again, replayed_again = await client.submission(key, **ORDER)
    assert (again["id"], replayed, replayed_again) == (task["id"], False, True)
    with pytest.raises(Refusal) as caught:
        await client.submission(key, **ORDER, n=2)
    assert (caught.value.status, caught.value.code) == (409, "idempotency_conflict")
