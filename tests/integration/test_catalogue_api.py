"""The catalogue over HTTP: its documents, refusals before the upstream is called, estimates."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.upstreams.catalogue import load_catalogue
from tests.api import SUBMIT, UNTIL_DONE, got, refused
from tests.integration.test_openapi import check
from tests.sandbox import finished, sandbox, submit
from tests.upstream import Watched
from tests.world import TEXT_TO_IMAGE, World, world

JSON = dict[str, Any]
IMAGE_TO_IMAGE = "wan2.5-image-to-image"
LINK = "https://example.com/a.png"
MODELS = load_catalogue().models
OPERATORS = """
[models.painter]
like = "wan2.5-text-to-image"
price = { credits = 0.000001 }
[models.painter.fields]
n = { type = "integer", min = 1, max = 1000000 }

[models."wan2.5-text-to-image".fields]
n = { type = "integer", min = 1, max = 2 }
"""


@pytest.fixture(scope="module")
async def own(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world with an operator's file."""
    folder = tmp_path_factory.mktemp("own")
    path = folder / "models.toml"
    path.write_text(OPERATORS)
    async with world(folder, catalogue=path) as made:
        yield made


# --- documents


async def test_the_catalogue_lists_every_model_in_one_shape(here: World) -> None:
    """The OpenAPI document describes it."""
    listed = got(await here.client.get("/v1/catalogue"))
    check(listed, "CatalogueModelList")
    assert [entry["model"] for entry in listed["data"]] == list(MODELS)
    assert listed["next_cursor"] is None


@pytest.mark.parametrize("model", MODELS)
async def test_a_model_is_shown_as_it_is_listed(here: World, model: str) -> None:
    """It has the model's upstream, fields with sources, price and example."""
    shown = got(await here.client.get(f"/v1/catalogue/{model}"))
    check(shown, "CatalogueModel")
    assert (shown["model"], shown["upstream"]) == (model, "evolink")
    assert shown["example"]["model"] == model
    for field in shown["fields"].values():
        assert field["source"]
        assert field["range"]


async def test_the_limits_of_a_model_are_those_that_are_documented(here: World) -> None:
    shown = got(await here.client.get(f"/v1/catalogue/{IMAGE_TO_IMAGE}"))
    fields, sizes, images = shown["fields"], shown["sizes"], shown["input_images"]
    assert (fields["prompt"]["min"], fields["prompt"]["max"]) == (1, 2000)
    assert (fields["n"]["min"], fields["n"]["max"], fields["n"]["default"]) == (1, 4, 1)
    assert fields["negative_prompt"]["max"] == 500
    assert fields["prompt_extend"]["default"] is True
    assert (sizes["default"], sizes["pixels"], sizes["aspect"]) == (
        "1280x1280",
        [768 * 768, 1280 * 1280],
        4,
    )
    assert (images["min"], images["max"], images["max_bytes"]) == (1, 5, 10 * 1024 * 1024)
    assert (shown["edits"], shown["price"]["credits"], shown["price"]["unit"]) == (
        True,
        2,
        "credits",
    )
    assert shown["price"]["source"]


@pytest.mark.parametrize("name", ["dall-e-9", "..", "%00", "%F0%9F%96%BC", "wan2.5", "x" * 300])
async def test_a_model_that_is_not_in_the_catalogue_is_404(here: World, name: str) -> None:
    refused(await here.client.get(f"/v1/catalogue/{name}"), 404)


@pytest.mark.parametrize("scope", ["read", "submit"])
async def test_the_catalogue_needs_a_key_that_reads_or_submits(here: World, scope: str) -> None:
    async with here.owner(scope) as client:
        got(await client.get("/v1/catalogue"))
        got(await client.post("/v1/estimates", json={"model": TEXT_TO_IMAGE}))
    async with here.owner("subscribe") as client:
        refused(await client.get("/v1/catalogue"), 403)
        refused(await client.post("/v1/estimates", json={"model": TEXT_TO_IMAGE}), 403)
    refused(await here.stranger.get("/v1/catalogue"), 401)


