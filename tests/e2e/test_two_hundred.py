"""Two hundred tasks at once through real processes, the size that the product promises."""

import asyncio
import hashlib
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import ADMIN_KEY, UPSTREAM_KEY, sandbox, service_settings, started
from tests.waiting import wait_until

TASKS = 200
Json = dict[str, Any]


def body(number: int) -> Json:
    return {
        "model": "wan2.5-text-to-image",
        "prompt": f"第{number}张图 number {number}",
        "size": "768x768",
        "n": {7: 2, 14: 3, 19: 4}.get(number % 20, 1),
    }


@pytest.mark.timeout(300)
async def test_two_hundred_tasks_at_once_end_in_one_right_terminal_event_each(
    tmp_path: Path,
) -> None:
    """Every image equals the upstream's bytes and is still served after the upstream is gone. The
    service refuses no callback.
    """
    limits = httpx.Limits(max_connections=TASKS)
    with (
        # A JPEG takes less time to draw and to check than a PNG.
        sandbox("--delay", "0.5", "--fault", "format=jpeg", folder=tmp_path) as upstream,
        started(
            "serve", folder=tmp_path, **service_settings(upstream.address, tmp_path)
        ) as service,
    ):
        async with (
            httpx.AsyncClient(
                base_url=service.address,
                headers={"authorization": f"Bearer {ADMIN_KEY}"},
                timeout=90,
                limits=limits,
                trust_env=False,
            ) as client,
            httpx.AsyncClient(
                headers={"authorization": f"Bearer {UPSTREAM_KEY}"}, timeout=90, trust_env=False
            ) as theirs,
        ):
            headers = {"prefer": "respond-async"}
            answers = await asyncio.gather(
                *(
                    client.post("/v1/images/generations", json=body(number), headers=headers)
                    for number in range(TASKS)
                )
            )
            assert [answer.status_code for answer in answers] == [200] * TASKS
            wanted = {
                answer.json()["id"]: body(number)["n"] for number, answer in enumerate(answers)
            }

            async def terminal() -> list[Json] | None:
                events = (await client.get("/v1/events", params={"limit": 1000})).json()["data"]
                ended = [event for event in events if event["type"] != "image.task.submitted"]
                return ended if len(ended) >= TASKS else None

            ended: list[Json] = await wait_until(terminal, 90)
            assert Counter(event["subject"] for event in ended) == dict.fromkeys(wanted, 1)
            assert {event["type"] for event in ended} == {"image.task.completed"}
            assert {event["subject"]: len(event["data"]["images"]) for event in ended} == wanted

            sources = (await theirs.get(f"{upstream.address}/sandbox/tasks")).json()["data"]
            links = {source["id"]: source["results"] for source in sources}
            refused = [
                call for source in sources for call in source["callbacks"] if call["status"] != 200
            ]
            assert refused == []
            served = {}
            for event in ended:
                for link, image in zip(
                    links[event["data"]["upstream_id"]], event["data"]["images"], strict=True
                ):
                    original = (await theirs.get(link)).content
                    assert hashlib.sha256(original).hexdigest() == image["sha256"]
                    served[image["url"]] = original
            upstream.signal(signal.SIGKILL)
            for url, original in served.items():
                answer = await client.get(url)
                assert (answer.status_code, answer.content) == (200, original)
            await wait_until(lambda: len(service.logged("callback.received")) >= TASKS)
            assert len(service.logged("callback.received")) == TASKS
            assert {line["verdict"] for line in service.logged("callback.received")} == {"accepted"}
            assert not service.logged("worker.failed")
            assert not service.logged("http.failed")
