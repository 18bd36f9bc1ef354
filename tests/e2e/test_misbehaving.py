"""Runs every faulty behaviour of `faults.py` at once against a real service, and checks the outcome
from outside. DARKROOM_TEST_EACH=3 runs three tasks of each behaviour.
"""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.e2e.behaviours import MAX_BYTES, MAX_PIXELS, Behaviour
from tests.e2e.faults import BEHAVIOURS
from tests.e2e.misbehaving import Upstream, misbehaving
from tests.processes import ADMIN_KEY, UPSTREAM_KEY, Running, service_settings, started
from tests.waiting import wait_until

EACH = int(os.environ.get("DARKROOM_TEST_EACH", "1"))
SETTINGS = {
    "UPSTREAM_NETWORKS": "127.0.0.1/32",
    "EVOLINK_RESULT_HOSTS": "127.0.0.1,127.0.0.2",
    "EVOLINK_CONCURRENCY": "64",
    "SUBMIT_SCHEDULE": "0.2,0.5,1",
    "SUBMIT_TIMEOUT_S": "10",
    "SUBMIT_GIVE_UP_S": "60",
    "UNCERTAIN_AFTER_S": "60",
    "QUERY_TIMEOUT_S": "4",
    "RECONCILE_AFTER_S": "3",
    "NO_RESULTS_AFTER_S": "60",
    "DOWNLOAD_SCHEDULE": "0.2",
    "TEST_LEASE_MS": "600000",  # no job loses its lease while the machine sleeps
    "MAX_IMAGE_BYTES": str(MAX_BYTES),
    "MAX_IMAGE_PIXELS": str(MAX_PIXELS),
}
# A stalled file is given up after 4 s. On a signal, the clock goes on as if the machine had slept.
PRELUDE = """
import signal
from service.db.clock import SteadyClock
from service.images import download_worker

download_worker.IDLE_S = 4.0
slept, clock = [], SteadyClock.__call__
signal.signal(signal.SIGUSR1, lambda *_: slept.append(60_000))
SteadyClock.__call__ = lambda self: clock(self) + sum(slept)
"""
PATIENCE_S, LATE_S = 150, 30
# What the service logs of tasks with these codes before only time decides them.
WAITING = {
    "submission_uncertain": "task.submission_uncertain",
    "no_results": "task.results_awaited",
    "results_lost": "task.results_awaited",
}
LOUD = {
    "image.lost",
    "task.submission_retried",
    "account.refused",
    "upstream.unusable",
}  # log errors that belong to these cases: a lost image, a refused account
TERMINAL = {f"image.task.{state}" for state in ("completed", "failed", "cancelled", "expired")}
Json = dict[str, Any]


class Outcome(NamedTuple):
    """The outcome of a task as its application, its upstream and its operators saw it. `images`
    names by position the task whose image the service serves.
    """

    terminal: tuple[str, ...]
    state: str
    code: str | None
    status: int
    images: Mapping[int, str]
    credits: float | None
    submissions: int
    untold: frozenset[str] = frozenset()


def behaviour(prompt: str) -> Behaviour:
    return BEHAVIOURS[prompt.partition(" ")[0]]


def wanted(prompt: str, found: Outcome) -> Outcome:
    expected = behaviour(prompt)
    images = {position: f"{prompt}/{position}" for position in expected.images}
    refused = (
        expected.code == "not_submitted" and found.submissions > 2
    )  # each submission was proved to have created no task
    submissions = found.submissions if refused else len(expected.submits)
    terminal = (f"image.task.{expected.state}",)
    return Outcome(
        terminal,
        expected.state,
        expected.code,
        expected.status,
        images,
        expected.credits,
        submissions,
    )


def order(prompt: str) -> Json:
    return {"json": {"model": "wan2.5-text-to-image", "prompt": prompt, "size": "768x768", "n": 2}}


async def submitted(client: httpx.AsyncClient, prompt: str) -> httpx.Response:
    headers = {"prefer": "respond-async", "idempotency-key": prompt.replace(" ", "/")}
    return await client.post("/v1/images/generations", **order(prompt), headers=headers)


