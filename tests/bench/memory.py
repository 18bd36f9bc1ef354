"""Memory of `darkroom serve` under callbacks: `python -m tests.bench.memory`. The load sends the
callbacks of its tasks again and again, so after the first time each of them is a duplicate.

It prints the resident memory after each tenth of the callbacks. The collector never looks at what a
process has at the end of its start, so this shows that nothing else depends on that.
"""

import argparse
import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from service.ops.garbage import THRESHOLDS
from tests.bench.acknowledgement import SECRET_KEY, prepare
from tests.bench.peers.contenders import CONTENDERS, running
from tests.bench.processes import MEASURING, measure, resident_mib, server
from tests.environment import ROOT

TASKS, CONNECTIONS, PARTS = 2_000, 64, 10
PART_S = 600  # at most, for one part


def measured(folder: Path, upstream: str, callbacks: int) -> Iterator[float]:
    """The resident memory in MiB: at first, and after each part of the callbacks."""
    asyncio.run(prepare(folder, upstream, min(TASKS, callbacks)))
    shutil.copytree(folder / "template", folder / "data")
    lines, part = (folder / "requests").read_text().splitlines(), folder / "part"
    part.write_text("\n".join(islice(cycle(lines), callbacks // PARTS)))
    with running(CONTENDERS[0], folder, upstream, SECRET_KEY=SECRET_KEY) as here:
        pid = here.processes[0].running.pid
        yield resident_mib(pid)
        for _ in range(PARTS):
            measure(here.url, part, "once", CONNECTIONS, 0, PART_S)
            yield resident_mib(pid)


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
