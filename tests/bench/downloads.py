"""Downloads beside `curl`: `python -m tests.bench.downloads`.

An upstream answers submissions at once and sends no callback. The bench sends all callbacks, and
Darkroom fetches, decodes, syncs and records the pictures. `curl --parallel` fetches the same files
from the same process, and then each file is synced. Both take turns, each time in an empty folder.
"""

import asyncio
import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path

import httpx
from PIL import Image

from tests.bench.peers.contenders import CONTENDERS, Running, running
from tests.bench.peers.speed import arrived, burst, called, submitted
from tests.bench.processes import MEASURING, children, cpu_seconds, resident_mib, server
from tests.bench.program import run, spread
from tests.environment import clean_environment

AT_ONCE, MB = 16, 1_000_000
MISSING = "`curl` is not installed (`apt-get install curl`): its side was skipped."
CURL = ("curl", "--no-progress-meter", "--fail", "--noproxy", "*", "--http1.1", "--parallel")
# the side of the square in pixels, the share of noise, and the level of compression
PICTURES = {"compressed PNG": (2048, 0.07, 1), "PNG without compression": (1290, 1.0, 0)}
OURS, CURLS = "Darkroom, MB a second", "`curl` and a sync of each file, MB a second"
SHARE = "Darkroom of `curl`"
Figures = dict[str, float]


def picture(side: int, noise: float, level: int) -> bytes:
    base, file = Image.linear_gradient("L").resize((side, side)), io.BytesIO()
    bands = [Image.blend(base, Image.effect_noise(base.size, 12), noise) for _ in "RGB"]
    Image.merge("RGB", bands).save(file, "PNG", compress_level=level)
    return file.getvalue()


def by_curl(folder: Path, upstream: str, content: bytes, count: int) -> Figures:
    files, config = [folder / f"{number}.png" for number in range(count)], folder / "config"
    lines = (f'url = "{upstream}/files/{file.stem}/0.jpeg"\noutput = "{file}"' for file in files)
    config.write_text("\n".join(lines))
    command = [*CURL, "--parallel-max", str(AT_ONCE), "--config", str(config)]
    started = time.monotonic()
    subprocess.run(command, env=clean_environment({}), check=True)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    took = time.monotonic() - started
    assert all(path.read_bytes() == content for path in files)
    return {CURLS: count * len(content) / MB / took}


async def downloaded(
    here: Running, folder: Path, upstream: str, content: bytes, count: int
) -> Figures:
    """The time is that from the first callback to the last recorded picture."""
    pid = here.processes[0].running.pid

    def peaks() -> tuple[float, float]:
        """MiB of the main process, and of the validator's children."""
        sizes = [resident_mib(each, "VmHWM") for each in (pid, *children(pid))]
        return sizes[0], sum(sizes[1:])

    for process in (pid, *children(pid)):
        Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak begins anew
    idle = peaks()
    async with httpx.AsyncClient(base_url=upstream, timeout=60, trust_env=False) as client:
        ids = await submitted(here, client, count)
        before, offset = cpu_seconds(pid), time.time() - time.monotonic()
        calls = [(url, called(id, upstream)) for url, id in ids.items()]
        load = await asyncio.to_thread(burst, here, folder, calls)
        await arrived(client, "events", count // 4)
        early = peaks()
        await arrived(client, "events", count)
    cpu, late = cpu_seconds(pid), tuple(map(max, early, peaks()))  # the kernel's are not exact
    log = (folder / "serve.log").read_text().splitlines()
    stored = [json.loads(line) for line in log if '"image.stored"' in line]
    checksum = hashlib.sha256(content).hexdigest()
    assert [line["sha256"] for line in stored] == [checksum] * count, "a picture is missing"
    last = max(datetime.fromisoformat(line["timestamp"]).timestamp() for line in stored)
    figures = {OURS: count * len(content) / MB / (last - offset - load["started"])}
    for at, who in enumerate(("main process", "validator's processes")):
        figures[f"processor time of the {who}, s"] = cpu[at] - before[at]
        figures[f"memory of the {who} when idle, MiB"] = idle[at]
        for done, peak in ((count // 4, early), (count, late)):
            figures[f"peak of the {who} above that after {done} pictures, MiB"] = (
                peak[at] - idle[at]
            )
    return figures


def by_darkroom(folder: Path, upstream: str, content: bytes, count: int) -> Figures:
    with running(CONTENDERS[0], folder, upstream, DOWNLOAD_CONCURRENCY=str(AT_ONCE)) as here:
        return asyncio.run(downloaded(here, folder, upstream, content, count))


def measured(folder: Path, content: bytes, count: int, rounds: int) -> list[Figures]:
    """The figures of each round, in which the sides take turns to be the first."""
    sides = [by_darkroom, by_curl] if shutil.which("curl") else [by_darkroom]
    path, results = folder / "picture", list[Figures]()
    path.write_bytes(content)
    command = ("tests.bench.peers.upstream", "held", "0", str(path))
    for number in range(rounds):
        figures = dict.fromkeys((OURS, CURLS, SHARE)[: len(sides) * 2 - 1], 0.0)
        with server(*command, folder=folder, cores=MEASURING) as upstream:
            for side in sides if number % 2 == 0 else sides[::-1]:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    figures |= side(Path(place), upstream, content, count)
        if CURLS in figures:
            figures[SHARE] = figures[OURS] / figures[CURLS]
        results.append(figures)
    return results


def downloads(folder: Path, rounds: int, quick: bool) -> str:
    """The table, in Markdown."""
    count = 8 if quick else 200
    head, columns = f"| {count} pictures, {AT_ONCE} at once |", list[list[Figures]]()
    for name, (side, noise, level) in PICTURES.items():
        content = picture(side // 4 if quick else side, noise, level)
        head += f" {name}, {len(content) / MB:.1f} MB |"
        columns.append(measured(folder, content, count, rounds))
    lines = [head, "|---" * (len(columns) + 1) + "|"]
    for name in columns[0][0]:
        form = ".2f" if name == SHARE else ".1f"
        cells = (spread([run[name] for run in column], form) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines if CURLS in columns[0][0] else [*lines, "", MISSING])


if __name__ == "__main__":
    run("python -m tests.bench.downloads", "downloads", downloads)
