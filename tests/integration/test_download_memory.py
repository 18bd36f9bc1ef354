"""The memory of sixteen downloads at the limits in a real process, and its release afterwards."""

import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tests.downloads import validator_children
from tests.pictures import drawn
from tests.processes import ADMIN_KEY, Running, service_settings, started
from tests.upstream import Upstream, document
from tests.waiting import wait_until
from tests.world import TEXT_TO_IMAGE, answering

MIB = 1 << 20
SIDE, MAX_BYTES, PLACES = 2048, 16 * MIB, 16
ALLOWED = 24 * SIDE * SIDE + 3 * MAX_BYTES + PLACES * 4 * MIB  # the figure of docs/operations.md


class Streamed(Response):
    """A body that is sent piece by piece, so that the test measures only the service's memory."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for at in range(0, len(self.body), MIB):
            await send(
                {
                    "type": "http.response.body",
                    "body": self.body[at : at + MIB],
                    "more_body": at + MIB < len(self.body),
                }
            )


def family(running: Running) -> list[int]:
    return [running.process.pid, *validator_children(running.process.pid)]


def memory(pids: list[int], name: str) -> int:
    """The sum over all these processes."""
    lines = [
        line
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    ]
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def begun(pids: list[int]) -> int:
    """Resets the peaks of these processes and returns their memory now."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    return memory(pids, "VmRSS")


async def stored(
    client: httpx.AsyncClient, upstream: Upstream, url: str, name: str, count: int
) -> None:
    """Submits a task with `count` results and waits until all are stored."""
    asked = {"model": TEXT_TO_IMAGE, "prompt": name, "size": "768x768"}
    upstream.submits[name] = [document("pending", id=name)]
    upstream.queries[name] = [
        document("completed", *(f"{url}/files/{name}?{number}" for number in range(count)))
    ]
    task = (await client.post("/v1/images/generations", json=asked)).json()

    async def ended() -> bool:
        task.update((await client.get(f"/v1/tasks/{task['id']}")).json())
        return task["state"] in ("completed", "failed")

    await wait_until(ended, 100)
    assert (task["state"], len(task["images"])) == ("completed", count), task["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_sixteen_downloads_at_the_limits_keep_to_the_stated_memory(tmp_path: Path) -> None:
    """Bytes wait on disk, and one image at a time is in memory. Afterwards the service and its
    child are as small as before.
    """
    upstream = Upstream()
    whole = Image.new("RGB", (SIDE, SIDE), "teal")
    for at in range(0, SIDE, 8):
        whole.putpixel((at, at), (at % 256, 0, 0))
    whole.save(tmp_path / "largest.webp", lossless=True, quality=0, method=0)
    picture = (tmp_path / "largest.webp").read_bytes()
    upstream.files = {
        "first": [Response(drawn("WEBP"))],
        "largest": [Streamed(picture + bytes(MAX_BYTES - len(picture)))],
    }
    async with answering(upstream.app) as url:
        limits = {
            "MAX_IMAGE_PIXELS": SIDE * SIDE,
            "MAX_IMAGE_BYTES": MAX_BYTES,
            "RECONCILE_AFTER_S": 0.1,
            "DOWNLOAD_CONCURRENCY": PLACES,
        }
        with started(
            "serve",
            folder=tmp_path,
            **service_settings(
                url, tmp_path, **{name: str(limit) for name, limit in limits.items()}
            ),
        ) as running:
            async with httpx.AsyncClient(
                base_url=running.address,
                headers={"authorization": f"Bearer {ADMIN_KEY}"},
                timeout=60,
            ) as client:
                await stored(client, upstream, url, "first", 1)
                pids = family(running)
                before = begun(pids)
                await stored(client, upstream, url, "largest", PLACES)
                peak, after = memory(pids, "VmHWM") - before, memory(pids, "VmRSS") - before
                own = memory(pids[:1], "VmHWM")
                assert family(running) == pids
    print(
        f"peak {peak / MIB:.0f} MiB of {ALLOWED / MIB:.0f}, {after / MIB:.0f} MiB kept;"
        f" {own / MIB:.0f} MiB in the service itself"
    )
    assert 16 * SIDE * SIDE < peak < ALLOWED
    assert after < 100 * MIB
