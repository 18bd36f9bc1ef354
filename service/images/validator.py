"""Pictures are judged in processes of their own: a decoder keeps the interpreter for itself, and
callbacks must not wait for one.

A picture that brings its process down, or takes too long, has harmed nothing else: its download is
tried again. A child reads a request a line and answers a line, both JSON; it ends with its input,
so it never outlives its parent, however that dies.
"""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.errors import BlobUnavailable
from service.images.inspect_image import NoPicture, Picture, inspect

EXAMINE_S = 120.0  # the largest picture takes some seconds of one core
NICE = 10
ROOT = Path(__file__).parents[2]  # where `service` is imported from


@dataclass(frozen=True, slots=True)
class Examined:
    """A file's bytes and what they are; `sha256` in hex, "" for what was not read to its end."""

    sha256: str
    bytes: int
    verdict: Picture | NoPicture


class Examiner:
    """Examines `places` files at once, in children that are started when they are first needed; use
    `examining`.
    """

    def __init__(self, places: int, max_bytes: int, max_pixels: int) -> None:
        self._places = asyncio.Semaphore(places)
        self._limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
        self.idle: list[subprocess.Popen[bytes]] = []

    async def examine(self, path: Path, *, packed: bool) -> Examined:
        """`packed`: the file is unpacked first if it can be (gzip, zlib), and then holds what was
        in it. BlobUnavailable.
        """
        async with self._places:
            child = self.idle.pop() if self.idle else start()
            if child.poll() is not None:  # killed while it had nothing to do
                end(child, "")
                child = start()
            try:
                async with asyncio.timeout(EXAMINE_S):
                    answer = await asyncio.to_thread(
                        ask, child, {"path": str(path), "packed": packed, **self._limits}
                    )
            except TimeoutError:
                return end(child, f"it was not decoded within {EXAMINE_S:g} s")
            except (OSError, ValueError):  # it is gone
                return end(child, "its decoder broke down")
            except BaseException:
                end(child, "")
                raise
            self.idle.append(child)
        if "unavailable" in answer:
            raise BlobUnavailable(answer["unavailable"])
        verdict = (
            Picture(**answer["picture"])
            if "picture" in answer
            else NoPicture(**answer["no_picture"])
        )
        return Examined(answer["sha256"], answer["bytes"], verdict)


@asynccontextmanager
async def examining(places: int, max_bytes: int, max_pixels: int) -> AsyncIterator[Examiner]:
    """An examiner; its children are gone at the exit."""
    examiner = Examiner(places, max_bytes, max_pixels)
    try:
        yield examiner
    finally:
        for child in examiner.idle:
            end(child, "")


def start() -> "subprocess.Popen[bytes]":
    """A session of its own: a terminal's Ctrl-C is for the parent, which finishes its work first.
    BlobUnavailable.
    """
    command = [sys.executable, "-m", __name__]
    try:
        return subprocess.Popen(  # noqa: S603 - our own
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:  # no descriptors, processes or memory left
        raise BlobUnavailable(f"no process to judge it: {error.strerror}") from error


def ask(child: "subprocess.Popen[bytes]", request: dict[str, Any]) -> dict[str, Any]:
    """Blocks. OSError, ValueError: the child is gone."""
    assert child.stdin
    assert child.stdout
    child.stdin.write(json.dumps(request).encode() + b"\n")
    child.stdin.flush()
    answer: dict[str, Any] = json.loads(child.stdout.readline())
    return answer


def end(child: "subprocess.Popen[bytes]", reason: str) -> Examined:
    with suppress(OSError), child:  # closes its pipes, and waits for it
        child.kill()
    return Examined("", 0, NoPicture(reason))


def examined(path: str, *, packed: bool, max_bytes: int, max_pixels: int) -> dict[str, Any]:
    """What a child answers."""
    try:
        data = Path(path).read_bytes()
        if packed and (plain := unpacked(data, max_bytes)) is not None:
            if len(plain) > max_bytes:
                return {
                    "sha256": "",
                    "bytes": 0,
                    "no_picture": asdict(NoPicture(f"over {max_bytes} bytes", final=True)),
                }
            Path(path).write_bytes(plain)
            data = plain
    except OSError as error:
        return {"unavailable": error.strerror}
    verdict = inspect(data, max_pixels)
    kind = "picture" if isinstance(verdict, Picture) else "no_picture"
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), kind: asdict(verdict)}


def unpacked(data: bytes, max_bytes: int) -> bytes | None:
    """What a server packed although `identity` was asked for, and at most one byte over the limit;
    None if it is not packed at all.
    """
    try:
        return zlib.decompressobj(wbits=47).decompress(data, max_bytes + 1)  # 47: gzip or zlib
    except zlib.error:
        return None


def main() -> None:
    """A child. Its memory is the first to go when the machine has none left, and its work waits for
    everybody else's.
    """
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # a supervisor may send it to all; the parent still needs its answer
    os.nice(NICE)
    with suppress(OSError):  # Linux has it
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(examined(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
