"""`wrk` beside our own load on the bare route, to see whether our own is the bottleneck."""

import re
import shutil
import subprocess
from pathlib import Path

from tests.bench.processes import MEASURED, MEASURING, pinned, server
from tests.environment import clean_environment

MISSING = (
    "`wrk` is not installed (`apt-get install wrk`): our own load was not compared with it and may"
    " be the bottleneck of the bare route."
)
RATE, P99 = re.compile(r"Requests/sec:\s+([\d.]+)"), re.compile(r"99%\s+([\d.]+)(us|ms|s)")
MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
SCRIPT = """wrk.method = "POST"
wrk.path = "/callbacks/evolink/task/token"
wrk.headers["content-type"] = "application/json"
wrk.body = '{body}'
"""


def compared(folder: Path, connections: int, seconds: float, ours: float) -> str:
    """A sentence about the bare route under both loads. `ours`: answers a second of our own."""
    program = shutil.which("wrk")
    if program is None:
        return MISSING
    script = folder / "wrk.lua"
    body = '{"id": "upstream", "status": "completed", "results": [], "progress": 100}'
    script.write_text(SCRIPT.replace("{body}", body.ljust(200)))
    with server("tests.bench.servers", "bare", folder=folder, cores=MEASURED) as address:
        command = [program, "-t", "1", "-c", str(connections), "-d", f"{max(1, round(seconds))}s"]
        command += ["--latency", "-s", str(script), address]
        with pinned(MEASURING):
            done = subprocess.run(
                command,
                env=clean_environment({}),
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
    rate, p99 = RATE.search(done.stdout), P99.search(done.stdout)
    if rate is None or p99 is None or "Non-2xx" in done.stdout:
        raise SystemExit(f"wrk said:\n{done.stdout}")
    theirs, tail = float(rate[1]), float(p99[1]) * MILLISECONDS[p99[2]]
    return (
        f"`wrk` gets {theirs:.0f} answers a second from the bare route (p99 {tail:.1f} ms), our own"
        f" load {ours:.0f}."
    )
