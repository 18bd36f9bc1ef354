"""Child processes validate images. These tests cover a child that dies, hangs or meets a limit, and
the end of the service.
"""

import asyncio
import gzip
import os
import resource
import select
import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from service.errors import BlobUnavailable
from service.images import validator
from service.images.validated_image import InvalidImage, Validation, ValidImage
from service.images.validator import ImageValidator, open_validator
from service.images.validator_child import validate_file
from tests.downloads import called, downloading, link, made, served, validator_children
from tests.environment import ROOT
from tests.pictures import drawn
from tests.upstream import Upstream, picture
from tests.waiting import wait_until

SMALL = ValidImage("image/png", 64, 48)


@pytest.fixture
async def pool() -> AsyncIterator[ImageValidator]:
    async with open_validator(1, 10_000, 10_000) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(picture("PNG", (64, 48), 1))
    return path


async def waiting(pool: ImageValidator, file: Path) -> tuple[int, "asyncio.Task[Validation]"]:
    """The pid of a stopped child, and a call that waits for it."""
    await pool.validate(file, compressed=False)
    [child] = pool.children
    os.kill(child.process.pid, signal.SIGSTOP)
    return child.process.pid, await asked(pool, file)


async def asked(pool: ImageValidator, file: Path) -> "asyncio.Task[Validation]":
    """A call whose request the child has."""
    [child] = pool.children
    before = len(child)
    call = asyncio.create_task(pool.validate(file, compressed=False))
    await asyncio.sleep(0)
    assert len(child) == before + 1
    return call


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def test_one_child_pool_one_file_after_the_other(pool: ImageValidator, file: Path) -> None:
    """The pool starts its child at the first file and reuses it."""
    assert pool.children == []
    first, second = [await pool.validate(file, compressed=False) for _ in range(2)]
    assert (first, first.result, first.bytes) == (second, SMALL, file.stat().st_size)
    [child] = pool.children
    assert child.process.pid != os.getpid()
    assert child.alive()


async def test_what_came_packed_is_unpacked_in_its_file(pool: ImageValidator, file: Path) -> None:
    """The unpacked picture replaces the content of the file. A file that is not packed stays as it
    is. Content that unpacks to more than the limit is a final error.
    """
    plain = file.read_bytes()
    file.write_bytes(gzip.compress(plain))
    for _ in range(2):
        found = await pool.validate(file, compressed=True)
        assert (found.result, found.bytes, file.read_bytes()) == (SMALL, len(plain), plain)
    file.write_bytes(gzip.compress(bytes(10_001)))
    assert (await pool.validate(file, compressed=True)).result == InvalidImage(
        "over 10000 bytes", final=True
    )


@pytest.mark.parametrize("packing", [gzip.compress, zlib.compress])
def test_a_child_unpacks_within_the_limit(packing: Callable[[bytes], bytes], file: Path) -> None:
    """The child unpacks gzip and zlib and leaves unpacked files unchanged. It never writes content
    over the limit.
    """
    plain = file.read_bytes()
    packed = packing(plain)
    for content in (packed, plain):
        file.write_bytes(content)
        found = validate_file(str(file), compressed=True, max_bytes=10_000, max_pixels=10_000)
        assert (found["bytes"], found["valid"], file.read_bytes()) == (
            len(plain),
            asdict(SMALL),
            plain,
        )
    file.write_bytes(bomb := packing(bytes(10_001)))
    found = validate_file(str(file), compressed=True, max_bytes=10_000, max_pixels=10_000)
    assert (found["invalid"]["final"], file.read_bytes()) == (True, bomb)
    assert validate_file(str(file.parent), compressed=False, max_bytes=1, max_pixels=1) == {
        "unavailable": "Is a directory"
    }


async def test_limits_hold_in_the_child(pool: ImageValidator, file: Path) -> None:
    """Too many pixels are a final error. Bytes that are no picture may be right at the next
    download.
    """
    file.write_bytes(drawn("PNG", size=(101, 100)))
    found = await pool.validate(file, compressed=False)
    assert isinstance(found.result, InvalidImage)
    assert found.result.final
    file.write_bytes(b"<html>")
    assert (await pool.validate(file, compressed=False)).result == InvalidImage(
        "the bytes are no picture"
    )


async def test_a_file_that_cannot_be_read_is_the_stores_fault(
    pool: ImageValidator, file: Path
) -> None:
    """The pool raises BlobUnavailable and keeps the child."""
    await pool.validate(file, compressed=False)
    [child] = pool.children
    with pytest.raises(BlobUnavailable, match="No such file"):
        await pool.validate(file.with_name("missing"), compressed=False)
    assert pool.children == [child]


