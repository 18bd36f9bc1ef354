"""What a process asked of the kernel, by `strace`: every call that changes files, makes them last,
or tells somebody something.
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
# `?`: not every machine has it. Descriptors with their paths, all text in hex and whole.
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
    """A system call. `path`: of its descriptor, or the first it names; `other`: the second, as of a
    rename.

    `numbers` are those among its arguments; `failed` is known when it is done, unless its process
    was killed in it: `cut`.
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
    """A call begins, or is done; or its process is killed in it."""

    call: Call
    done: bool
    line: int


@functools.cache
def permitted() -> bool:
    """Whether a process can be traced here."""
    tried = ["strace", *OPTIONS, "-o", os.devnull, "true"]
    return (
        shutil.which("strace") is not None
        and subprocess.run(tried, capture_output=True, check=False).returncode == 0
    )


def tracing(output: Path) -> tuple[str, ...]:
    """What stands before a command that is traced, with all its descendants. Skips where that is
    not possible.
    """
    if not permitted():
        missing("strace that is permitted to trace")
    return ("strace", *OPTIONS, "-o", str(output))


def text(hex: str) -> bytes:
    return bytes.fromhex(hex.replace("\\x", ""))


Begun = dict[
    str, tuple[str, str, Call]
]  # by thread: a call's name, what is printed of it so far, and the call


def moments(lines: Iterable[str], begun: Begun) -> Iterator[Moment]:
    """What happened, in its order. `begun` holds what is under way before the first line, and after
    the last.
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
    )  # of a process that is gone nobody knows
    yield Moment(call, done=True, line=number)


def read(name: str, arguments: str) -> Call:
    """A call by its arguments. A relative name belongs to the descriptor before it."""
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
