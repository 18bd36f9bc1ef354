"""Validates images in child processes: a decoder holds the interpreter's lock, and callbacks must
not wait for it.

An image that kills its child, or takes too long, costs one attempt of one download, and all
attempts if its processor time was too much. A child gets an environment without the service's
secrets. It reads one request per line and writes one answer per line, both JSON, and it ends with
its input, so it never outlives its parent.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from service.errors import BlobUnavailable
from service.fair_slots import FairSlots
from service.images.validated_image import InvalidImage, MeasuredImage, Validation, ValidImage
from service.strict_json import JSON

WALL_S = 120.0
# Requests that an only child has: it decodes the first, and finds the next in its input. Of several
# children each has one, so that no image waits behind a slow one beside an idle child.
AT_ONCE = 3
# The child's program. The last argument is where it imports from, because its environment is empty.
CHILD = """import sys
sys.path[:] = sys.argv.pop().split(":")
from service.images.validator_child import main
main(int(sys.argv[1]), int(sys.argv[2]))"""
ROOT = Path(__file__).parents[2]  # where `service` is imported from


class Child:
    """A child process, and the calls that wait for its answers, in the order of their requests.
    BlobUnavailable: it cannot be started.
    """

    def __init__(self, max_bytes: int, max_pixels: int) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            self.process = start(max_bytes, max_pixels)
        except OSError as error:  # no descriptors, processes or memory left
            reason = f"no process to validate it: {error.strerror}"
            raise BlobUnavailable(reason) from error
        assert self.process.stdin
        assert self.process.stdout
        self._requests, self._answers = self.process.stdin, self.process.stdout
        for pipe in (self._requests, self._answers):
            os.set_blocking(pipe.fileno(), False)
        self._loop.add_reader(self._answers, self._read)
        self._received = b""
        self._calls: deque[asyncio.Future[JSON | None]] = deque()
        self._clock: asyncio.TimerHandle | None = None  # for the first call

    def __len__(self) -> int:
        """The requests that it has not answered."""
        return len(self._calls)

    async def ask(self, request: JSON) -> JSON | None:
        """The answer, which says so if the child ends with this file in hand. None: it ended before
        it came to this file.
        """
        call: asyncio.Future[JSON | None] = self._loop.create_future()
        self._calls.append(call)
        if len(self) == 1:
            self._time()
        with suppress(OSError):  # it has ended, and `_read` finds out
            if self._requests.write(json.dumps(request).encode() + b"\n") is None:
                self.end()  # it reads nothing, and the requests of cancelled calls fill the pipe
        try:
            return await call
        except asyncio.CancelledError:
            self._receive()
            if self._calls and self._calls[0] is call:
                self.end()
            raise

    def alive(self) -> bool:
        """The kernel may have killed it while it was idle."""
        if self.process.poll() is not None:
            self.end()
        return self.process.returncode is None

    def end(self, reason: str = "its decoder broke down") -> None:
        """Kills the process. `reason`: what is wrong with the file in hand."""
        if self._answers.closed:
            return
        self._receive()
        self._loop.remove_reader(self._answers)
        with self.process:  # closes the pipes and waits
            self.process.kill()
        final = self.process.returncode == -signal.SIGXCPU
        if final:
            reason = "it takes too much processor time to decode"
        self._answer({"sha256": "", "bytes": 0, "invalid": {"reason": reason, "final": final}})
        while self._calls:
            self._answer(None)

    def _read(self) -> None:
        if not self._receive():
            self.end()

    def _receive(self) -> bool:
        """Hands out the answers that are there. False: no more will come."""
        try:
            while received := os.read(self._answers.fileno(), 1 << 16):
                *lines, self._received = (self._received + received).split(b"\n")
                for line in lines:
                    self._answer(json.loads(line))
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            pass
        return False

    def _answer(self, answer: JSON | None) -> None:
        if self._calls and not (call := self._calls.popleft()).done():
            call.set_result(answer)
        self._time()

    def _time(self) -> None:
        """Gives the first call its time."""
        if self._clock is not None:
            self._clock.cancel()
        late = self._loop.call_later
        self._clock = late(WALL_S, self._late, self._calls[0]) if self._calls else None

    def _late(self, call: "asyncio.Future[JSON | None]") -> None:
        self._receive()
        if self._calls and self._calls[0] is call:
            self.end(f"it was not decoded within {WALL_S:g} s")


class ImageValidator:
    """Validates files in `concurrency` children. A child is started when it is first needed, and
    the first one by `warm`.
    """

    def __init__(self, concurrency: int, max_bytes: int, max_pixels: int) -> None:
        self._slots = FairSlots(AT_ONCE if concurrency == 1 else concurrency, rest=0)
        self._concurrency, self._limits = concurrency, (max_bytes, max_pixels)
        self.children: list[Child] = []

    def warm(self) -> None:
        """Starts a child, so that the first image does not wait for its imports."""
        with suppress(BlobUnavailable):
            self.children.append(Child(*self._limits))

    async def validate(
        self, path: Path, *, compressed: bool = False, flatten: bool | None = None
    ) -> Validation:
        """`compressed`: a file in gzip or deflate is unpacked first. `flatten`: the file is an
        input image, and whether its alpha channel is removed. BlobUnavailable.
        """
        request = {"path": str(path), "compressed": compressed, "flatten": flatten}
        answer: JSON | None = None
        async with self._slots.slot():
            while answer is None:
                answer = await self._child().ask(request)
        if "unavailable" in answer:
            raise BlobUnavailable(answer["unavailable"])
        valid = "valid" in answer
        result = ValidImage(**answer["valid"]) if valid else InvalidImage(**answer["invalid"])
        measured = answer.get("measured") and MeasuredImage(**answer["measured"])
        return Validation(answer["sha256"], answer["bytes"], result, measured)

    def _child(self) -> Child:
        """The child with the fewest requests, or a new one if all have some."""
        self.children = [child for child in self.children if child.alive()]
        child = min(self.children, key=len, default=None)
        if child is None or (len(child) and len(self.children) < self._concurrency):
            child = Child(*self._limits)
            self.children.append(child)
        return child


@asynccontextmanager
async def open_validator(
    concurrency: int, max_bytes: int, max_pixels: int
) -> AsyncIterator[ImageValidator]:
    validator = ImageValidator(concurrency, max_bytes, max_pixels)
    try:
        yield validator
    finally:
        for child in validator.children:
            child.end()


def start(max_bytes: int, max_pixels: int) -> "subprocess.Popen[bytes]":
    """Starts a child in its own session: a terminal's Ctrl-C is for the parent, which finishes its
    work first. OSError.
    """
    path = ":".join(filter(None, [str(ROOT), *sys.path]))
    command = [sys.executable, "-I", "-c", CHILD, str(max_bytes), str(max_pixels), path]
    libraries = os.environ.get("LD_LIBRARY_PATH")  # the interpreter may need it to start
    env = {"LD_LIBRARY_PATH": libraries} if libraries else {}
    return subprocess.Popen(  # noqa: S603 - the service's own program
        command,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        close_fds=True,
        bufsize=0,
    )