# --- refusals before the upstream is called


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"model": TEXT_TO_IMAGE, "prompt": "x" * 2001}, "prompt", ("2000", "2001")),
        ({"model": TEXT_TO_IMAGE}, "prompt", ("required", "2000")),
        ({"model": TEXT_TO_IMAGE, "prompt": "a", "n": 5}, "n", ("1 to 4", "5")),
        ({"model": TEXT_TO_IMAGE, "prompt": "a", "size": "1441x1440"}, "size", ("2073600",)),
        (
            {"model": TEXT_TO_IMAGE, "prompt": "a", "negative_prompt": "x" * 501},
            "negative_prompt",
            ("500", "501"),
        ),
        (
            {"model": "z-image-turbo", "prompt": "a", "negative_prompt": "b"},
            "negative_prompt",
            ("not supported",),
        ),
        ({"model": "z-image-turbo", "prompt": "a", "size": "5:1"}, "size", ("16:9", "5:1")),
        ({"model": "z-image-turbo", "prompt": "a", "seed": 0}, "seed", ("1 to 2147483647", "0")),
        ({"model": "gpt-image-2", "prompt": "x" * 32001}, "prompt", ("32000", "32001")),
        (
            {"model": "gpt-image-2", "prompt": "a", "image_urls": [LINK] * 17},
            "image_urls",
            ("16", "17"),
        ),
        ({"model": IMAGE_TO_IMAGE, "prompt": "a"}, "image_urls", ("required", "1 to 5")),
        (
            {"model": IMAGE_TO_IMAGE, "prompt": "a", "image_urls": [LINK] * 6},
            "image_urls",
            ("1 to 5", "6"),
        ),
        (
            {"model": "mj-v7", "prompt": "a", "model_params": {"speed": "warp"}},
            "model_params.speed",
            ("draft, fast, turbo", "warp"),
        ),
        ({"model": "mj-v7-pan", "model_params": {}}, "model_params.task_id", ("required",)),
        ({"model": "mj-v7", "prompt": "a", "model_params": 7}, "model_params", ("object", "7")),
        ({"model": "krea-2-turbo", "prompt": "a", "image_urls": [LINK]}, "image_urls", ("not",)),
    ],
)
async def test_a_broken_limit_is_refused_and_the_upstream_is_not_called(
    watched: Watched, body: JSON, param: str, words: tuple[str, ...]
) -> None:
    """The refusal names the field, the limit and the value. No task exists afterwards."""
    async with watched.world.owner() as client:
        answer = await client.post(SUBMIT, json=body, headers=UNTIL_DONE)
        error = refused(answer, 400, "invalid_parameter", param=param)
        assert all(word in error["message"] for word in (param, *words)), error["message"]
        assert got(await client.get("/v1/tasks"))["data"] == []
    assert not watched.upstream.received


@pytest.mark.parametrize(
    "body",
    [
        {"model": "dall-e-9", "n": 99, "size": 7, "negative_prompt": ["x"]},
        {"model": "z-image-turbo", "size": "16:9", "negative_prompt": None},
        {"model": TEXT_TO_IMAGE, "negative_prompt": "x" * 500, "colours": "all"},
    ],
)
async def test_a_model_and_a_field_that_are_not_in_the_catalogue_pass(
    watched: Watched, body: JSON
) -> None:
    """The upstream gets them as they are."""
    prompt = f"passed {body['model']}"
    async with watched.world.owner() as client:
        got(await client.post(SUBMIT, json=body | {"prompt": prompt}))
    (sent,) = watched.upstream.received.pop(prompt)
    assert json.loads(sent.body).items() >= body.items()


# --- estimates


@pytest.mark.parametrize(
    ("body", "credits", "price", "n", "per"),
    [
        ({"model": TEXT_TO_IMAGE, "n": 3}, 6, 2, 3, "image"),
        ({"model": TEXT_TO_IMAGE, "prompt": "a", "size": "1280x1280"}, 2, 2, 1, "image"),
        ({"model": "z-image-turbo", "n": 3}, 0.078, 0.026, 3, "image"),
        ({"model": "mj-v7", "model_params": {"speed": "draft"}}, 2.7, 2.7, 1, "request"),
        ({"model": "gpt-image-2", "n": 3}, None, None, 3, "image"),
        ({"model": "dall-e-9", "n": 2}, None, None, 2, "image"),
    ],
)
async def test_an_estimate_is_what_the_catalogue_says(
    watched: Watched, body: JSON, credits: float | None, price: float | None, n: int, per: str
) -> None:
    """Nothing is stored or sent."""
    async with watched.world.owner() as client:
        cost = got(await client.post("/v1/estimates", json=body))
        check(cost, "Estimate")
        assert cost == {
            "credits": credits,
            "unit": "credits",
            "price": price,
            "n": n,
            "per": per,
            "basis": "unknown" if credits is None else "catalogue",
            "budget": None,
        }
        assert got(await client.get("/v1/tasks"))["data"] == []
    assert not watched.upstream.received


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model"),
        ({"model": 7}, "model"),
        ({"model": "x" * 201}, "model"),
        ({"model": TEXT_TO_IMAGE, "n": 5}, "n"),
        ({"model": TEXT_TO_IMAGE, "size": "1x1"}, "size"),
        ({"model": TEXT_TO_IMAGE, "prompt": ""}, "prompt"),
        ({"model": "mj-v7", "negative_prompt": "x"}, "negative_prompt"),
    ],
)
async def test_an_estimate_of_what_would_be_refused_is_refused(
    here: World, body: JSON, param: str
) -> None:
    """Fields may be missing, but those that are given are within their limits."""
    refused(await here.client.post("/v1/estimates", json=body), 400, param=param)


