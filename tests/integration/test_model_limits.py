"""Limits of single models over HTTP: what breaks one is refused with field, limit and value, and
the upstream is not called.
"""

import asyncio
from typing import Any

import pytest

from service.tasks.files import FileRow, insert_files, store_files
from service.upstreams.catalogue import load_catalogue
from service.upstreams.catalogue_fields import ImagesField
from tests.api import SUBMIT, UNTIL_DONE, got, refused
from tests.inputs import of_length, photo, upload, uploaded
from tests.limits import Figures, bodies, image_edges
from tests.upstream import Watched
from tests.world import World

JSON = dict[str, Any]
MODELS = load_catalogue().models
EDITING = [
    model
    for model, entry in MODELS.items()
    if isinstance(entry.fields.get("image_urls"), ImagesField)
]
GPT, SEEDREAM, WAN = "gpt-image-2", "doubao-seedream-4.0", "wan2.5-image-to-image"


@pytest.mark.parametrize("model", MODELS)
async def test_a_submission_beyond_a_limit_is_refused_and_the_upstream_is_not_called(
    watched: Watched, model: str
) -> None:
    """Each limit of the catalogue, one beyond it. No task exists afterwards."""
    async with watched.world.owner() as client:
        for name, limit, body, accepted in bodies(model, MODELS[model]):
            if accepted:
                continue
            answer = await client.post(SUBMIT, json=body, headers=UNTIL_DONE)
            error = refused(answer, 400, "invalid_parameter", param=name)
            assert error["message"].startswith(name), (limit, error)
        assert got(await client.get("/v1/tasks"))["data"] == []
    assert not watched.upstream.received
    assert not watched.upstream.asked


async def declared(here: World, owner: str, figures: Figures) -> str:
    """A file whose row declares these figures. Nothing of that size exists."""
    resources = here.context.resources
    row = FileRow(
        id=resources.id("file"),
        owner=owner,
        created_at=resources.store.clock(),
        expires_at=resources.store.clock() + 86_400_000,
        filename="declared",
        media_type=figures.media_type,
        bytes=figures.bytes,
        sha256="0f" * 32,
        width=figures.width,
        height=figures.height,
        alpha=figures.alpha,
        blob=f"{resources.id('file')}/0-{'0f' * 32}.png",
    )
    await resources.store.write(insert_files, row)
    await resources.store.write(store_files, row)
    return row.id


@pytest.mark.parametrize("model", EDITING)
async def test_an_input_image_beyond_a_limit_of_its_model_is_refused(
    watched: Watched, model: str
) -> None:
    """It is accepted one below the limit and at it. The second of two entries is the wrong one."""
    here, name = watched.world, f"owner-{model.replace('.', '-')}"
    entry, rule = MODELS[model], MODELS[model].fields["image_urls"]
    assert isinstance(rule, ImagesField)
    entries = ["https://example.com/a.png"] if rule.max != 1 else []
    place, resolve = len(entries), here.context.intake.inputs.resolve
    async with here.owner(name=name) as client:
        for limit, figures, measured in image_edges(rule):
            file = await declared(here, name, figures)
            if not measured:
                named = await resolve(name, [*entries, file], model)
                assert named[-1].image.id == file
                continue
            body = entry.example_of(model) | {"image_urls": [*entries, file]}
            error = refused(await client.post(SUBMIT, json=body), 400, param="image_urls")
            assert error["message"].startswith(f"image_urls[{place}]: "), error
            assert measured in error["message"], (limit, error)
        assert got(await client.get("/v1/tasks"))["data"] == []
    assert not watched.upstream.received


# --- the limits of a model in place of the common ones


