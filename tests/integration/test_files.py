"""Input images over HTTP: upload, checks, list, content, erasure."""

import asyncio
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from service.db.snapshot import copy_database, reading, stored_images
from service.images.sweep import AGE_MS, sweep
from service.upkeep.retention import Retention
from tests.api import got, refused
from tests.blobs import put
from tests.inputs import of_length, photo, upload, uploaded
from tests.world import World, world

MB10 = 10 << 20


async def raw(here: World, head: str, body: bytes, key: str) -> bytes:
    """The answer to an upload over a raw socket."""
    host, port = here.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n{head}\r\n"
    writer.write(request.encode() + body)  # the answer may come before all of it is sent
    async with asyncio.timeout(30):
        answer = await reader.readuntil(b"\r\n\r\n")
        (length,) = re.findall(rb"content-length: (\d+)", answer)
        answer += await reader.readexactly(int(length))
    writer.close()
    return answer


async def test_an_uploaded_image_is_shown_as_it_was_stored(here: World) -> None:
    """All figures are those of the bytes, and the content comes back byte for byte."""
    content = photo("PNG", (500, 400))
    async with here.owner() as client:
        file = got(await upload(client, content, "C:\\my\\Foto é.png"), 201)
        assert file == {
            "id": file["id"],
            "object": "file",
            "created": file["created"],
            "filename": "Foto é.png",
            "media_type": "image/png",
            "bytes": len(content),
            "width": 500,
            "height": 400,
            "sha256": hashlib.sha256(content).hexdigest(),
            "expires_at": file["expires_at"],
        }
        assert got(await client.get(f"/v1/files/{file['id']}")) == file
        shown = await client.get(f"/v1/files/{file['id']}/content")
        assert (shown.content, shown.headers["content-type"]) == (content, "image/png")


@pytest.mark.parametrize(
    ("format", "mode", "media_type"),
    [
        ("JPEG", "RGB", "image/jpeg"),
        ("JPEG", "L", "image/jpeg"),
        ("PNG", "RGB", "image/png"),
        ("PNG", "P", "image/png"),
        ("BMP", "RGB", "image/bmp"),
        ("WEBP", "RGB", "image/webp"),
    ],
)
async def test_the_format_is_that_of_the_content(
    here: World, format: str, mode: str, media_type: str
) -> None:
    """The name of the file and its declared type do not count."""
    async with here.owner() as client:
        file = got(await upload(client, photo(format, mode=mode), "wrong.gif"), 201)
    assert file["media_type"] == media_type


@pytest.mark.parametrize(
    ("size", "status"),
    [
        ((383, 400), 400),
        ((384, 384), 201),
        ((385, 385), 201),
        ((400, 383), 400),
        ((4999, 384), 201),
        ((5000, 384), 201),
        ((5001, 384), 400),
        ((384, 5000), 201),
        ((384, 5001), 400),
    ],
)
async def test_a_side_has_384_to_5000_pixels(
    here: World, size: tuple[int, int], status: int
) -> None:
    """A refusal names the field, the limits and the measured size."""
    async with here.owner() as client:
        answer = await upload(client, photo("JPEG", size))
    assert answer.status_code == status, answer.text
    if status == 400:
        message = refused(answer, 400, "invalid_parameter", param="file")["message"]
        assert "384 to 5000" in message
        assert f"{size[0]}x{size[1]}" in message


@pytest.mark.parametrize(("length", "status"), [(MB10 - 1, 201), (MB10, 201), (MB10 + 1, 413)])
async def test_a_file_has_at_most_ten_megabytes(here: World, length: int, status: int) -> None:
    async with here.owner() as client:
        answer = await upload(client, of_length(length))
    assert answer.status_code == status, answer.text
    if status == 413:
        message = refused(answer, 413, "file_too_large", param="file")["message"]
        assert str(MB10) in message
        assert str(length) in message


