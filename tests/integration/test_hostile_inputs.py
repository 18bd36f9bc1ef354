"""Hostile and odd input images: headers that lie, animations, cut uploads, forms and names."""

import asyncio
import base64
import io
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import httpx
import pytest
from PIL import Image

from service.images.validator_child import validate_file
from tests.api import SUBMIT, UNTIL_DONE, got, refused
from tests.inputs import of_length, photo, upload, uploaded
from tests.waiting import wait_until
from tests.world import World

JSON = dict[str, Any]
EDIT = {"model": "wan2.5-image-to-image", "prompt": "x", "size": "768x768"}
FORM = "multipart/form-data; boundary=x"


def chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png(width: int, height: int, data: bytes = b"\x00" * 101) -> bytes:
    """A PNG whose header claims these sides."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + info + bytes(100)


def animated(format: str, frames: int = 3, size: tuple[int, int] = (400, 390)) -> bytes:
    pictures = [Image.new("RGB", size, (60 * number, 20, 200)) for number in range(frames)]
    content = io.BytesIO()
    pictures[0].save(content, format, save_all=True, append_images=pictures[1:], duration=50)
    return content.getvalue()


def turned() -> bytes:
    """A JPEG that a viewer shows upright: 500 pixels wide as it is stored, 400 as it is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    with Image.new("RGB", (500, 400), 90) as image:
        image.save(content, "JPEG", exif=exif)
    return content.getvalue()


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    head = f'--x\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + content + b"\r\n"


async def post(client: httpx.AsyncClient, body: bytes, **query: str) -> httpx.Response:
    headers = {"content-type": FORM}
    return await client.post("/v1/files", content=body, headers=headers, params=query)


# --- headers that lie


@pytest.mark.parametrize(
    ("content", "sides"),
    [
        (png(65535, 65535), "65535x65535"),
        (png(2**31 - 1, 2**31 - 1), ""),
        (png(5000, 5001), "5000x5001"),
        (png(1, 400), "1x400"),
        (bmp(60000, 60000), "60000x60000"),
        (bmp(400, -400), ""),
        (png(4000, 4000), ""),
        (png(400, 400)[:40], ""),
    ],
)
async def test_a_header_that_claims_too_much_is_refused_quickly(
    here: World, content: bytes, sides: str
) -> None:
    """Nothing of the claimed size is decoded, and the service goes on."""
    async with here.owner() as client:
        for model in ("", "gpt-image-2"):
            query = {"model": model} if model else {}
            async with asyncio.timeout(25):  # the first one starts a child
                error = refused(await upload(client, content, **query), 400, param="file")
            if not model:
                assert sides in error["message"]
        assert got(await client.get("/v1/files"))["data"] == []
        await uploaded(client)


