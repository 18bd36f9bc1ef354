"""Collects all that a run shows to the outside, and finds its defects."""

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx

from tests.crash.chaos.storm import ANSWER_S, OPEN, Storm
from tests.crash.chaos.upstream import POSTS
from tests.crash.life import TERMINAL
from tests.processes import UPSTREAM_KEY

JSON = dict[str, Any]
NOTHING_CREATED = {429, 503}
# A callback that began this long ago has an answer, because the upstream waits for 10 s.
PROVED_S = 12.0
FETCHES, TRIES = 8, 5


@dataclass(slots=True)
class Seen:
    """What clients, the subscriber and the upstream saw. `pictures` has two lists of checksums for
    each task, in order: the images that the service serves, and the upstream's originals.
    """

    accepted: Mapping[str, str]
    tasks: list[JSON]
    events: list[JSON]
    received: set[tuple[str, str, str]]  # webhook-id, type, subject
    made: dict[str, list[JSON]]  # the upstream's tasks by idempotency key
    posts: list[tuple[str, str, int | None]]
    pictures: dict[str, tuple[list[str], list[str]]]
    ledger: dict[str, int]  # the sum of each task's cost, in millionths
    charged: dict[str, int]  # the same in the upstream's record, by idempotency key


@dataclass(slots=True)
class Verdict:
    """The defects, by task or order. `unmade` counts the uncertain tasks that the upstream never
    created.

    `waits` are the seconds from the first accepted callback to the terminal event.
    """

    lost: dict[str, str] = field(default_factory=dict)
    doubled: dict[str, str] = field(default_factory=dict)
    twice: dict[str, str] = field(default_factory=dict)
    unequal: dict[str, str] = field(default_factory=dict)  # costs
    credits: tuple[int, int] = (0, 0)  # of the ledger and of the upstream's record, in millionths
    unreported: int = 0  # of uncertain tasks, which are charged and never proved
    uncertain: int = 0
    unmade: int = 0
    refused: int = 0
    waits: list[float] = field(default_factory=list)


async def seen(storm: Storm) -> Seen:
    tasks = await everything(storm, "/v1/tasks", "cursor", "next_cursor")
    events = await everything(storm, "/v1/events", "after", "next_after")
    theirs = {"authorization": f"Bearer {UPSTREAM_KEY}"}
    address = f"http://127.0.0.1:{storm.upstream_port}"
    made: dict[str, list[JSON]] = defaultdict(list)
    async with httpx.AsyncClient(
        base_url=address, headers=theirs, trust_env=False, timeout=60
    ) as upstream:
        for source in (await upstream.get("/sandbox/tasks")).raise_for_status().json()["data"]:
            made[source["idempotency_key"]].append(source)
        charged: Counter[str] = Counter()
        for row in (await upstream.get("/sandbox/charges")).raise_for_status().json()["data"]:
            charged[row["idempotency_key"]] += millionths_of(row["used"])
            charged[row["idempotency_key"]] -= millionths_of(row["refunded"])
        posts = (await upstream.get(POSTS)).raise_for_status().json()
        places = asyncio.Semaphore(FETCHES)

        async def sums(client: httpx.AsyncClient, links: Sequence[str]) -> list[str]:
            async with places:
                return [await digest(client, link) for link in links]

        async def both(task: JSON) -> tuple[list[str], list[str]]:
            links = [link for source in made[task["id"]] for link in named(source)]
            return await sums(storm.client, [image["url"] for image in task["images"]]), await sums(
                upstream, links
            )

        completed = [task for task in tasks if task["state"] == "completed"]
        pairs = await asyncio.gather(*map(both, completed))
    received = set()
    for request in storm.subscriber.received:
        event = json.loads(request.body)
        received.add((request.headers["webhook-id"], event["type"], event["subject"]))
    pictures = {task["id"]: pair for task, pair in zip(completed, pairs, strict=True)}
    ledger: Counter[str] = Counter()
    for entry in await everything(storm, "/v1/ledger", "after", "next_cursor"):
        if entry["kind"] in ("charge", "refund", "adjust"):
            ledger[entry["task_id"]] += millionths_of(entry["credits"])
    calls = [(*post,) for post in posts]
    return Seen(
        storm.accepted,
        tasks,
        events,
        received,
        dict(made),
        calls,
        pictures,
        dict(ledger),
        dict(charged),
    )


def millionths_of(credits: float) -> int:
    return round(credits * 1_000_000)


def named(source: JSON) -> list[str]:
    """The links of the upstream's task, in each form of the sandbox's fault `results`."""
    results = source.get("results") or source.get("result_data", [])
    entries = [results] if isinstance(results, str) else results
    links = [next(iter(each.values())) if isinstance(each, dict) else each for each in entries]
    return [link.strip() for link in links]


async def everything(storm: Storm, path: str, following: str, told: str) -> list[JSON]:
    """Reads a list, page by page."""
    data: list[JSON] = []
    query: dict[str, str | int] = {"limit": 1000}
    while True:
        page = await storm.page(path, **query)
        data += page["data"]
        if not page["data"] or page[told] is None:
            return data
        query[following] = page[told]


