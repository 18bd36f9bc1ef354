"""Fair queueing among owners over real sockets, and a full disk that refuses new submissions
only.
"""

import asyncio
from pathlib import Path

import pytest
from starlette.responses import Response

from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, order, refused, submitted
from tests.upstream import After, Upstream, document, picture
from tests.waiting import wait_until
from tests.world import world

pytestmark = pytest.mark.slow

FLOOD = 120


async def test_one_owners_flood_delays_anothers_task_by_a_round(tmp_path: Path) -> None:
    """One owner has a hundred waiting tasks and submits more. The single task of another owner is
    sent in the next round, and every task is sent once.
    """
    theirs, gate = Upstream(), asyncio.Event()
    for number in range(4):
        theirs.submits[f"flood {number}"] = [
            After(gate.wait, document("pending", id=f"task-unified-first-{number}"))
        ]
    async with (
        world(tmp_path, upstream=theirs.app, evolink_concurrency=4) as here,
        here.owner() as crowd,
        here.owner() as modest,
    ):
        for number in range(FLOOD):
            await submitted(crowd, ASYNC, prompt=f"flood {number}")
        await wait_until(lambda: len(theirs.received) == 3)  # three quarters of the slots
        await submitted(modest, ASYNC, prompt="modest")
        for number in range(FLOOD, FLOOD + 20):
            await submitted(crowd, ASYNC, prompt=f"flood {number}")
        gate.set()
        await wait_until(lambda: len(theirs.received) == FLOOD + 21, timeout=60)
        order_of_arrival = list(theirs.received)
        assert order_of_arrival.index("modest") < 3 + 1 + 4, (
            "3 in flight, 1 leased already, 4 of the next round"
        )
        assert {len(requests) for requests in theirs.received.values()} == {1}


async def test_without_space_only_new_submissions_are_refused(tmp_path: Path) -> None:
    """Below `MIN_FREE_BYTES` a submission gets 503 with `Retry-After`. Callbacks are answered 200,
    their images are stored, and an idempotent replay finds its task.
    """
    theirs, key = Upstream(), {"idempotency-key": "first"}
    async with world(tmp_path, upstream=theirs.app) as here:
        task = got(await here.client.post(SUBMIT, json=order(), headers=key))
    theirs.files["0"] = [Response(picture(), media_type="image/png")]
    async with world(tmp_path, upstream=theirs.app, min_free_bytes=1 << 62) as here:
        url = f"{here.sandbox_url}/files/0"
        theirs.queries[task["upstream_id"]] = [document("completed", url)]
        answer = await here.client.post(SUBMIT, json=order())
        refused(answer, 503, "no_space")
        assert int(answer.headers["retry-after"]) >= 1
        assert (await here.client.get("/readyz")).json() == {
            "status": "degraded",
            "causes": ["blobs"],
        }
        called = await here.stranger.post(
            here.callback_url(task["id"]), json={"status": "completed", "results": [url]}
        )
        assert (called.status_code, called.json()) == (200, {"status": "accepted"})
        again = got(await here.client.post(SUBMIT, json=order(), headers=key | UNTIL_DONE))
        assert (again["id"], again["state"]) == (task["id"], "completed")
        assert (await here.client.get(again["images"][0]["url"])).content == picture()
        assert len(got(await here.client.get("/v1/tasks"))["data"]) == 1
        assert len(theirs.received) == 1
