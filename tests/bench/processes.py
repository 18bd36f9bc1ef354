"""Pins processes to cores: the measured process to the first, the measuring ones to the last."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.bench.load import GOOD
from tests.environment import ROOT, clean_environment

START_S, RUN_S, TICKS = 60.0, 60.0, os.sysconf("SC_CLK_TCK")
CORES = sorted(os.sched_getaffinity(0))
MEASURED, MEASURING = {CORES[0]}, {CORES[-1]}


@contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """Pins this process inside the block. A process started there inherits the cores, with every
    thread.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def server(*command: str, folder: Path, cores: set[int], **settings: str) -> Iterator[str]:
    """Runs `python -m …` as a process whose output goes to a file, as in production. Yields the
    address that it prints, and kills it at the end.
    """
    path = folder / f"{time.monotonic_ns()}.log"
    with pinned(cores), path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=clean_environment(settings),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield address_in(path, process)
    finally:
        process.kill()
        process.wait()


def address_in(path: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        for line in path.read_text().splitlines():
            said = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if "address" in said:
                return str(
                    said["address"]
                    if said["address"].startswith("http")
                    else f"http://{said['address']}"
                )
        time.sleep(0.05)
    raise SystemExit(f"a server did not start:\n{path.read_text()[-2000:]}")


def measure(
    address: str,
    requests: Path,
    repeat: str,
    connections: int,
    warm_up: float,
    seconds: float,
    good: str = GOOD,
) -> dict[str, float]:
    """One run of `tests.bench.load`. Every answer has to contain `good`."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.load",
        address,
        str(requests),
        repeat,
        str(connections),
        str(warm_up),
        str(seconds),
        good,
    ]
    with pinned(MEASURING):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=clean_environment({}),
            capture_output=True,
            text=True,
            timeout=warm_up + seconds + RUN_S,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"the load failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    if result["wrong"]:
        raise SystemExit(
            f"{result['wrong']:.0f} of {result['count']:.0f} requests were not accepted"
        )
    return result


def stat(pid: int) -> list[int]:
    """The fields of the process in `/proc`, from its parent's id on. OSError: it has ended."""
    return [int(x) for x in Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1:]]


def resident_mib(pid: int, field: str = "VmRSS") -> float:
    """`field`: `VmHWM` is the most so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def children(pid: int) -> list[int]:
    """The ids of its children that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if stat(int(path.name))[0] == pid:
                found.append(int(path.name))
    return found


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds of a process, and the sum for its children, ended ones included."""
    fields = stat(pid)
    ticks = sum(fields[12:14])
    for child in children(pid):
        with suppress(OSError):
            ticks += sum(stat(child)[10:12])
    return sum(fields[10:12]) / TICKS, ticks / TICKS
