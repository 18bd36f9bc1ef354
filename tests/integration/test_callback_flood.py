"""A flood of wrong tokens on a real process. The service rejects it and accepts callbacks."""

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import pytest

from service.signing import Keyring
from tests.api import submitted
from tests.callbacks import LIMIT, chunk, raw
from tests.processes import ADMIN_KEY, service_settings, started
from tests.waiting import wait_until

SECRET = "a secret key of thirty-two bytes or more"
FLOODS = {
    "small": ("content-length: 2\r\n", (b"{}",)),
    "large": (f"content-length: {LIMIT}\r\n", (b"x" * LIMIT,)),
    "endless": ("transfer-encoding: chunked\r\n", (chunk(b"x" * 65536),) * 1000),
}


async def hammer(
    url: str, headers: str, parts: tuple[bytes, ...], over: asyncio.Event, seen: Counter[int]
) -> None:
    """Sends up to thirty requests in a row, until `over` is set. A connection that ends without an
    answer counts as status 0.
    """
    for _ in range(30):
        if over.is_set():
            return
        try:
            status, _, _ = await raw(url, *parts, headers=headers)
        except (OSError, asyncio.IncompleteReadError):
            status = 0
        seen[status] += 1


@pytest.mark.parametrize(
    ("kind", "connections"), [("small", 200), ("large", 100), ("endless", 100)]
)
async def test_a_flood_of_wrong_tokens_stops_no_callback(
    kind: str, connections: int, tmp_path: Path
) -> None:
    """Many connections send requests without a token while every callback with its token gets 200.
    All refusals are counted, and few are logged.
    """
    keyring, over, seen = Keyring([SECRET.encode()]), asyncio.Event(), Counter[int]()
    with started(
        "serve",
        folder=tmp_path,
        **service_settings("http://127.0.0.1:9", tmp_path, SECRET_KEY=SECRET),
    ) as running:
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(base_url=running.address, headers=admin, timeout=60) as client:
            tasks = [
                (await submitted(client, prompt=f"a lighthouse {number}"))["id"]
                for number in range(5)
            ]
            token = keyring.callback_token("evolink", "another")
            wrong = f"{running.address}/callbacks/evolink/{tasks[0]}/{token}"
            flood = asyncio.gather(
                *(hammer(wrong, *FLOODS[kind], over, seen) for _ in range(connections))
            )
            for number in range(60):
                task_id = tasks[number % 5]
                path = f"/callbacks/evolink/{task_id}/{keyring.callback_token('evolink', task_id)}"
                answer = await client.post(
                    path, content=b'{"status": "processing", "progress": %d}' % number
                )
                assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
            await wait_until(lambda: seen[401] >= connections)
            over.set()
            await flood
            metrics = (await client.get("/metrics")).text
            await wait_until(lambda: running.logged("callback.refused"))
    assert seen.keys() <= {401, 0}
    counted = float(
        metrics.split('darkroom_callbacks_total{verdict="wrong_token"} ')[1].split("\n")[0]
    )
    assert seen[401] <= counted <= seen.total()
    lines = [line for line in running.logged("callback.refused") if line["reason"] == "wrong_token"]
    assert 0 < len(lines) < seen.total()
    assert sum(1 + line["withheld"] for line in lines) <= seen.total()
    assert not running.logged("http.failed")
