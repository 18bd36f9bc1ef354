"""What every blob store must do, and what the local one does besides for the sake of durability."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from service.blobs import CHUNK, Blobs
from service.blobs.local import LocalBlobs
from service.errors import BlobMissing, BlobUnavailable

NAME = "task_abc/0-" + "0f" * 32 + ".png"


@asynccontextmanager
async def local(folder: Path) -> AsyncIterator[Blobs]:
    yield await LocalBlobs.open(folder / "images")


STORES: dict[str, Callable[[Path], AbstractAsyncContextManager[Blobs]]] = {"local": local}


@pytest.fixture(params=STORES)
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Blobs]:
    async with STORES[request.param](tmp_path) as store:
        yield store


async def put(blobs: Blobs, name: str, data: bytes) -> None:
    async with blobs.incoming() as incoming:
        await incoming.write(data)
        await blobs.put(incoming, name, "image/png")


async def read(blobs: Blobs, name: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(name, start, end)])


async def test_what_was_put_is_read_back(blobs: Blobs) -> None:
    """The bytes of several writes come back in order, in chunks of bounded size, and the size is theirs."""
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


async def test_a_file_can_be_read_and_begun_again(blobs: Blobs) -> None:
    """What was written can be looked at as a whole; after `clear` only what comes then counts."""
    async with blobs.incoming() as incoming:
        await incoming.write(b"a longer beginning")
        assert await incoming.read() == b"a longer beginning"
        await incoming.clear()
        assert (incoming.size, await incoming.read()) == (0, b"")
        await incoming.write(b"anew")
        assert (incoming.size, await incoming.read()) == (4, b"anew")
        await blobs.put(incoming, NAME, "image/png")
    assert await read(blobs, NAME) == b"anew"


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
    """Reading what is not there is BlobMissing, its size None, its deletion fine; a folder or a way through a file is no blob."""
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
        *("", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/", ".incoming/x", "a/.b", "-a", "a\\b", "a b"),
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
    """Blobs of one task and of many, put and deleted at the same time, don't disturb one another."""

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


# --- the local store --------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The system calls that decide about durability, as they are made, each with the path it concerns."""
    made: list[tuple[str, str]] = []
    data, whole, replace, opened = os.fdatasync, os.fsync, Path.replace, os.open
    paths: dict[int, str] = {}

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = opened(path, flags, mode)
        paths[descriptor] = str(path)
        return descriptor

    def fdatasync(descriptor: int) -> None:
        data(descriptor)
        made.append(("data", paths[descriptor]))

    def fsync(descriptor: int) -> None:
        whole(descriptor)
        made.append(("folder", paths[descriptor]))

    def rename(source: Path, target: Path) -> Path:
        made.append(("rename", str(target)))
        return replace(source, target)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    return made


async def test_data_is_synced_before_the_rename_and_folders_after_it(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    """After a power cut a name leads to the whole image, and the folders that lead to it are there: new ones or not."""
    root = tmp_path / "deep" / "images"
    blobs = await LocalBlobs.open(root)
    assert calls == [("folder", str(folder)) for folder in (root, tmp_path / "deep", tmp_path)]
    for name in (NAME, "task_abc/1-00.png"):
        calls.clear()
        async with blobs.incoming() as incoming:
            await incoming.write(b"x")
            await blobs.put(incoming, name, "image/png")
            source = str(incoming.path)
        target = root / name
        assert calls == [("data", source), ("rename", str(target)), ("folder", str(target.parent)), ("folder", str(root))]


async def test_opening_removes_what_a_dead_process_left(tmp_path: Path) -> None:
    """Leftovers of downloads that never ended go at the next start, images stay; `spare` leaves alone what is younger."""
    blobs = await LocalBlobs.open(tmp_path)
    await put(blobs, NAME, b"x")
    old, young = tmp_path / ".incoming" / "old", tmp_path / ".incoming" / "young"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (0, 0))
    await LocalBlobs.open(tmp_path, spare=3600)
    assert [path.name for path in (tmp_path / ".incoming").iterdir()] == ["young"]
    again = await LocalBlobs.open(tmp_path)
    assert not list((tmp_path / ".incoming").iterdir())
    assert await read(again, NAME) == b"x"


async def test_a_removed_temporary_file_is_worth_another_try(tmp_path: Path) -> None:
    """What another process swept away is BlobUnavailable to its writer, whatever it does."""
    blobs = await LocalBlobs.open(tmp_path)
    async with blobs.incoming() as incoming:
        await LocalBlobs.open(tmp_path)
        for work in (incoming.write(b"x"), incoming.read(), incoming.clear()):
            with pytest.raises(BlobUnavailable):
                await work
        with pytest.raises(BlobUnavailable):
            await blobs.put(incoming, NAME, "image/png")
    assert await blobs.size(NAME) is None


async def test_a_folder_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    """Errors of the system come as BlobUnavailable, without a path in their text."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BlobUnavailable) as caught:
        await LocalBlobs.open(tmp_path / "file" / "images")
    assert str(tmp_path) not in str(caught.value)
    blobs = await LocalBlobs.open(tmp_path / "images")
    (tmp_path / "images" / "task_abc").write_bytes(b"")
    with pytest.raises(BlobUnavailable):
        await put(blobs, NAME, b"x")


async def test_a_folder_is_gone_with_its_last_image(tmp_path: Path) -> None:
    """Deleted tasks leave no empty folders behind."""
    blobs = await LocalBlobs.open(tmp_path)
    await put(blobs, NAME, b"x")
    await blobs.delete(NAME)
    assert not (tmp_path / "task_abc").exists()


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_folder_that_vanishes_under_a_put_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A deletion that removes the empty folder in between costs a `put` nothing, unless it never ends."""
    blobs = await LocalBlobs.open(tmp_path)
    replace, left = Path.replace, iter(range(times))

    def late(source: Path, target: Path) -> Path:
        if next(left, None) is not None:
            target.parent.rmdir()
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", late)
    if times < 3:
        await put(blobs, NAME, b"x")
        assert await read(blobs, NAME) == b"x"
    else:
        with pytest.raises(BlobUnavailable):
            await put(blobs, NAME, b"x")