def task_of(answer: httpx.Response, prompt: str) -> str:
    """The id of the accepted task. The upstream may have refused it before the answer."""
    if answer.status_code == 200:
        return str(answer.json()["id"])
    assert answer.status_code == behaviour(prompt).status, answer.text
    return str(answer.json()["error"]["task_id"])


def only_waits(upstream: Upstream, service: Running, task_id: str, prompt: str) -> bool:
    """Whether nothing but time ends the task."""
    code = behaviour(prompt).code
    if code == "not_submitted":
        return len(upstream.submissions[prompt]) > 2
    logged = service.logged(WAITING[code]) if code in WAITING else ()
    return any(line.get("task_id") == task_id for line in logged)


async def followed(
    client: httpx.AsyncClient, upstream: Upstream, service: Running, prompts: Mapping[str, str]
) -> None:
    """Reads the events until every task has ended, and tells the upstream what the application
    knows so far. The machine sleeps once all other tasks have ended.
    """
    after: dict[str, str] = {}
    running = set(prompts)
    slept = False
    with suppress(TimeoutError):  # the comparison below reports tasks that have not ended
        async with asyncio.timeout(PATIENCE_S):
            while running:
                if not slept and all(
                    only_waits(upstream, service, task_id, prompts[task_id]) for task_id in running
                ):
                    service.signal(signal.SIGUSR1)
                    slept = True
                page = (
                    await client.get("/v1/events", params={"limit": 1000, "wait": 1, **after})
                ).json()
                after = {"after": page["next_after"]}
                for event in page["data"]:
                    if task := upstream.tasks.get(prompts.get(event["subject"], "")):
                        (task.ended if event["type"] in TERMINAL else task.submitted).set()
                        running -= {event["subject"]} if event["type"] in TERMINAL else set()


async def all_events(client: httpx.AsyncClient) -> list[Json]:
    events: list[Json] = []
    after: dict[str, str] = {}
    while page := (await client.get("/v1/events", params={"limit": 1000, **after})).json():
        if not page["data"]:
            break
        events += page["data"]
        after = {"after": page["next_after"]}
    return events


async def pictures(client: httpx.AsyncClient, upstream: Upstream, task: Json) -> dict[int, str]:
    """The owner of the image at each position. An image that is not served safely has no owner."""
    origins = {
        made: f"{prompt}/{at}"
        for prompt, each in upstream.tasks.items()
        for at, made in enumerate(each.pictures)
    }
    found = {}
    for image in task["images"]:
        answer = await client.get(image["url"])
        safe = (
            answer.headers["content-type"].startswith("image/")
            and answer.headers["x-content-type-options"] == "nosniff"
        )
        found[image["index"]] = (
            origins.get(answer.content, "nobody's")
            if safe and answer.status_code == 200
            else "unsafe"
        )
    return found


async def seen(
    client: httpx.AsyncClient, upstream: Upstream, service: Running, prompts: Mapping[str, str]
) -> dict[str, Outcome]:
    answers = {
        prompt: await submitted(client, prompt) for prompt in prompts.values()
    }  # repeats each order under the same key
    events = await all_events(client)
    lines = [json.loads(line) for line in list(service.lines) if line.startswith("{")]
    told = {(line.get("task_id"), line["event"]) for line in lines} | {
        (event["data"].get("task_id"), event["type"]) for event in events
    }
    outcomes = {}
    assert [event["sequence"] for event in events] == sorted(
        {event["sequence"] for event in events}
    )
    often = Counter(
        (event["subject"], event["type"])
        for event in events
        if event["type"].startswith("image.task.")
    )
    assert [each for each, times in often.items() if times > 1] == []
    for task_id, prompt in prompts.items():
        terminal = tuple(
            event["type"]
            for event in events
            if event["subject"] == task_id and event["type"] in TERMINAL
        )
        task = (await client.get(f"/v1/tasks/{task_id}")).json()
        assert answers[prompt].headers["idempotency-replayed"] == "true"
        outcomes[prompt] = Outcome(
            terminal,
            task["state"],
            (task["error"] or {}).get("code"),
            answers[prompt].status_code,
            await pictures(client, upstream, task),
            task["usage"]["credits_used"],
            len(upstream.submissions[prompt]),
            frozenset(behaviour(prompt).tells)
            - {event for known, event in told if known == task_id},
        )
    return outcomes