@pytest.mark.parametrize(
    ("model", "content", "media_type"),
    [
        (GPT, photo("PNG", mode="RGBA"), "image/png"),
        (GPT, photo("PNG", (64, 48)), "image/png"),
        (GPT, photo("WEBP", (5200, 390)), "image/webp"),
        (GPT, of_length(11 << 20), "image/jpeg"),
        (SEEDREAM, photo("GIF", mode="P"), "image/gif"),
        (SEEDREAM, photo("TIFF"), "image/tiff"),
        (SEEDREAM, photo("PNG", (15, 15)), "image/png"),
    ],
)
async def test_an_upload_for_a_model_has_the_limits_of_that_model(
    here: World, model: str, content: bytes, media_type: str
) -> None:
    """The task completes. Without the model the upload is refused, and so is the file for a model
    that takes no such image.
    """
    async with here.owner() as client:
        assert (await upload(client, content)).status_code in (400, 413)
        file = got(await upload(client, content, model=model), 201)
        assert (file["media_type"], file["bytes"]) == (media_type, len(content))
        body = {"model": model, "prompt": "at night", "image_urls": [file["id"]]}
        task = got(await client.post(SUBMIT, json=body, headers=UNTIL_DONE))
        assert task["state"] == "completed", task
        wrong = body | {"model": WAN}
        refused(await client.post(SUBMIT, json=wrong), 400, param="image_urls")


@pytest.mark.parametrize(
    ("model", "content", "status", "words"),
    [
        (SEEDREAM, photo("PNG", (14, 15)), 400, ("at least 15", "14x15")),
        (SEEDREAM, photo("PNG", (20, 321)), 400, ("1:16", "20x321")),
        (SEEDREAM, photo("PNG", (6001, 6000), mode="1"), 400, ("36000000", "36006000")),
        (SEEDREAM, of_length((10 << 20) + 1), 413, ("10485760", "10485761")),
        (GPT, photo("BMP"), 400, ("JPEG, PNG or WEBP", "BMP")),
        (GPT, photo("GIF", mode="P"), 400, ("JPEG, PNG or WEBP", "GIF")),
        ("qwen-image-edit", photo("PNG", (3073, 384)), 400, ("384 to 3072", "3073x384")),
        ("qwen-image-edit", photo("GIF", mode="P"), 400, ("TIFF", "GIF")),
        ("dall-e-9", photo("PNG", (383, 384)), 400, ("384 to 5000", "383x384")),
    ],
)
async def test_an_upload_beyond_a_limit_of_its_model_is_refused(
    here: World, model: str, content: bytes, status: int, words: tuple[str, ...]
) -> None:
    async with here.owner() as client:
        answer = await upload(client, content, model=model)
        error = refused(answer, status, param="file")
        assert all(word in error["message"] for word in words), error["message"]
        assert got(await client.get("/v1/files"))["data"] == []


async def test_a_model_without_input_images_takes_no_upload(here: World) -> None:
    refused(await upload(here.client, photo(), model="krea-2-turbo"), 400, param="model")


@pytest.mark.parametrize(("more", "status"), [(0, b"408"), (1, b"413")])
async def test_a_body_far_over_the_limit_of_its_model_is_refused_by_its_length(
    here: World, more: int, status: bytes
) -> None:
    """50 MB and what is around a file. The body is announced and not sent."""
    size = (52 << 20) + more
    host, port = here.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/files?model={GPT} HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n"
    head += f"authorization: {here.client.headers['authorization']}\r\n"
    writer.write(f"{head}content-type: multipart/form-data; boundary=x\r\n\r\n".encode())
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    assert answer[9:12] == status or (not more and answer == b""), answer
    assert (str(size).encode() in answer) == bool(more)


async def test_a_result_and_a_data_url_have_the_limits_of_the_model(here: World) -> None:
    """A result of 64 by 48 pixels is an input of one model and not of another."""
    async with here.owner() as client:
        file = await uploaded(client)
        body: JSON = {"model": "doubao-seedream-4.5", "prompt": "wide", "size": "7680x480"}
        body |= {"image_urls": [file["id"]], "sandbox": {"format": "jpeg"}}
        image = got(await client.post(SUBMIT, json=body, headers=UNTIL_DONE))["images"][0]
        again = {"model": WAN, "prompt": "x", "image_urls": [image["id"]]}
        error = refused(await client.post(SUBMIT, json=again), 400, param="image_urls")
        assert "7680x480" in error["message"]
        again["model"] = GPT
        task = got(await client.post(SUBMIT, json=again, headers=UNTIL_DONE))
        assert (task["state"], task["inputs"][0]["width"]) == ("completed", 7680)