async def test_no_child_is_the_machines_fault(
    pool: ImageValidator, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no child can start, the pool raises BlobUnavailable, as for a full disk. The worker then
    retries the download and does not count it against the row.
    """
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(file))
        with pytest.raises(BlobUnavailable, match="no process"):
            await pool.validate(file, compressed=False)
    assert (await pool.validate(file, compressed=False)).result == SMALL


async def test_a_child_that_died_idle_is_replaced(pool: ImageValidator, file: Path) -> None:
    """The kernel may kill an idle child for its memory. The next file does not lose an attempt."""
    await pool.validate(file, compressed=False)
    pool.children[0].process.kill()
    pool.children[0].process.wait()
    assert (await pool.validate(file, compressed=False)).result == SMALL


async def test_want_of_memory_is_no_fault_of_the_bytes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer has no digest, because a third failure with the same digest would be final. A
    picture that does not fit into memory now is tried again.
    """
    start = subprocess.Popen

    def small(*args: object, **more: object) -> "subprocess.Popen[bytes]":
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (120 << 20, 120 << 20))

        made: subprocess.Popen[bytes] = start(*args, preexec_fn=limited, **more)  # type: ignore[call-overload]
        return made

    monkeypatch.setattr(subprocess, "Popen", small)
    file.write_bytes(picture("PNG", (8000, 8000)))
    async with open_validator(1, 1 << 30, 1 << 30) as pool:
        found = await pool.validate(file, compressed=False)
    assert (found.sha256, found.result) == ("", InvalidImage("its decoder broke down"))


async def test_a_picture_that_kills_its_child_is_worth_another_try(
    pool: ImageValidator, file: Path
) -> None:
    """The answer has no digest, and the next file gets a new child."""
    pid, call = await waiting(pool, file)
    os.kill(pid, signal.SIGKILL)
    assert await call == Validation("", 0, InvalidImage("its decoder broke down"))
    assert gone(pid)
    assert (await pool.validate(file, compressed=False)).result == SMALL


async def test_a_picture_that_takes_too_much_processor_time_is_final(
    pool: ImageValidator, file: Path
) -> None:
    """The kernel ends the child. Another download would cost the same time."""
    pid, call = await waiting(pool, file)
    os.kill(pid, signal.SIGXCPU)
    os.kill(pid, signal.SIGCONT)
    assert (await call).result == InvalidImage(
        "it takes too much processor time to decode", final=True
    )
    assert gone(pid)


async def test_a_file_behind_one_that_kills_its_child_goes_to_the_next(
    pool: ImageValidator, file: Path
) -> None:
    """Only the file in hand loses an attempt."""
    pid, first = await waiting(pool, file)
    second = await asked(pool, file)
    os.kill(pid, signal.SIGKILL)
    assert (await first).result == InvalidImage("its decoder broke down")
    assert (await second).result == SMALL


async def test_an_answer_that_is_there_counts_when_the_child_ends(
    pool: ImageValidator, file: Path
) -> None:
    """The event loop was busy while the child answered and died. No other file is to blame."""
    pid, first = await waiting(pool, file)
    [child] = pool.children
    assert child.process.stdout
    os.kill(pid, signal.SIGCONT)
    assert select.select([child.process.stdout], [], [], 30)[0]
    os.kill(pid, signal.SIGXCPU)
    child.process.wait()
    second = await asyncio.create_task(pool.validate(file))
    assert [(await first).result, second.result] == [SMALL, SMALL]


async def test_several_children_have_one_file_each(file: Path) -> None:
    """A file that would wait behind a slow one goes to the next free child."""
    async with open_validator(2, 10_000, 10_000) as pool:
        await asyncio.gather(*(pool.validate(file) for _ in range(2)))
        slow = pool.children[0].process.pid
        os.kill(slow, signal.SIGSTOP)
        calls = [asyncio.create_task(pool.validate(file)) for _ in range(6)]

        async def all_others() -> bool:
            return sum(call.done() for call in calls) == 5

        await wait_until(all_others)
        os.kill(slow, signal.SIGCONT)
        assert [(await call).result for call in calls] == [SMALL] * 6


async def test_requests_that_nobody_reads_end_the_child(pool: ImageValidator, file: Path) -> None:
    """Cancelled calls leave their requests in the pipe. The event loop does not wait for room."""
    pid, first = await waiting(pool, file)
    for _ in range(3000):
        call = asyncio.create_task(pool.validate(file))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        if first.done():
            break
    assert (await first).result == InvalidImage("its decoder broke down")
    assert gone(pid)
    assert (await pool.validate(file)).result == SMALL


