"""The system calls of a process, recorded by `strace`: every call that changes files, syncs them,
or sends data to a peer or a log.
"""

import functools
import os
import posixpath
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import missing

CHANGES = {
    *(
        "open",
        "openat",
        "creat",
        "write",
        "writev",
        "pwrite64",
        "pwritev",
        "pwritev2",
        "ftruncate",
        "truncate",
        "fallocate",
    ),
    *(
        "rename",
        "renameat",
        "renameat2",
        "link",
        "linkat",
        "symlink",
        "symlinkat",
        "unlink",
        "unlinkat",
        "mkdir",
        "mkdirat",
        "rmdir",
    ),
    *("copy_file_range", "sendfile", "splice"),
}
SYNCS = {"fsync", "fdatasync", "sync", "syncfs"}
TALK = {"sendto", "sendmsg"}
# `?` allows a call that this machine lacks. Descriptors come with their paths, and text is in hex
# and complete.
OPTIONS = (
    "-f",
    "--seccomp-bpf",
    "-y",
    "-xx",
    "-s",
    "100000000",
    "-e",
    "trace=" + ",".join(f"?{name}" for name in sorted(CHANGES | SYNCS | TALK)),
)

LINE = re.compile(
    r"(\d+) +(?:(\+\+\+) (killed|exited)|<\.\.\. (\w+) resumed>(.*)|(\w+)\((.*))", re.DOTALL
)
TOKEN = re.compile(r'(?:\d+|AT_FDCWD)<((?:\\x..)*)>(\(deleted\))?|"((?:\\x..)*)"')
NUMBER = re.compile(r"(?<=, )(-?\d+)(?=[,)]|$)")
OPENED = re.compile(r"= \d+<((?:\\x..)*)>$")


@dataclass(slots=True)
class Call:
    """A system call. `path` belongs to its descriptor, or is the first path it names. `other` is
    the second path, as of a rename.

    `numbers` are its numeric arguments. `failed` is known when the call is done. `cut` means that
    the process was killed during the call.
    """

    name: str
    path: str = ""
    other: str = ""
    data: bytes = b""
    numbers: list[int] = field(default_factory=list)
    flags: str = ""
    failed: bool = False
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """The start or the end of a call. A killed process also ends its call."""

    call: Call
    done: bool
    line: int


@functools.cache
def permitted() -> bool:
    """Whether strace may trace a process here."""
    tried = ["strace", *OPTIONS, "-o", os.devnull, "true"]
    return (
        shutil.which("strace") is not None
        and subprocess.run(tried, capture_output=True, check=False).returncode == 0
    )


def tracing(output: Path) -> tuple[str, ...]:
    """The start of a command that traces a process and its descendants. Skips the test where
    tracing is not possible.
    """
    if not permitted():
        missing("strace that is permitted to trace")
    return ("strace", *OPTIONS, "-o", str(output))


def text(hex: str) -> bytes:
    return bytes.fromhex(hex.replace("\\x", ""))


Begun = dict[
    str, tuple[str, str, Call]
]  # by thread: the name of the call, its printed text so far, and the call


def moments(lines: Iterable[str], begun: Begun) -> Iterator[Moment]:
    """Yields the moments in order. `begun` has the calls under way before the first line, and after
    the last one.
    """
    for number, line in enumerate(lines):
        found = LINE.match(line)
        if found is None:
            continue  # a signal
        pid, ended, _, resumed, rest, name, arguments = found.groups()
        if ended:
            if pid in begun:
                call = begun.pop(pid)[2]
                call.cut = True
                yield Moment(call, done=True, line=number)
        elif resumed:
            name, printed, call = begun.pop(pid)
            assert name == resumed, line
            yield from finished(name, printed + rest, call, number)
        elif arguments.rstrip("\n").endswith("<unfinished ...>"):
            printed = arguments.rstrip("\n").removesuffix("<unfinished ...>")
            call = read(name, printed)
            begun[pid] = (name, printed, call)
            yield Moment(call, done=False, line=number)
        else:
            yield from finished(name, arguments, None, number)


def finished(name: str, arguments: str, begun: Call | None, number: int) -> Iterator[Moment]:
    given, _, result = arguments.rstrip("\n").rpartition(" = ")
    call = begun or read(name, given)
    if begun is None:
        yield Moment(call, done=False, line=number)
    opened = OPENED.search(arguments.rstrip("\n"))
    if opened:
        call.path = text(opened[1]).decode("utf-8", "surrogateescape")
    call.failed, call.cut = (
        result.startswith("-1 E"),
        result.startswith(("?", "-1 (errno")),
    )  # the result is unknown if the process is gone
    yield Moment(call, done=True, line=number)


def read(name: str, arguments: str) -> Call:
    """Parses a call's arguments. A relative name belongs to the descriptor before it."""
    names: list[str] = []
    data, folder = b"", ""
    takes_data = name in TALK or name.startswith(("write", "pwrite"))
    for path, deleted, string in TOKEN.findall(arguments):
        if path:
            folder = text(path).decode("utf-8", "surrogateescape") + deleted
            names.append(folder)
        elif takes_data:
            data += text(string)
        else:
            named = text(string).decode("utf-8", "surrogateescape")
            if folder and folder == names[-1]:
                names.pop()
            names.append(posixpath.join(folder, named))
    bare = TOKEN.sub("", arguments)
    first, second = [*names, "", ""][:2]
    numbers = [int(found) for found in NUMBER.findall(bare.rstrip(") "))]
    return Call(name, first, second, data, numbers, bare if name.startswith("open") else "")