@pytest.mark.parametrize("length", [(12 << 20) + 1, 1 << 33, 10**19])
async def test_a_body_far_over_the_limit_is_refused_by_its_announced_length(
    here: World, length: int
) -> None:
    """The refusal names the limit of the file, and the length of the body."""
    head = f"content-type: multipart/form-data; boundary=x\r\ncontent-length: {length}\r\n"
    answer = await raw(here, head, b"--x\r\n", "test-admin-key-0123456789")
    assert answer.startswith(b"HTTP/1.1 413")
    reason = f"the file has at most {MB10} bytes (10 MB), and the body is one of {length} bytes"
    assert reason.encode() in answer


async def test_a_file_far_over_the_limit_is_refused_before_it_ends(here: World) -> None:
    """A body in chunks announces no length."""
    pieces = b"".join(b"%x\r\n%b\r\n" % (1 << 20, bytes(1 << 20)) for _ in range(14))
    head = f"{FORM}transfer-encoding: chunked\r\n"
    body = b"%x\r\n%b\r\n%b0\r\n\r\n" % (len(PART), PART, pieces)
    answer = await raw(here, head, body, "test-admin-key-0123456789")
    assert answer.startswith(b"HTTP/1.1 413")
    assert f"the file has at most {MB10} bytes (10 MB), and this one has ".encode() in answer


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (photo("PNG", mode="RGBA"), "alpha"),
        (photo("PNG", mode="LA"), "alpha"),
        (photo("PNG", mode="P", transparency=0), "alpha"),
        (photo("GIF", mode="P"), "GIF"),
        (photo("TIFF"), "TIFF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (b"%PDF-1.7", "no picture"),
        (b"", "0 bytes"),
        (photo("PNG")[:-20], "not whole"),
        (photo("JPEG", (800, 800))[:700], ""),
        (photo("WEBP", (800, 800))[:-9], ""),
        (photo("BMP")[:-2000], ""),
    ],
)
async def test_other_formats_alpha_and_broken_files_are_refused(
    here: World, content: bytes, word: str
) -> None:
    async with here.owner() as client:
        error = refused(await upload(client, content), 400, param="file")
        assert word in error["message"]
        assert got(await client.get("/v1/files"))["data"] == []


async def test_flatten_puts_an_image_with_alpha_on_white(here: World) -> None:
    """The stored file is the flattened one. An image without alpha stays byte for byte."""
    async with here.owner() as client:
        file = got(await upload(client, photo("PNG", mode="RGBA"), flatten="white"), 201)
        content = (await client.get(f"/v1/files/{file['id']}/content")).content
        plain = got(await upload(client, photo("PNG"), flatten="white"), 201)
        refused(await upload(client, photo(), flatten="black"), 400, param="flatten")
    with Image.open(io.BytesIO(content)) as image:
        assert (image.mode, image.format) == ("RGB", "PNG")
        assert image.getpixel((5, 5)) == (132, 172, 227)
    assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert plain["sha256"] == hashlib.sha256(photo("PNG")).hexdigest()


FORM = "content-type: multipart/form-data; boundary=x\r\n"
PART = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ("content-type: application/json\r\n", b"{}", 415),
        ("content-type: multipart/form-data\r\n", b"--x--\r\n", 415),
        (f"content-type: multipart/form-data; boundary={'b' * 71}\r\n", b"--x--\r\n", 400),
        (FORM, b"--x--\r\n", 400),
        (FORM, b"--x\r\ncontent-disposition: form-data; name=other\r\n\r\n1\r\n--x--\r\n", 400),
        (FORM, b"--x\r\n\r\n1\r\n--x--\r\n", 400),
        (FORM, b"--xy", 400),
        (FORM, PART + photo(), 400),
        (FORM, b"--x\r\na: " + b"b" * 9000 + b"\r\n\r\n1\r\n--x--\r\n", 400),
        (FORM, PART + photo() + b"\r\n--x--\r\n", 201),
        (FORM, b"preamble\r\n" + PART + photo() + b"\r\n--x--  \r\n", 201),
        (FORM, PART + photo() + b"\r\n--x  \r\n", 400),
        (
            FORM,
            b"--x\r\ncontent-disposition: form-data; name=o\r\n\r\n\r\n"
            + PART
            + photo()
            + b"\r\n--x--\r\nepilogue",
            201,
        ),
    ],
)
async def test_a_form_is_read_by_its_bytes(
    here: World, head: str, body: bytes, status: int
) -> None:
    """Over a raw socket, so that no client tidies the form."""
    length = f"content-length: {len(body)}\r\nconnection: close\r\n"
    answer = await raw(here, head + length, body, "test-admin-key-0123456789")
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer


async def test_files_belong_to_their_owner(here: World) -> None:
    async with here.owner() as one, here.owner() as other:
        file = await uploaded(one)
        for path in ("", "/content"):
            refused(await other.get(f"/v1/files/{file['id']}{path}"), 404)
        refused(await other.delete(f"/v1/files/{file['id']}"), 404)
        assert got(await other.get("/v1/files"))["data"] == []
        assert got(await one.get("/v1/files"))["data"] == [file]
    async with here.owner("read") as reader:
        refused(await upload(reader, photo()), 403)
    refused(await upload(here.stranger, photo()), 401)


async def test_an_erased_file_is_gone_with_its_bytes(here: World) -> None:
    folder = here.settings.image_dir
    async with here.owner() as client:
        file = await uploaded(client)
        assert (folder / file["id"]).exists()
        assert (await client.delete(f"/v1/files/{file['id']}")).status_code == 204
        refused(await client.get(f"/v1/files/{file['id']}"), 404)
        refused(await client.delete(f"/v1/files/{file['id']}"), 404)
        assert not (folder / file["id"]).exists()


async def test_a_list_goes_on_behind_its_cursor(here: World) -> None:
    async with here.owner() as client:
        ids = [(await uploaded(client))["id"] for _ in range(3)]
        first = got(await client.get("/v1/files", params={"limit": 2}))
        rest = got(
            await client.get("/v1/files", params={"limit": 2, "cursor": first["next_cursor"]})
        )
    found = [file["id"] for file in first["data"] + rest["data"]]
    assert (found, rest["next_cursor"]) == (ids[::-1], None)


async def test_too_little_space_refuses_an_upload(tmp_path: Path) -> None:
    async with world(tmp_path, min_free_bytes=1 << 60) as full:
        refused(await upload(full.client, photo()), 503, "no_space")


def later_than(clock: Callable[[], int], days: float) -> int:
    return clock() + round(days * 86_400_000)


async def test_files_go_when_their_days_are_over(tmp_path: Path) -> None:
    """The row, the bytes and the record of the upstream's copy. A task that names it stays."""
    async with world(tmp_path, file_retention_days=1) as here:
        file, resources = await uploaded(here.client), here.context.resources
        for later, left in ((0.99, 1), (1.01, 0)):
            clock = partial(later_than, resources.store.clock, later)
            retention = Retention(resources, 30, None, 365, clock)
            removed = await retention.apply()
            assert removed["files"] == 1 - left
            assert (here.settings.image_dir / file["id"]).exists() == bool(left)
        refused(await here.client.get(f"/v1/files/{file['id']}"), 404)


async def test_the_sweep_removes_what_a_file_does_not_name(tmp_path: Path) -> None:
    """Blobs of files that this store does not know stay."""
    async with world(tmp_path) as here:
        file, resources = await uploaded(here.client), here.context.resources
        left = f"{file['id']}/0-{'0f' * 32}.png"
        unknown = f"file_{'a' * 26}/0-{'0f' * 32}.png"
        for name in (left, unknown):
            await put(resources.blobs, name, b"x")
        later = replace(resources, clock=lambda: resources.clock() + AGE_MS + 60_000)
        assert await sweep(later) == 1
        sizes = [await resources.blobs.size(name) for name in (left, unknown)]
        assert sizes == [None, 1]
        shown = await here.client.get(f"/v1/files/{file['id']}/content")
        assert shown.content == photo()


async def test_a_backup_names_every_file(here: World) -> None:
    async with here.owner() as client:
        file = await uploaded(client)
    copy = here.settings.data_dir.parent / "copy.db"
    assert here.settings.sqlite_path is not None
    copy_database(here.settings.sqlite_path, copy)
    with reading(copy) as connection:
        blobs = {blob: (size, sha256) for blob, size, sha256 in stored_images(connection)}
    name = f"{file['id']}/0-{file['sha256']}.png"
    assert blobs[name] == (file["bytes"], file["sha256"])