async def digest(client: httpx.AsyncClient, link: str) -> str:
    """Returns a file's checksum, or the problem that came instead. Fetches a file again if a fault
    broke the transfer.
    """
    problem = ""
    for _ in range(TRIES):
        with suppress(httpx.TransportError):
            answer = await client.get(link, timeout=ANSWER_S)
            if answer.status_code == 200:
                return hashlib.sha256(answer.content).hexdigest()
            problem = str(answer.status_code)
    return f"not served: {problem or 'no answer'}"


def judge(seen: Seen) -> Verdict:
    """Compares what the clients, the subscriber, the reader of events and the upstream know. Finds
    tasks that were lost, doubled or submitted twice.
    """
    verdict = Verdict()
    ends: dict[str, list[JSON]] = defaultdict(list)
    for event in seen.events:
        if event["type"] in TERMINAL:
            ends[event["subject"]].append(event)
    told: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for name, type, subject in seen.received:
        if type in TERMINAL:
            told[subject].add((name, type))
    known = {task["id"]: task for task in seen.tasks}
    for order, name in seen.accepted.items():
        if name not in known:
            verdict.lost[name] = f"order {order} was accepted and is not there"
    for name, task in known.items():
        if problem := loss(task, ends[name], told[name], seen):
            verdict.lost[name] = problem
        if len(ends[name]) > 1 or len(told[name]) > 1:
            verdict.doubled[name] = (
                f"terminal events {[event['id'] for event in ends[name]]}, delivered"
                f" {sorted(told[name])}"
            )
        verdict.uncertain += is_uncertain(task)
        verdict.unmade += is_uncertain(task) and not seen.made.get(name)
        calls = [call for source in seen.made.get(name, []) for call in source["callbacks"]]
        taken = [call["at"] for call in calls if took(call)]
        verdict.refused += len(calls) - len(taken)
        if taken and ends[name] and (wait := seconds(ends[name][0]["time"]) - min(taken)) >= 0:
            verdict.waits.append(wait)
    compare_costs(verdict, known, seen)
    verdict.twice = paid_twice(seen)
    return verdict


def compare_costs(verdict: Verdict, known: Mapping[str, JSON], seen: Seen) -> None:
    """Compares the ledger with the upstream's record: each task, and the sums."""
    for name, task in known.items():
        ours, theirs = seen.ledger.get(name, 0), seen.charged.get(name, 0)
        if is_uncertain(task):  # nothing told the service about that task
            verdict.unreported += theirs - ours
        elif ours != theirs:
            verdict.unequal[name] = f"the ledger has {ours}, the upstream {theirs} millionths"
    ours, theirs = verdict.credits = sum(seen.ledger.values()), sum(seen.charged.values())
    if ours + verdict.unreported != theirs:
        verdict.unequal["all tasks"] = f"the ledger has {ours}, the upstream {theirs} millionths"


def loss(task: JSON, ends: Sequence[JSON], told: set[tuple[str, str]], seen: Seen) -> str | None:
    """Says what a task lacks, or how it differs from the upstream's task."""
    sources = seen.made.get(task["id"], [])
    if task["state"] in OPEN or not ends:
        return f"it is {task['state']}, and has {len(ends)} terminal events"
    if {(event["id"], event["type"]) for event in ends} - told:
        return "the subscriber was never sent its terminal event"
    if ends[0]["type"] != f"image.task.{task['state']}":
        return f"it is {task['state']}, and its event says {ends[0]['type']}"
    if is_uncertain(task):
        end = seconds(ends[0]["time"])
        proofs = [
            call
            for source in sources
            for call in source["callbacks"]
            if took(call) and call["at"] + PROVED_S < end
        ]
        proofs = (
            proofs[:-1] if "garbage_callback" in task["request"]["sandbox"] else proofs
        )  # the last callback has no readable body and proves nothing
        return f"it failed as uncertain after proof: {proofs}" if proofs else None
    if [source["status"] for source in sources] != [task["state"]]:
        return (
            f"it is {task['state']} ({task['error']}); the upstream has"
            f" {[(source['id'], source['status']) for source in sources]}"
        )
    if task["state"] == "completed":
        served, originals = seen.pictures[task["id"]]
        if not originals or served != originals:
            return f"it serves {served}, the upstream has {originals}"
    return None


def paid_twice(seen: Seen) -> dict[str, str]:
    """Finds orders that became more than one task, and orders that the service submitted again
    although the first answer did not prove that no task was created.
    """
    twice: dict[str, str] = {}
    orders = Counter(task["metadata"].get("order") for task in seen.tasks)
    tries: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
    for prompt, key, status in seen.posts:
        if status not in NOTHING_CREATED:
            tries[prompt].append((key, status))
    for order, name in seen.accepted.items():
        made = [source["id"] for source in seen.made.get(name, [])]
        if orders[order] != 1 or len(tries[order]) > 1 or len(made) > 1:
            twice[name] = (
                f"order {order}: {orders[order]} tasks, submissions (key, status) {tries[order]},"
                f" upstream has {made}"
            )
    return twice


def is_uncertain(task: JSON) -> bool:
    return (task["state"], (task["error"] or {}).get("code")) == ("failed", "submission_uncertain")


def took(call: JSON) -> bool:
    return call["status"] is not None and 200 <= int(call["status"]) < 300


def seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
