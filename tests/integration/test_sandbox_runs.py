"""The sandbox's faults in combination, by share, by seed and by the flags of the command."""

import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service.upstreams.sandbox import FAULTS, create_sandbox
from tests.processes import UPSTREAM_KEY, darkroom
from tests.processes import sandbox as process
from tests.sandbox import (
    ORDER,
    QUICK,
    WAYS,
    Receiver,
    created,
    faulty,
    finished,
    receiving,
    sandbox,
    submit,
    taken,
)

KEYED = {"idempotency-key": "task_0123456789abcdef"}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.mark.parametrize("way", WAYS)
async def test_faults_of_all_places_combine(way: str, receiver: Receiver) -> None:
    """A submission is refused, then lost, then created with a lost answer. Its callback repeats and
    contradicts, and queries and files fail.
    """
    faults: dict[str, Any] = {
        "submit_status": {"status": 503, "times": 1},
        "lose_submission": 2,
        "lose_answer": True,
        "images": 2,
        "usage": "absent",
        "repeat_callback": 2,
        "contradict": True,
        "garbage_callback": True,
        "query_status": 500,
        "query_cut": 10,
        "query_times": 1,
        "file_content": "html",
        "file_type": "image/png",
        "file_cut": 9,
        "file_times": 1,
    }
    async with faulty(way, **faults) as here:
        assert (await here.submit(KEYED, callback_url=receiver.url)).status_code == 503
        for so_far in (0, 0, 1):
            with pytest.raises(httpx.RemoteProtocolError):
                await here.submit(KEYED, callback_url=receiver.url)
            assert len(await here.created()) == so_far
        told = [await receiver.next() for _ in range(3)]
        url = f"/v1/tasks/{told[0]['id']}"
        assert await taken(here.client, "GET", url) == (b'{"error":{', False)
        assert (await here.client.get(url)).json() == told[0] == told[1]
        for link in told[0]["results"]:
            assert await taken(here.client, "GET", link) == (b"<!DOCTYPE", False)
            assert Image.open(io.BytesIO((await here.client.get(link)).content)).format == "PNG"
    assert [body["status"] for body in told] == ["completed", "completed", "failed"]
    assert (len(told[0]["results"]), "usage" in told[0]) == (2, False)


async def test_a_request_goes_over_the_flags() -> None:
    """A request's value overrides the default of a flag, and null removes the default. Other
    defaults stay.
    """
    async with faulty("flag", fail="service_error", usage="absent") as here:
        assert (await here.finished())["error"]["code"] == "service_error"
        assert (await here.finished(sandbox={"fail": "unknown_error"}))["error"][
            "code"
        ] == "unknown_error"
        task = await here.finished(sandbox={"fail": None})
    assert (task["status"], "usage" in task) == ("completed", False)