async def late(client: httpx.AsyncClient, service: Running, prompts: Mapping[str, str]) -> None:
    """Waits until the service has reported the callbacks that came after the end of a task."""
    for task_id, prompt in prompts.items():
        expected = behaviour(prompt)

        async def told(
            task_id: str = task_id, tells: frozenset[str] = frozenset(expected.tells)
        ) -> bool:
            events = (
                await client.get("/v1/events", params={"task": task_id, "limit": 1000})
            ).json()["data"]
            logged = {
                name
                for name in tells
                if any(line.get("task_id") == task_id for line in service.logged(name))
            }
            return tells <= logged | {event["type"] for event in events}

        if expected.when == "ended":
            with suppress(AssertionError):
                await wait_until(told, LATE_S)


def percentiles(times: list[float]) -> str:
    ordered = sorted(times)
    return (
        f"p50 {ordered[len(ordered) // 2]:.1f} ms, p99 {ordered[len(ordered) * 99 // 100]:.1f} ms"
    )


@pytest.mark.timeout(400)
async def test_whatever_the_upstream_does_each_task_ends_once_and_rightly(tmp_path: Path) -> None:
    """Each task has one correct terminal event and its own images in order. The service submits
    nothing again without proof, calls no forbidden address and answers no 500.
    """
    limits = httpx.Limits(max_connections=40)  # a key may have 50 bodies under way
    auth = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with misbehaving(BEHAVIOURS) as upstream:
        orders = [f"{name} {number}" for number in range(EACH) for name in BEHAVIOURS]
        for prompt in orders:
            upstream.order(prompt)
        settings = service_settings(upstream.base, tmp_path, **SETTINGS)
        with started("serve", folder=tmp_path, prelude=PRELUDE, **settings) as service:
            async with httpx.AsyncClient(
                base_url=service.address, headers=auth, timeout=90, limits=limits, trust_env=False
            ) as client:
                answers = await asyncio.gather(*(submitted(client, prompt) for prompt in orders))
                prompts = {
                    task_of(answer, prompt): prompt
                    for answer, prompt in zip(answers, orders, strict=True)
                }
                await followed(client, upstream, service, prompts)
                await late(client, service, prompts)
                await upstream.repeat()
                outcomes = await seen(client, upstream, service, prompts)

    right = {prompt: wanted(prompt, outcome) for prompt, outcome in outcomes.items()}
    wrong = {
        prompt: (outcome, right[prompt])
        for prompt, outcome in outcomes.items()
        if outcome != right[prompt]
    }
    assert not wrong, "\n".join(
        f"{prompt}\n  is     {found}\n  should {should}"
        for prompt, (found, should) in sorted(wrong.items())
    )
    for prompt, requests in upstream.submissions.items():
        keys = {(request.headers["idempotency-key"], request.body) for request in requests}
        assert len(keys) == 1, prompt
        assert prompts[keys.pop()[0]] == prompt
    for number in range(EACH):
        fetched = upstream.tasks[f"file_stalled {number}"].fetched
        assert max(fetched.values()) > 1, "the worker fetches a stalled file again"
    assert upstream.trespasses == []
    assert upstream.keys_given_away == []
    assert [
        (called.task.id, called.status) for called in upstream.called if called.status != 200
    ] == []
    lines = [json.loads(line) for line in service.lines if line.startswith("{")]
    assert {line["event"] for line in lines if line["level"] in ("error", "critical")} <= LOUD
    assert [
        line for line in lines if line["event"] == "http.request" and line["status"] >= 500
    ] == []
    assert not any(UPSTREAM_KEY in line or "Traceback" in line for line in service.lines)
    theirs = percentiles([called.seconds * 1000 for called in upstream.called])
    ours = percentiles(
        [line["duration_ms"] for line in lines if line["event"] == "callback.received"]
    )
    print(
        f"\n{len(orders)} tasks, {len(upstream.called)} callbacks: {theirs} as the upstream saw"
        f" it, {ours} of it in the service"
    )