@pytest.mark.parametrize("format", ["WEBP", "PNG", "GIF"])
async def test_an_animation_counts_with_all_its_frames(
    here: World, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept byte for byte for a model that takes its format. The limit of decoded pixels holds
    for all frames together.
    """
    content, path = animated(format), tmp_path / "animation"
    async with here.owner() as client:
        file = got(await upload(client, content, model="doubao-seedream-4.0"), 201)
        shown = await client.get(f"/v1/files/{file['id']}/content")
        assert shown.content == content
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # which the child sets for itself
    pixels = 400 * 390
    for most, valid in ((3 * pixels, True), (3 * pixels - 1, False)):
        answer = validate_file(
            str(path), compressed=False, max_bytes=1 << 20, max_pixels=most, flatten=False
        )
        assert ("valid" in answer) == valid, answer


async def test_an_image_that_a_viewer_turns_keeps_its_bytes(here: World) -> None:
    """Its sides are those of the file."""
    async with here.owner() as client:
        file = await uploaded(client, turned())
        assert (file["width"], file["height"]) == (500, 400)
        shown = await client.get(f"/v1/files/{file['id']}/content")
        assert shown.content == turned()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
async def test_flatten_keeps_orientation_and_colours(here: World, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = photo(format, mode="RGBA", exif=exif.tobytes(), icc_profile=b"profile")
    async with here.owner() as client:
        file = got(await upload(client, content, flatten="white"), 201)
        shown = (await client.get(f"/v1/files/{file['id']}/content")).content
    with Image.open(io.BytesIO(shown)) as image:
        assert image.mode == "RGB"
        assert image.getexif()[0x0112] == 6
        assert image.info["icc_profile"] == b"profile"


# --- data: URLs


@pytest.mark.parametrize(
    "url",
    [
        "data:text/html;base64," + base64.b64encode(photo()).decode(),
        "data:," + quote_from_bytes(photo("WEBP")),
        "data:image/webp," + quote_from_bytes(photo("WEBP"), safe=""),
        "data:image/png;base64," + base64.urlsafe_b64encode(photo()).decode().rstrip("="),
        "DATA:image/png;charset=x;BASE64," + base64.b64encode(photo()).decode().replace("+", "%2B"),
        " data:image/png;base64,\n" + base64.encodebytes(photo()).decode(),
    ],
    ids=["wrong type", "percent", "percent all", "URL-safe", "percent in base64", "lines"],
)
async def test_a_data_url_counts_by_its_content(here: World, url: str) -> None:
    async with here.owner() as client:
        body = EDIT | {"image_urls": [url]}
        task = got(await client.post(SUBMIT, json=body, headers=UNTIL_DONE))
        assert (task["state"], task["inputs"][0]["width"]) == ("completed", 400)


@pytest.mark.parametrize(
    "url", ["data:,", "data:image/png;base64,", "data:;base64,====", "data:image/png", "data:"]
)
async def test_an_empty_data_url_is_refused(here: World, url: str) -> None:
    async with here.owner() as client:
        error = refused(
            await client.post(SUBMIT, json=EDIT | {"image_urls": [url]}), 400, param="image_urls"
        )
        assert error["message"].startswith("image_urls[0]: ")


# --- which files a submission leaves


async def test_a_refused_submission_leaves_no_file_of_its_data_urls(here: World) -> None:
    """A wrong second entry, or a budget that is too small. What was uploaded before stays."""
    name, url = "owner-without-files", "data:image/png;base64," + base64.b64encode(photo()).decode()
    async with here.owner(name=name) as client:
        file = await uploaded(client)
        body = EDIT | {"image_urls": [file["id"], url, "nothing"]}
        refused(await client.post(SUBMIT, json=body), 400, param="image_urls")
        budget = {"period": "total", "credits": 1}
        got(await here.client.put(f"/v1/budgets/{name}", json=budget))
        body = EDIT | {"image_urls": [file["id"], url]}
        assert (await client.post(SUBMIT, json=body)).status_code == 402
        assert got(await client.get("/v1/files"))["data"] == [file]


async def test_the_same_file_twice_is_one_copy(here: World) -> None:
    async with here.owner() as client:
        file = await uploaded(client)
        body = EDIT | {"image_urls": [file["id"], file["id"]]}
        task = got(await client.post(SUBMIT, json=body, headers=UNTIL_DONE))
        assert [each["id"] for each in task["inputs"]] == [file["id"]] * 2
    tasks = (await here.sandbox.get("/sandbox/tasks")).json()["data"]
    (links,) = (each["image_urls"] for each in tasks if each["id"] == task["upstream_id"])
    assert links[0] == links[1]


async def test_an_erased_file_and_that_of_another_owner_are_refused_alike(here: World) -> None:
    """The refusal does not tell which of both it is."""
    async with here.owner() as one, here.owner() as other:
        theirs, erased = await uploaded(one), await uploaded(other)
        assert (await other.delete(f"/v1/files/{erased['id']}")).status_code == 204
        said = set()
        for id in (theirs["id"], erased["id"], "file_" + "a" * 26):
            error = refused(
                await other.post(SUBMIT, json=EDIT | {"image_urls": [id]}), 400, param="image_urls"
            )
            said.add(error["message"].replace(id, "ID"))
        assert len(said) == 1


# --- forms


async def test_a_chunked_upload_without_a_length_is_taken_and_bounded(here: World) -> None:
    async def pieces(content: bytes) -> AsyncIterator[bytes]:
        body = part("file", content, "a.jpg") + b"--x--\r\n"
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    headers = {"content-type": FORM}
    async with here.owner() as client:
        small = await client.post("/v1/files", content=pieces(photo()), headers=headers)
        assert got(small, 201)["bytes"] == len(photo())
        long = await client.post(
            "/v1/files", content=pieces(of_length((10 << 20) + 5)), headers=headers
        )
        assert str((10 << 20) + 5) in refused(long, 413, "file_too_large", param="file")["message"]


@pytest.mark.parametrize("sent", [0.1, 0.5, 0.99])
async def test_an_upload_that_is_cut_keeps_nothing(here: World, sent: float) -> None:
    """The connection ends in the middle of the body. No temporary file stays."""
    body = part("file", photo("BMP"), "a.bmp") + b"--x--\r\n"
    async with here.owner() as client:
        host, port = here.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM}\r\n"
        head += f"authorization: {client.headers['authorization']}\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        writer.write(body[: int(len(body) * sent)])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert got(await client.get("/v1/files"))["data"] == []
        await uploaded(client)
    incoming = here.settings.image_dir / ".incoming"
    await wait_until(lambda: not incoming.exists() or not any(incoming.iterdir()))


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (part("file", photo(), "a") + part("file", photo(), "b") + b"--x--\r\n", "two parts"),
        (part("files", photo(), "a") + b"--x--\r\n", "file is required"),
        (part("FILE", photo(), "a") + b"--x--\r\n", "file is required"),
        (part("file[]", photo(), "a") + b"--x--\r\n", "file is required"),
        (part("fileName", b"x" * 5000) + part("file", photo()) + b"--x--\r\n", "4096"),
        (part("fileName", b"\xff\xfe") + part("file", photo()) + b"--x--\r\n", ""),
        (part("file", photo(), "a") + part("fileName", b"x" * 9000) + b"--x--\r\n", "4096"),
        (part("file", photo(), "a") + b"--x", "boundary"),
        (b"--x--\r\n", "file is required"),
        (b"", "boundary"),
    ],
)
async def test_a_form_without_exactly_one_file_is_refused(
    here: World, body: bytes, word: str
) -> None:
    async with here.owner() as client:
        assert word in refused(await post(client, body), 400, param="file")["message"]
        assert got(await client.get("/v1/files"))["data"] == []


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\a.png", "a.png"),
        ("/", None),
        ("..", None),
        ("", None),
        ("a\x00b\x1b[31m.png", "ab[31m.png"),
        ("a\u202egnp.exe", "agnp.exe"),
        ("  spaced .png ", "spaced .png"),
        ("x" * 300 + ".png", "x" * 255),
        ("雪.png", "雪.png"),
    ],
)
async def test_a_filename_is_plain(here: World, filename: str, shown: str | None) -> None:
    """Its last part, without what no terminal prints. Without a name, the file is called by its
    id.
    """
    async with here.owner() as client:
        for body in (
            part("file", photo(), "" if "\x00" in filename else filename)
            + part("fileName", filename.encode()),
            part("fileName", filename.encode()) + part("file", photo()),
        ):
            file = got(await post(client, body + b"--x--\r\n"), 201)
            assert file["filename"] == (shown or f"{file['id']}.png")


async def test_other_parts_of_a_form_do_not_count(here: World) -> None:
    body = part("uploadPath", b"/etc") + part("file", photo(), "a.png") + part("note", b"x" * 9000)
    async with here.owner() as client:
        assert got(await post(client, body + b"--x--\r\n"), 201)["filename"] == "a.png"
