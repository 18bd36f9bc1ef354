"""What every blob store must do, held by each of the two: the local folder, and S3 over HTTP."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from service.blobs.blob_store import CHUNK, PAGE, Blob, Blobs
from service.blobs.local import LocalBlobs
from service.blobs.s3 import S3Blobs
from service.errors import BlobMissing
from tests.blobs import NAME, put, read


@pytest.fixture(params=["local", "s3"])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "local":
        return await LocalBlobs.open(tmp_path / "images")
    bucket = request.getfixturevalue("s3_bucket")
    return await S3Blobs.open(f"s3://{bucket}/some/prefix", tmp_path / "incoming", plain_http=True)


async def test_what_was_put_is_read_back(blobs: Blobs) -> None:
    """The bytes of several writes come back in order, in chunks of bounded size, and the size is
    theirs.
    """
    pieces = [bytes([number]) * 100_000 for number in range(10)]
    async with blobs.incoming() as incoming:
        for piece in pieces:
            await incoming.write(piece)
        assert incoming.size == 1_000_000
        assert incoming.path.read_bytes() == b"".join(pieces)
        await blobs.put(incoming, NAME, "image/png")
    chunks = [chunk async for chunk in blobs.read(NAME)]
    assert b"".join(chunks) == b"".join(pieces)
    assert max(map(len, chunks)) <= CHUNK
    assert await blobs.size(NAME) == 1_000_000


async def test_a_file_can_be_read_while_it_is_written(blobs: Blobs) -> None:
    """What was written can be looked at as a whole, between any two pieces."""
    async with blobs.incoming() as incoming:
        await incoming.write(b"a longer beginning")
        assert incoming.path.read_bytes() == b"a longer beginning"
        await incoming.write(b", and more")
        assert (incoming.size, incoming.path.read_bytes()) == (28, b"a longer beginning, and more")
        await blobs.put(incoming, NAME, "image/png")
    assert await read(blobs, NAME) == b"a longer beginning, and more"


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 0),
        (0, 1),
        (5, 5),
        (7, 3),
        (0, None),
        (CHUNK - 1, CHUNK + 1),
        (CHUNK, None),
        (2 * CHUNK + 9, None),
        (2 * CHUNK + 10, None),
        (10**9, None),
    ],
)
async def test_a_range_is_read(blobs: Blobs, start: int, end: int | None) -> None:
    """`start` counts, `end` does not; beyond the end there is nothing."""
    data = os.urandom(2 * CHUNK + 10)
    await put(blobs, NAME, data)
    assert await read(blobs, NAME, start, end) == data[start:end]


async def test_an_empty_blob_is_a_blob(blobs: Blobs) -> None:
    """No bytes are not the same as no blob."""
    await put(blobs, NAME, b"")
    assert await blobs.size(NAME) == 0
    assert await read(blobs, NAME) == b""


async def test_the_same_name_twice_is_harmless(blobs: Blobs) -> None:
    """A step that is done again after a crash puts the same bytes under the same name."""
    await put(blobs, NAME, b"one")
    await put(blobs, NAME, b"one")
    assert await read(blobs, NAME) == b"one"


async def test_a_missing_blob_is_missing(blobs: Blobs) -> None:
    """Reading what is not there is BlobMissing, its size None, its deletion fine; a folder or a way
    through a file is no blob.
    """
    await put(blobs, NAME, b"x")
    for name in ("task_abc/1-00.png", "nobody/0-00.png", "task_abc", NAME + "/x"):
        with pytest.raises(BlobMissing):
            await read(blobs, name)
        assert await blobs.size(name) is None
    await blobs.delete("nobody/0-00.png")
    await blobs.delete(NAME + "/x")
    assert await read(blobs, NAME) == b"x"


async def test_a_deleted_blob_is_gone_and_its_neighbours_stay(blobs: Blobs) -> None:
    """Deleting touches one name, can be repeated, and makes room for the same name again."""
    other = "task_abc/1-00.png"
    await put(blobs, NAME, b"x")
    await put(blobs, other, b"y")
    for _ in range(2):
        await blobs.delete(NAME)
        assert await blobs.size(NAME) is None
    assert await read(blobs, other) == b"y"
    await blobs.delete(other)
    await put(blobs, NAME, b"x")
    assert await read(blobs, NAME) == b"x"


async def test_what_was_not_put_leaves_nothing(blobs: Blobs) -> None:
    """A temporary file is gone after its block, also when that ends in an error or is cancelled."""
    paths: list[Path] = []
    written = asyncio.Event()

    async def write(then: Callable[[], Awaitable[object]]) -> None:
        async with blobs.incoming() as incoming:
            paths.append(incoming.path)
            await incoming.write(b"x")
            written.set()
            await then()

    async def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await write(fail)
    written.clear()
    task = asyncio.create_task(write(asyncio.Event().wait))
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(set(paths)) == 2
    assert not any(path.exists() for path in paths)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a/..",
            "./a",
            "a/./b",
            "a//b",
            "a/",
            ".incoming/x",
            "a/.b",
            "-a",
            "a\\b",
            "a b",
        ),
        *("a\x00", "a\n", "ä", "a/b/c/d/e", "x" * 201),
    ],
)
async def test_only_plain_names_are_names(blobs: Blobs, name: str) -> None:
    """A name that could lead elsewhere is an error of ours and touches nothing."""
    async with blobs.incoming() as incoming:
        with pytest.raises(ValueError, match="no blob"):
            await blobs.put(incoming, name, "image/png")
    with pytest.raises(ValueError, match="no blob"):
        await read(blobs, name)
    with pytest.raises(ValueError, match="no blob"):
        await blobs.size(name)
    with pytest.raises(ValueError, match="no blob"):
        await blobs.delete(name)


async def test_many_at_once_all_arrive(blobs: Blobs) -> None:
    """Blobs of one task and of many, put and deleted at the same time, don't disturb one
    another.
    """

    async def one(task: int, index: int) -> None:
        name = f"task_{task}/{index}-00.png"
        for _ in range(3):
            await put(blobs, name, name.encode())
            await blobs.delete(name)
        await put(blobs, name, name.encode())

    await asyncio.gather(*(one(task, index) for task in range(4) for index in range(4)))
    for task in range(4):
        for index in range(4):
            name = f"task_{task}/{index}-00.png"
            assert await read(blobs, name) == name.encode()


async def test_the_room_that_is_left_is_known_or_not(blobs: Blobs) -> None:
    """Free bytes are a number that can be compared, or None."""
    free = await blobs.free_bytes()
    assert free is None or free > 0


async def test_a_large_blob_arrives_whole_however_often(blobs: Blobs) -> None:
    """More than one part of an upload has; the same again changes nothing."""
    data = os.urandom(12 << 20)
    for _ in range(2):
        await put(blobs, NAME, data)
        assert await blobs.size(NAME) == len(data)
    assert await read(blobs, NAME) == data
    assert (
        await read(blobs, NAME, (5 << 20) - 1, (5 << 20) + 1) == data[(5 << 20) - 1 : (5 << 20) + 1]
    )


@pytest.mark.parametrize("size", [10, 6 << 20])
async def test_a_blob_of_another_size_is_put_right(blobs: Blobs, size: int) -> None:
    """Bytes that are not all there, whoever left them so, don't keep the whole ones out."""
    await put(blobs, NAME, b"x")
    await put(blobs, NAME, b"y" * size)
    assert await read(blobs, NAME) == b"y" * size


async def test_every_blob_is_listed_with_its_time(blobs: Blobs) -> None:
    """Once each, in bounded pages; not what is still being written, not what was deleted."""
    before = time.time()
    names = {f"task_{number % 7}/{number}-00.png" for number in range(PAGE + 20)}
    assert [page async for page in blobs.listed()] == []
    for name in [*names, NAME]:
        await put(blobs, name, b"x")
    await blobs.delete(NAME)
    async with blobs.incoming() as incoming:
        await incoming.write(b"x")
        pages = [page async for page in blobs.listed()]
    assert len(pages) == 2
    assert all(len(page) <= PAGE for page in pages)
    found: list[Blob] = [blob for page in pages for blob in page]
    assert len(found) == len(names)
    assert {blob.name for blob in found} == names
    assert all(
        before - 2 < blob.modified_at / 1000 < time.time() + 2 for blob in found
    )  # S3 tells whole seconds


async def test_a_store_that_answers_is_checked_in_peace(blobs: Blobs) -> None:
    """Also an empty one."""
    await blobs.check()
