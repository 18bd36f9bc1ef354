"""OpenAI's library for Python, unmodified, with another base URL, key and one header."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, order, submitted
from tests.upstream import Upstream, picture
from tests.world import TEXT_TO_IMAGE, World, world


def opened(here: World) -> Any:
    """A client that asks to wait in every request."""
    openai = importlib.import_module("openai")  # which takes a second
    key = here.client.headers["authorization"].removeprefix("Bearer ")
    url, headers = f"{here.url}/v1", {"Prefer": "wait=30"}
    return openai.AsyncOpenAI(base_url=url, api_key=key, default_headers=headers)


@pytest.fixture
async def client(here: World) -> Any:
    async with opened(here) as made:
        yield made


@pytest.mark.parametrize("n", [1, 2])
async def test_the_library_gets_the_links_of_the_images(here: World, client: Any, n: int) -> None:
    """`r.data[0].url` is the link of the first stored image, and so on."""
    made = await client.images.generate(
        model=TEXT_TO_IMAGE, prompt="a lighthouse", size="768x768", n=n
    )
    task = await here.task(made.id)
    assert [image.url for image in made.data] == task["results"]
    assert made.created == task["created"]
    for image in made.data:
        assert (await here.stranger.get(image.url)).headers["content-type"] == "image/png"


async def test_the_library_may_ask_for_one_request_alone(client: Any) -> None:
    """A header of the request replaces the client's. A task that has not ended has no data."""
    one = {"Prefer": "wait=31"}
    made = await client.images.generate(
        model=TEXT_TO_IMAGE, prompt="a", size="768x768", extra_headers=one
    )
    assert len(made.data) == 1
    made = await client.images.generate(
        model=TEXT_TO_IMAGE,
        prompt="a",
        size="768x768",
        extra_headers={"Prefer": "respond-async"},
        extra_body={"sandbox": {"delay": 600}},
    )
    assert made.data is None


@pytest.mark.parametrize("fields", [{}, {"n": 2, "size": "768x768"}, {"user": "someone"}])
async def test_litellm_gets_the_links_of_the_images(
    here: World, client: Any, fields: dict[str, Any]
) -> None:
    """`litellm.image_generation` sends its requests through this library. It repeats the headers
    that its caller adds in the body.
    """
    more = {"Prefer": "wait=30"}
    answer = await client.with_options(default_headers={}).images.with_raw_response.generate(
        model=TEXT_TO_IMAGE,
        prompt="a lighthouse",
        **fields,
        extra_headers=more,
        extra_body={"extra_headers": more},
    )
    made = answer.http_response.json()
    task = await here.task(made["id"])
    assert [image["url"] for image in made["data"]] == task["results"]
    assert len(made["data"]) == fields.get("n", 1)


async def test_an_upstream_with_openais_own_answer_serves_the_library(tmp_path: Path) -> None:
    """The upstream answers at once with `{"created", "data"}` and no id. The library gets the
    service's link.
    """
    upstream = Upstream()
    upstream.files["0.png"] = [Response(picture(), media_type="image/png")]
    async with world(tmp_path, upstream=upstream.app) as here:
        data = [{"url": f"{here.sandbox_url}/files/0.png"}]
        upstream.submits["at once"] = [JSONResponse({"created": 1, "data": data})]
        async with opened(here) as client:
            made = await client.images.generate(model="own-model", prompt="at once")
        assert made.data[0].url.startswith(f"{here.url}/images/img_")
        assert (await here.stranger.get(made.data[0].url)).content == picture()


async def test_the_library_raises_for_a_refusal(client: Any) -> None:
    """The error has the service's code and parameter."""
    with pytest.raises(importlib.import_module("openai").BadRequestError) as caught:
        await client.images.generate(model=TEXT_TO_IMAGE, prompt="a", size="9x9")
    assert (caught.value.param, caught.value.type) == ("size", "invalid_request_error")


async def test_a_task_that_failed_has_no_data(here: World) -> None:
    """The list is empty, and the error says why."""
    task = await submitted(here.client, UNTIL_DONE, sandbox={"fail": "content_policy_violation"})
    assert (task["data"], task["error"]["code"]) == ([], "content_policy_violation")


@pytest.mark.parametrize("headers", [{}, ASYNC, {"prefer": "wait=0"}])
async def test_a_client_that_does_not_wait_gets_the_usual_task(
    here: World, headers: dict[str, str]
) -> None:
    task = await submitted(here.client, headers, sandbox={"delay": 600})
    assert task["data"] is None


@pytest.mark.parametrize(
    "prefer", ["wait=29", "wait=30", 'wait="30"', "respond-async, wait=25", "WAIT=20"]
)
async def test_every_form_of_the_preference_counts(here: World, prefer: str) -> None:
    answer = await here.client.post(SUBMIT, json=order(), headers={"prefer": prefer})
    task = got(answer)
    assert [each["url"] for each in task["data"]] == task["results"] != []
    assert answer.headers["preference-applied"].startswith("wait=")
    assert got(await here.client.get(f"/v1/tasks/{task['id']}")) == task