async def test_an_estimate_needs_a_json_object(here: World) -> None:
    refused(await here.client.post("/v1/estimates", content=b"[1]"), 400)
    refused(await here.client.post("/v1/estimates", content=b'{"model":"a","model":"b"}'), 400)
    headers = {"content-type": "text/plain"}
    refused(await here.client.post("/v1/estimates", content=b"{}", headers=headers), 415)


# --- the operator's file


async def test_the_operators_file_changes_limits_and_prices(own: World) -> None:
    """Submissions, documents and estimates follow it."""
    body = {"model": TEXT_TO_IMAGE, "prompt": "a", "size": "768x768", "n": 3}
    refused(await own.client.post(SUBMIT, json=body), 400, param="n")
    shown = got(await own.client.get("/v1/catalogue/painter"))
    assert shown["source"] == "DARKROOM_CATALOGUE"
    assert shown["price"]["credits"] == 0.000001
    cost = got(await own.client.post("/v1/estimates", json={"model": "painter", "n": 999}))
    assert (cost["credits"], cost["price"]) == (0.000999, 0.000001)


# --- the sandbox


@pytest.mark.parametrize(
    "model", ["z-image-turbo", "gpt-image-2", "gemini-2.5-flash-image", "mj-v7", "mj-v7-remove-bg"]
)
async def test_a_task_of_another_model_completes_on_the_sandbox(here: World, model: str) -> None:
    """Its images are stored. Midjourney makes four."""
    example = got(await here.client.get(f"/v1/catalogue/{model}"))["example"]
    task = got(await here.client.post(SUBMIT, json=example, headers=UNTIL_DONE))
    assert (task["state"], len(task["images"])) == ("completed", 4 if model == "mj-v7" else 1)


@pytest.mark.parametrize(
    ("body", "aspect"),
    [
        ({"model": "z-image-turbo", "size": "16:9", "nsfw_check": False}, 16 / 9),
        ({"model": "gpt-image-1.5", "size": "2:3", "n": 1}, 2 / 3),
        ({"model": "gemini-3.1-flash-lite-image", "size": "1:8", "quality": "1K"}, 1 / 8),
        (
            {
                "model": "gpt-image-2-beta",
                "size": "auto",
                "resolution": "1K",
                "quality": "medium",
                "n": 1,
            },
            1,
        ),
    ],
)
async def test_the_usual_request_of_a_public_client_completes(
    here: World, body: JSON, aspect: float
) -> None:
    """A ratio decides the shape of the image."""
    asked = body | {"prompt": "a cat"}
    task = got(await here.client.post(SUBMIT, json=asked, headers=UNTIL_DONE))
    (image,) = task["images"]
    assert (task["state"], task["warnings"]) == ("completed", [])
    assert image["width"] / image["height"] == pytest.approx(aspect, rel=0.01)


async def test_the_sandbox_lists_and_knows_every_model() -> None:
    """It refuses a model that is not in the catalogue with 403, and a broken limit with 400."""
    async with sandbox() as client:
        models = got_plain(await client.get("/v1/models"))["data"]
        assert [model["id"] for model in models] == list(MODELS)
        for model, entry in MODELS.items():
            answer = await client.post(SUBMIT, json=entry.example_of(model))
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
        task = await finished(client, model="z-image-turbo", size="16:9")
        assert task["status"] == "completed"
        assert (await submit(client, model="dall-e-9")).status_code == 403
        wrong = await submit(client, model="z-image-turbo", size="5:1")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "size")


def got_plain(answer: Any) -> JSON:
    assert answer.status_code == 200, answer.text
    document: JSON = answer.json()
    return document
