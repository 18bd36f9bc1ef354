"""Validates images in child processes: a decoder holds the interpreter's lock, and callbacks must
not wait for it.

An image that kills its child, or takes too long, costs one attempt of one download. A child gets
an environment without the service's secrets. It reads one request per line and writes one answer
per line, both JSON, and it ends with its input, so it never outlives its parent.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from service.errors import BlobUnavailable
from service.fair_places import FairPlaces
from service.images.validated_image import InvalidImage, MeasuredImage, Validation, ValidImage

WALL_S = 120.0
# The child's program. The last argument is where it imports from, because its environment is empty.
CHILD = """import sys
sys.path[:] = sys.argv.pop().split(":")
from service.images.validator_child import main
main(int(sys.argv[1]), int(sys.argv[2]))"""
ROOT = Path(__file__).parents[2]  # where `service` is imported from


class ImageValidator:
    """Validates `concurrency` files at once. A child is started when it is first needed, and the
    first one by `warm`.
    """

    def __init__(self, concurrency: int, max_bytes: int, max_pixels: int) -> None:
        self._places = FairPlaces(concurrency, rest=0)
        self._limits = max_bytes, max_pixels
        self.idle: list[subprocess.Popen[bytes]] = []

    def warm(self) -> None:
        """Starts a child, so that the first image does not wait for its imports."""
        with suppress(BlobUnavailable):
            self.idle.append(start(*self._limits))

    async def validate(
        self, path: Path, *, compressed: bool = False, flatten: bool | None = None
    ) -> Validation:
        """`compressed`: a file in gzip or deflate is unpacked first. `flatten`: the file is an
        input image, and whether its alpha channel is removed. BlobUnavailable.
        """
        async with self._places.place():
            child = self.idle.pop() if self.idle else start(*self._limits)
            if child.poll() is not None:  # killed while it was idle
                end(child)
                child = start(*self._limits)
            request = {"path": str(path), "compressed": compressed, "flatten": flatten}
            try:
                async with asyncio.timeout(WALL_S):
                    answer = await asyncio.to_thread(ask, child, request)
            except TimeoutError:
                end(child)
                return Validation("", 0, InvalidImage(f"it was not decoded within {WALL_S:g} s"))
            except (OSError, ValueError):  # the child died
                if end(child) == -signal.SIGXCPU:
                    reason = "it takes too much processor time to decode"
                    return Validation("", 0, InvalidImage(reason, final=True))
                return Validation("", 0, InvalidImage("its decoder broke down"))
            except BaseException:
                end(child)
                raise
            self.idle.append(child)
        if "unavailable" in answer:
            raise BlobUnavailable(answer["unavailable"])
        valid = "valid" in answer
        result = ValidImage(**answer["valid"]) if valid else InvalidImage(**answer["invalid"])
        measured = answer.get("measured") and MeasuredImage(**answer["measured"])
        return Validation(answer["sha256"], answer["bytes"], result, measured)


@asynccontextmanager
async def open_validator(
    concurrency: int, max_bytes: int, max_pixels: int
) -> AsyncIterator[ImageValidator]:
    validator = ImageValidator(concurrency, max_bytes, max_pixels)
    try:
        yield validator
    finally:
        for child in validator.idle:
            end(child)


def start(max_bytes: int, max_pixels: int) -> "subprocess.Popen[bytes]":
    """Starts a child in its own session: a terminal's Ctrl-C is for the parent, which finishes its
    work first. BlobUnavailable.
    """
    path = ":".join(filter(None, [str(ROOT), *sys.path]))
    command = [sys.executable, "-I", "-c", CHILD, str(max_bytes), str(max_pixels), path]
    libraries = os.environ.get("LD_LIBRARY_PATH")  # the interpreter may need it to start
    env = {"LD_LIBRARY_PATH": libraries} if libraries else {}
    try:
        return subprocess.Popen(  # noqa: S603 - the service's own program
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=True,
        )
    except OSError as error:  # no descriptors, processes or memory left
        raise BlobUnavailable(f"no process to validate it: {error.strerror}") from error


def ask(child: "subprocess.Popen[bytes]", request: dict[str, Any]) -> dict[str, Any]:
    """Blocks. OSError, ValueError: the child died."""
    assert child.stdin
    assert child.stdout
    child.stdin.write(json.dumps(request).encode() + b"\n")
    child.stdin.flush()
    answer: dict[str, Any] = json.loads(child.stdout.readline())
    return answer


def end(child: "subprocess.Popen[bytes]") -> int:
    """Kills a child, closes its pipes and returns its exit status."""
    with suppress(OSError), child:
        child.kill()
    return child.wait()
