"""What every blob store must do. One suite runs on the local folder and on S3 over HTTP."""

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


async def test_a_blob_is_read_back_as_it_was_put(blobs: Blobs) -> None:
    """The bytes of several writes come back in order, in chunks of at most `CHUNK`, with their
    total size.
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


async def test_a_temporary_file_can_be_read_while_it_is_written(blobs: Blobs) -> None:
    """Between two writes, the file holds everything that was written so far."""
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
    """The range includes `start` and excludes `end`. A range beyond the end is empty."""
    data = os.urandom(2 * CHUNK + 10)
    await put(blobs, NAME, data)
    assert await read(blobs, NAME, start, end) == data[start:end]


async def test_an_empty_blob_is_a_blob(blobs: Blobs) -> None:
    """An empty blob has size 0. A missing blob has size None."""
    await put(blobs, NAME, b"")
    assert await blobs.size(NAME) == 0
    assert await read(blobs, NAME) == b""


async def test_the_same_name_twice_is_harmless(blobs: Blobs) -> None:
    """A worker that repeats a step after a crash puts the same bytes under the same name."""
    await put(blobs, NAME, b"one")
    await put(blobs, NAME, b"one")
    assert await read(blobs, NAME) == b"one"


async def test_a_missing_blob_is_missing(blobs: Blobs) -> None:
    """Reading a missing blob raises BlobMissing, its size is None, and deleting it does nothing. A
    folder, or a path below a file, is no blob.
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
    """A deletion removes one name. It can be repeated, and the name can be used again."""
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


async def test_a_temporary_file_that_is_not_put_is_removed(blobs: Blobs) -> None:
    """The store removes the file at the end of the block, also after an error or a cancellation."""
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
    """A name that could lead outside the store is a defect of the caller. The store touches no
    file.
    """
    async with blobs.incoming() as incoming:
        with pytest.raises(ValueError, match="no blob"):
            await blobs.put(incoming, name, "image/png")
    with pytest.raises(ValueError, match="no blob"):
        await read(blobs, name)
    with pytest.raises(ValueError, match="no blob"):
        await blobs.size(name)
    with pytest.raises(ValueError, match="no blob"):
        await blobs.delete(name)


async def test_concurrent_puts_and_deletes_do_not_disturb_one_another(blobs: Blobs) -> None:
    """Sixteen blobs of four tasks are put and deleted at the same time."""

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


async def test_free_space_is_a_number_or_unknown(blobs: Blobs) -> None:
    free = await blobs.free_bytes()
    assert free is None or free > 0


async def test_a_large_blob_arrives_whole_each_time_it_is_put(blobs: Blobs) -> None:
    """The blob is larger than one part of an upload. A second put changes nothing."""
    data = os.urandom(12 << 20)
    for _ in range(2):
        await put(blobs, NAME, data)
        assert await blobs.size(NAME) == len(data)
    assert await read(blobs, NAME) == data
    assert (
        await read(blobs, NAME, (5 << 20) - 1, (5 << 20) + 1) == data[(5 << 20) - 1 : (5 << 20) + 1]
    )


@pytest.mark.parametrize("size", [10, 6 << 20])
async def test_a_put_replaces_a_blob_of_another_size(blobs: Blobs, size: int) -> None:
    """An incomplete blob under a name does not keep out the complete one."""
    await put(blobs, NAME, b"x")
    await put(blobs, NAME, b"y" * size)
    assert await read(blobs, NAME) == b"y" * size


async def test_every_blob_is_listed_with_its_time(blobs: Blobs) -> None:
    """Each blob is listed once, in pages of at most `PAGE`. Unfinished and deleted blobs are not
    listed.
    """
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
    )  # S3 reports whole seconds


async def test_the_check_of_an_empty_store_succeeds(blobs: Blobs) -> None:
    await blobs.check()
