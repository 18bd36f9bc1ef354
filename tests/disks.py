"""Disks for tests: small disks that fill up, and disks that fail every write."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.servers import missing

BALLAST = "ballast"
MEMORY, ROOM = Path("/dev/shm"), 2 << 30


def use_memory() -> None:
    """Temporary files of the run and of its processes go to a file system in memory, if it has room
    and programs may run from it. There, nobody waits for a disk. No test cuts the power: those of
    durability follow the calls that a process makes.
    """
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK):
        return
    if shutil.disk_usage(MEMORY).free > ROOM and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A mounted file system in memory, which needs root. The end of the block unmounts it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        missing("a small disk of one's own", "no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(disk: Path, how: str) -> None:
    """Remounts with `ro` or `rw`. The kernel refuses `ro` while a process has a file open for
    writing.
    """
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Writes a file until the disk is full."""
    with suppress(OSError), (disk / BALLAST).open("ab", buffering=0) as file:
        while True:
            file.write(bytes(min(1 << 16, max(1, shutil.disk_usage(disk).free))))


def empty(disk: Path) -> None:
    (disk / BALLAST).unlink()


def untraced(pid: int) -> bool:
    """Whether the tracer still misses one of the threads."""
    for thread in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(OSError):  # it has ended
            if "TracerPid:\t0" in thread.read_text():
                return True
    return False


@contextmanager
def unwritable(pid: int) -> Iterator[None]:
    """Every write of the process to its database fails with EROFS, as on a file system that went
    read-only after an error.

    The kernel does not remount a file system with a file open for writing, so `strace` injects the
    error.
    """
    if shutil.which("strace") is None:
        missing("strace", "PATH")
    calls = "pwrite64,fdatasync,fsync,ftruncate"
    command = f"strace -f -q -o /dev/null -e trace={calls} -e inject={calls}:error=EROFS -p {pid}"
    with subprocess.Popen(command.split(), stderr=subprocess.PIPE, text=True) as tracer:
        try:
            while untraced(pid):
                if tracer.poll() is not None:
                    assert tracer.stderr is not None
                    missing("strace", tracer.stderr.read().strip())
            yield
        finally:
            tracer.terminate()
