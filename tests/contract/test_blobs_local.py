"""The local folder: durability, temporary files and folders that vanish."""

import os
from pathlib import Path

import pytest

from service.blobs.blob_store import PAGE
from service.blobs.local import LocalBlobs
from service.errors import BlobUnavailable
from tests.blobs import NAME, put, read
from tests.waiting import wait_until


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Records the system calls that decide about durability, each with its path."""
    recorded: list[tuple[str, str]] = []
    data, whole, replace, opened = os.fdatasync, os.fsync, Path.replace, os.open
    paths: dict[int, str] = {}

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = opened(path, flags, mode)
        paths[descriptor] = str(path)
        return descriptor

    def fdatasync(descriptor: int) -> None:
        data(descriptor)
        recorded.append(("data", paths[descriptor]))

    def fsync(descriptor: int) -> None:
        whole(descriptor)
        recorded.append(("folder", paths[descriptor]))

    def rename(source: Path, target: Path) -> Path:
        recorded.append(("rename", str(target)))
        return replace(source, target)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    return recorded


async def test_data_is_synced_before_the_rename_and_folders_after_it(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    """After a power cut, a name leads to the whole image, and all folders above it exist. The store
    syncs existing folders too, because the process that made one may have died before its sync.
    """
    root = tmp_path / "deep" / "images"
    blobs = await LocalBlobs.open(root)
    assert calls[:3] == [("folder", str(folder)) for folder in (root, tmp_path / "deep", tmp_path)]
    assert {Path(path) for _, path in calls[3:]} <= set(tmp_path.parents), (
        "folders that already existed are synced too"
    )
    for name in (NAME, "task_abc/1-00.png"):
        calls.clear()
        async with blobs.incoming() as incoming:
            await incoming.write(b"x")
            await blobs.put(incoming, name, "image/png")
            source = str(incoming.path)
        target = root / name
        assert calls == [
            ("data", source),
            ("rename", str(target)),
            ("folder", str(target.parent)),
            ("folder", str(root)),
        ]


async def test_data_is_synced_once_unless_more_was_written(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    blobs = await LocalBlobs.open(tmp_path)
    for pieces, syncs in (([], 1), ([b"y"], 2)):
        calls.clear()
        async with blobs.incoming() as incoming:
            await incoming.write(b"x")
            await incoming.sync()
            for piece in pieces:
                await incoming.write(piece)
            await blobs.put(incoming, NAME, "image/png")
        assert [kind for kind, _ in calls].count("data") == syncs


async def test_opening_removes_temporary_files_of_a_dead_process(tmp_path: Path) -> None:
    """The images stay. `spare` keeps the temporary files that are younger than it."""
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


async def test_a_writer_whose_temporary_file_was_removed_may_retry(tmp_path: Path) -> None:
    """Another process removed the file. Each further call of the writer raises BlobUnavailable."""
    blobs = await LocalBlobs.open(tmp_path)
    async with blobs.incoming() as incoming:
        await incoming.write(b"x")
        await LocalBlobs.open(tmp_path)
        with pytest.raises(BlobUnavailable):
            await incoming.write(b"x")
        with pytest.raises(BlobUnavailable):
            await blobs.put(incoming, NAME, "image/png")
    assert await blobs.size(NAME) is None


async def test_a_folder_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    """The store turns an error of the operating system into BlobUnavailable, without a path in its
    text.
    """
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BlobUnavailable) as caught:
        await LocalBlobs.open(tmp_path / "file" / "images")
    assert str(tmp_path) not in str(caught.value)
    blobs = await LocalBlobs.open(tmp_path / "images")
    (tmp_path / "images" / "task_abc").write_bytes(b"")
    with pytest.raises(BlobUnavailable):
        await put(blobs, NAME, b"x")


async def test_a_folder_is_removed_with_its_last_image(tmp_path: Path) -> None:
    blobs = await LocalBlobs.open(tmp_path)
    await put(blobs, NAME, b"x")
    await blobs.delete(NAME)
    assert not (tmp_path / "task_abc").exists()


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_folder_that_vanishes_under_a_put_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Another process deletes the empty folder before the rename. `put` tries three times."""
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


def folders_open(folder: Path) -> int:
    links = (each.resolve() for each in Path("/proc/self/fd").iterdir())
    return sum(link.is_relative_to(folder) for link in links)


async def test_a_listing_that_is_left_early_leaves_no_folder_open(tmp_path: Path) -> None:
    """A reader stops in the middle of a listing, as at a stop of the process."""
    blobs = await LocalBlobs.open(tmp_path)
    for number in range(PAGE + 1):
        await put(blobs, f"task_{number}/0-00.png", b"x")
    known = folders_open(tmp_path)
    async for page in blobs.listed():
        assert len(page) == PAGE
        assert folders_open(tmp_path) > 0
        break
    await wait_until(lambda: folders_open(tmp_path) == known == 0)