async def test_an_unknown_fault_is_refused_by_name() -> None:
    """A request gets 400 with the name. An unknown default fault stops the start."""
    async with sandbox() as client:
        answer = await submit(client, sandbox={"explode": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "sandbox")
    assert "explode" in answer.json()["error"]["message"]
    with pytest.raises(ValueError, match="explode"):
        create_sandbox(replace(QUICK, faults={"explode": 1}))


# --- shares and seeds
# --------------------------------------------------------------------------------------------

CHANCES = replace(
    QUICK,
    faults={"fail": "service_error", "images": 2, "submit_status": 503},
    shares={"fail": 0.3, "submit_status": 0.3},
)


async def story(client: httpx.AsyncClient, prompts: list[str]) -> dict[str, list[Any]]:
    """By prompt: the status of each refused submission, or the whole task with the bytes of its
    files.
    """
    told: dict[str, list[Any]] = {prompt: [] for prompt in prompts}
    for prompt in prompts:
        answer = await submit(
            client,
            prompt=prompt,
            sandbox={"callback_first": True},
            callback_url=f"https://8.8.8.8/{len(told)}/{id(told)}",
        )
        if answer.status_code != 200:
            told[prompt].append(answer.status_code)
            continue
        task = (await client.get(f"/v1/tasks/{answer.json()['id']}")).json()
        paths = [httpx.URL(link).path for link in task.pop("results", [])]
        told[prompt].append((task, [(path, (await client.get(path)).content) for path in paths]))
    return told


async def test_the_same_seed_and_requests_give_the_same_run() -> None:
    """The same seed gives the same ids, faults and bytes for any order of requests and any callback
    address. Another seed gives another run.
    """
    prompts = ["a", "b", "c", "d", "e", "f", "a", "a"]
    quiet = replace(CHANCES, faults={**CHANCES.faults, "drop_callback": True})
    async with (
        sandbox(quiet) as first,
        sandbox(quiet) as second,
        sandbox(replace(quiet, seed=8)) as third,
    ):
        told = await story(first, prompts)
        assert await story(second, prompts[::-1]) == told
        assert await story(third, prompts) != told
    kinds = {
        entry if isinstance(entry, int) else entry[0]["status"]
        for entries in told.values()
        for entry in entries
    }
    assert kinds == {503, "failed", "completed"}
    tasks = [entry for entries in told.values() for entry in entries if not isinstance(entry, int)]
    assert len({task["id"] for task, _ in tasks}) == len(tasks)


async def test_without_a_seed_every_run_is_another() -> None:
    ids = []
    for _ in range(2):
        async with sandbox(replace(QUICK, seed=None), lambda: 5.0) as client:
            ids.append((await submit(client)).json()["id"])
    assert ids[0] != ids[1]
    assert all(id.startswith("task-unified-5-") for id in ids)


async def test_a_fault_strikes_its_share_of_the_tasks() -> None:
    """The fault hits about the given share of many tasks. A larger share hits all tasks that a
    smaller share hits. Share 0 hits none and share 1 hits all.
    """
    struck: list[set[str]] = []
    for share in (0, 0.3, 0.6, 1):
        async with sandbox(
            replace(QUICK, faults={"submit_status": 503}, shares={"submit_status": share})
        ) as client:
            answers = {
                str(number): await submit(client, prompt=str(number), sandbox={"delay": 3600})
                for number in range(60)
            }
        struck.append({prompt for prompt, answer in answers.items() if answer.status_code == 503})
    assert (len(struck[0]), len(struck[3])) == (0, 60)
    assert struck[0] < struck[1] < struck[2] < struck[3]
    assert 9 <= len(struck[1]) <= 27 <= len(struck[2]) <= 45


async def test_a_submission_made_again_meets_the_same_fate() -> None:
    """The key decides whether a fault hits a task, so a repeated submission gets the same answer. A
    fault in a request always applies.
    """
    async with sandbox(replace(CHANCES, shares={"submit_status": 0.5, "fail": 0})) as client:
        keys = [{"idempotency-key": f"task_{number:020}"} for number in range(12)]
        first = [(await submit(client, key)).status_code for key in keys]
        assert [(await submit(client, key)).status_code for key in keys] == first
        assert set(first) == {200, 503}
        assert (await submit(client, sandbox={"submit_status": 500})).status_code == 500
        assert (await finished(client, sandbox={"submit_status": None, "fail": "unknown_error"}))[
            "status"
        ] == "failed"
        assert len({task["id"] for task in await created(client)}) == first.count(200) + 1


@pytest.mark.parametrize(
    ("shares", "named"),
    [({"fail": 1.5}, "fail"), ({"fail": float("nan")}, "fail"), ({"delay": 0.5}, "delay")],
)
def test_a_share_that_cannot_be_is_refused(shares: dict[str, float], named: str) -> None:
    """A share is from 0 to 1 and needs a default fault."""
    with pytest.raises(ValueError, match=named):
        create_sandbox(replace(CHANCES, shares=shares))


# --- the command
# --------------------------------------------------------------------------------------------------


def test_the_flags_of_the_command_combine_and_repeat(tmp_path: Path) -> None:
    """Two processes with the same faults, share and seed answer the same requests alike."""
    flags = [
        "--seed",
        "7",
        "--delay",
        "0",
        "--price",
        "0.3",
        "--fault",
        "fail=service_error",
        "--fault",
        'query_status={"status": 404, "times": 1}',
    ]
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        upstream = process(
            *flags, "--fault", "callback_first=true", "--share", "fail=0.5", folder=tmp_path / name
        )
        headers = {"authorization": f"Bearer {UPSTREAM_KEY}"}
        with (
            upstream as running,
            httpx.Client(
                base_url=running.address, headers=headers, timeout=30, trust_env=False
            ) as client,
        ):
            told = []
            for number in range(8):
                task = client.post(
                    "/v1/images/generations", json=ORDER | {"prompt": str(number)}
                ).json()
                assert task["usage"]["credits_reserved"] == 0.3
                answers = [client.get(f"/v1/tasks/{task['id']}") for _ in range(2)]
                told.append((task["id"], answers[0].status_code, answers[1].json()["status"]))
            runs.append(told)
    assert runs[0] == runs[1]
    assert {status for _, status, _ in runs[0]} == {404}
    assert {end for *_, end in runs[0]} == {"completed", "failed"}


def test_the_help_of_the_command_lists_every_fault(tmp_path: Path) -> None:
    """The help takes each fault's description and values from the table."""
    done = darkroom("sandbox", "--help", folder=tmp_path)
    shown = " ".join(done.stdout.split())
    assert [
        name
        for name, fault in FAULTS.items()
        if f"{name} {fault.about}: {fault.takes.words}" not in shown
    ] == []


@pytest.mark.parametrize(
    "flags", [("--share", "fail=0.5"), ("--fault", "fail=service_error", "--share", "fail=half")]
)
def test_a_wrong_share_is_bad_usage(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The command exits with 2 and writes the reason to standard error."""
    done = darkroom("sandbox", *flags, folder=tmp_path)
    assert (done.returncode, done.stdout, "--share" in done.stderr) == (2, "", True)
