"""Requests as clients spell them that were written for other services."""

import re

import pytest

from tests.api import SUBMIT, UNTIL_DONE, an_id, got, order, refused, submitted
from tests.world import World


@pytest.mark.parametrize(
    "path", ["/v1/tasks", "/v1/events", "/v1/endpoints", "/healthz", "/v1/models"]
)
async def test_a_path_may_end_with_a_slash(here: World, path: str) -> None:
    """The response is the one without the slash, not a redirect."""
    plain, slash = await here.client.get(path), await here.client.get(f"{path}/?")
    assert (slash.status_code, slash.json().keys()) == (200, plain.json().keys())


async def test_a_submission_and_its_task_may_have_a_slash(here: World) -> None:
    async with here.owner() as client:
        task = got(await client.post(f"{SUBMIT}/", json=order(), headers=UNTIL_DONE))
        assert got(await client.get(f"/v1/tasks/{task['id']}/")).items() <= task.items()
        assert got(await client.get(f"/v1/tasks/{task['id']}/timeline/"))["data"]
        image = await here.stranger.get(f"{task['results'][0]}/")
        assert (image.status_code, image.headers["content-type"]) == (200, "image/png")
        refused(await client.put(f"{SUBMIT}/", json=order()), 405)
        refused(await client.get("/v1/nothing/"), 404)
        refused(await client.get("/v1/tasks//"), 404)


@pytest.mark.parametrize("url", ["", " ", "\t", "\n", " \r\n "])
async def test_an_empty_callback_url_is_none(here: World, url: str) -> None:
    """The task is accepted, and nothing is delivered. A repetition without the field is the same
    request.
    """
    async with here.owner() as client:
        headers = {**UNTIL_DONE, "idempotency-key": "one"}
        task = await submitted(client, headers, callback_url=url)
        assert task["state"] == "completed"
        assert got(await client.get("/v1/deliveries", params={"task": task["id"]}))["data"] == []
        assert (await submitted(client, headers))["id"] == task["id"]


@pytest.mark.parametrize("url", [0, [], {}, False, "no address"])
async def test_any_other_callback_url_is_checked(here: World, url: object) -> None:
    answer = await here.client.post(SUBMIT, json=order(callback_url=url))
    refused(answer, 400, "invalid_parameter", param="callback_url")


async def test_a_link_ends_with_the_extension_of_its_image(here: World) -> None:
    """A client that takes the name of a file from the link gets the extension. A link without it
    leads to the same image.
    """
    task = await submitted(here.client, UNTIL_DONE)
    (link,) = task["results"]
    assert re.fullmatch(f"{here.url}/images/{an_id('img')}[.]png", link)
    assert task["images"][0]["url"] == link
    whole = await here.stranger.get(link)
    assert whole.content == (await here.stranger.get(link.removesuffix(".png"))).content