async def test_a_file_that_waited_for_its_turn_is_given_up_too(
    pool: ImageValidator, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time begins when the file in front of it has its answer."""
    await pool.validate(file)  # the start of a child takes longer
    monkeypatch.setattr(validator, "WALL_S", 1.0)
    pid, first = await waiting(pool, file)
    os.mkfifo(endless := file.with_name("endless"))  # a reader waits for a writer
    second = await asked(pool, endless)
    os.kill(pid, signal.SIGCONT)
    assert (await first).result == SMALL
    assert (await second).result == InvalidImage("it was not decoded within 1 s")


async def test_a_call_that_is_cancelled_before_its_turn_changes_nothing(
    pool: ImageValidator, file: Path
) -> None:
    """The child goes on with the file in hand, and the next call gets an answer of its own."""
    pid, first = await waiting(pool, file)
    second = await asked(pool, file)
    other = file.with_name("other")
    other.write_bytes(picture("PNG", (65, 48), 1))
    third = await asked(pool, other)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    os.kill(pid, signal.SIGCONT)
    assert (await first).result == SMALL
    assert (await third).result == ValidImage("image/png", 65, 48)
    assert [child.process.pid for child in pool.children] == [pid]


async def test_each_file_has_its_own_time(
    pool: ImageValidator, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a file that waits behind another begins when the other is done. A file that takes
    too long costs only its own attempt.
    """
    await pool.validate(file, compressed=False)  # the start of a child takes longer
    monkeypatch.setattr(validator, "WALL_S", 1.0)
    pid, first = await waiting(pool, file)
    second = await asked(pool, file)
    assert (await first).result == InvalidImage("it was not decoded within 1 s")
    assert gone(pid)
    monkeypatch.setattr(validator, "WALL_S", 60.0)
    assert (await second).result == SMALL


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_child_has_limits_and_no_secrets(
    pool: ImageValidator, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child has limits for memory, processor time, file size and descriptors, which it cannot
    raise, an empty environment, no descriptor of the service, and can get no new privileges.
    """
    monkeypatch.setenv("DARKROOM_SECRET_KEY", "a secret")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with file.open("rb") as secret:
        os.set_inheritable(secret.fileno(), True)
        await pool.validate(file, compressed=False)
    process = Path(f"/proc/{pool.children[0].process.pid}")
    assert (process / "environ").read_bytes() == b""
    assert {path.name for path in (process / "fd").iterdir()} == {"0", "1", "2"}
    assert "NoNewPrivs:\t1\n" in (process / "status").read_text(encoding="ascii")
    limits = {
        line[:26].strip(): line[26:].split()[:2]
        for line in (process / "limits").read_text(encoding="ascii").splitlines()[1:]
    }
    memory = str((512 << 20) + 24 * 10_000 + 3 * 10_000)
    assert limits["Max address space"] == [memory] * 2
    assert 60 < int(limits["Max cpu time"][0]) < 120
    assert limits["Max file size"] == ["10000"] * 2
    assert limits["Max open files"] == ["64"] * 2
    assert limits["Max core file size"] == ["0"] * 2


async def test_a_picture_that_never_ends_is_given_up(
    pool: ImageValidator, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool kills the child after `WALL_S`."""
    await pool.validate(file, compressed=False)  # the start of a child takes longer
    monkeypatch.setattr(validator, "WALL_S", 0.5)
    pid, call = await waiting(pool, file)
    assert (await call).result == InvalidImage("it was not decoded within 0.5 s")
    assert gone(pid)


async def test_a_call_that_is_cancelled_leaves_no_child(pool: ImageValidator, file: Path) -> None:
    """The next file would get the answer of the cancelled call, so the pool kills the child."""
    pid, call = await waiting(pool, file)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert gone(pid)


async def test_children_leave_with_the_validator(file: Path) -> None:
    async with open_validator(2, 10_000, 10_000) as pool:
        await asyncio.gather(*(pool.validate(file, compressed=False) for _ in range(4)))
        pids = [child.process.pid for child in pool.children]
        assert len(pids) == 2
    assert all(map(gone, pids))


async def test_the_first_image_finds_a_child_that_is_warm(pool: ImageValidator, file: Path) -> None:
    """It takes the child of the start, and starts none."""
    pool.warm()
    (child,) = pool.children
    found = await pool.validate(file)
    assert (found.result, pool.children) == (SMALL, [child])


async def test_callbacks_are_answered_while_a_picture_is_decoded(tmp_path: Path) -> None:
    """The decoder has a process of its own, so callbacks do not wait for it. The image is stored
    when the decoder goes on.
    """
    upstream = Upstream()
    upstream.files = {"a.png": [served(picture())], "b.png": [served(picture())]}
    async with downloading(tmp_path, upstream) as here:
        await here.ended((await made(here, upstream, link(here, "a.png")))["id"])
        [pid] = validator_children(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        second = await made(here, upstream, link(here, "b.png"))

        async def fetched() -> bool:
            return bool(upstream.asked["b.png"])

        await wait_until(fetched)
        await called(here, await here.submit(), "completed", link(here, "a.png"))

        async def storing() -> bool:
            return bool((await here.task(second["id"]))["state"] == "storing")

        await wait_until(storing)
        os.kill(pid, signal.SIGCONT)
        assert (await here.ended(second["id"]))["state"] == "completed"


async def test_children_do_not_outlive_a_killed_parent(file: Path) -> None:
    """A child ends when its input closes, because a killed parent sends no signal."""
    program = f"""
import asyncio, os, pathlib
from service.images.validator import open_validator

async def main():
    async with open_validator(1, 10_000, 10_000) as pool:
        await pool.validate(pathlib.Path({str(file)!r}), compressed=False)
        print(pool.children[0].process.pid, flush=True)
        os.kill(os.getpid(), 9)

asyncio.run(main())
"""
    parent = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=False,
    )
    assert parent.returncode == -signal.SIGKILL
    pid = int(parent.stdout)

    async def ended() -> bool:
        return gone(pid)

    await wait_until(ended)
