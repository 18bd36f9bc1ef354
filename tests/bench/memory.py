"""Memory of `darkroom serve` under callbacks: `python -m tests.bench.memory`. The load sends the
callbacks of its tasks again and again, so after the first time each of them is a duplicate.

It prints the resident memory after each tenth of the callbacks. The collector never looks at what a
process has at the end of its start, so this shows that nothing else depends on that.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from service.ops.garbage import THRESHOLDS
from tests.bench.acknowledgement import SECRET_KEY, prepare
from tests.bench.load import Connection, Run, request_bytes
from tests.bench.processes import MEASURED, MEASURING, address_in, pinned, server
from tests.environment import ROOT, clean_environment
from tests.processes import service_settings

TASKS, CONNECTIONS, PARTS = 2_000, 64, 10
HOUR_S = 3600.0


def resident_mib(pid: int, field: str = "VmRSS") -> float:
    """`field`: `VmHWM` is the most so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


async def send(address: str, requests: Iterator[bytes]) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    run, loop = Run(requests, HOUR_S), asyncio.get_running_loop()
    connect = (
        loop.create_connection(lambda: Connection(run), host, int(port)) for _ in range(CONNECTIONS)
    )
    await asyncio.gather(*connect)
    await run.over.wait()


def measured(folder: Path, upstream: str, callbacks: int) -> Iterator[float]:
    """The resident memory in MiB: at first, and after each part of the callbacks."""
    asyncio.run(prepare(folder, upstream, min(TASKS, callbacks)))
    shutil.copytree(folder / "template", folder / "data")
    lines = (folder / "requests").read_text().splitlines()
    requests = cycle([request_bytes(**json.loads(line)) for line in lines])
    settings, path = service_settings(upstream, folder, SECRET_KEY=SECRET_KEY), folder / "log"
    command = [sys.executable, "-m", "service", "serve"]
    with pinned(MEASURED), path.open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=clean_environment(settings), stdout=log)
    try:
        address = address_in(path, process)
        yield resident_mib(process.pid)
        for _ in range(PARTS):
            with pinned(MEASURING):
                asyncio.run(send(address, islice(requests, callbacks // PARTS)))
            yield resident_mib(process.pid)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.bench.memory")
    options.add_argument("--callbacks", type=int, default=500_000)
    callbacks = options.parse_args().callbacks
    with tempfile.TemporaryDirectory(prefix="data-bench-", dir=ROOT) as name:
        folder = Path(name)
        with server("tests.bench.servers", "upstream", folder=folder, cores=MEASURING) as upstream:
            figures = list(measured(folder, upstream, callbacks))
    print(f"{callbacks} callbacks, thresholds {THRESHOLDS}, MiB after each tenth:")
    print(", ".join(f"{figure:.0f}" for figure in figures))


if __name__ == "__main__":
    main()
