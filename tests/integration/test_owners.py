"""Two owners: no route tells one owner anything about the other's objects, not even that they
exist.

The cases come from the table of routes. A new route, parameter or body needs its case here.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, event
from starlette.types import ASGIApp, Receive, Scope, Send

from service.app import Role
from service.tasks import pause
from service.upstreams.sandbox import SandboxOptions, create_sandbox
from service.web import auth
from service.web.routes.operation import Spec
from service.web.routes.table import SPECS
from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, order, submitted
from tests.inputs import photo, upload
from tests.waiting import wait_until
from tests.world import LOOPBACK, subscriber, world

JSON = dict[str, Any]
Pair = tuple[Any, Any]  # another owner's value, and an unknown value of the same kind

NOTHING = "a" * 26
UNKNOWN = "task-unified-1757165031-nobody00"
LABELS = {"verdict", "kind", "outcome", "state", "stage", "purpose", "role", "le"}
LATE = {"delay": 600}  # the task outlasts the tests


@dataclass(frozen=True, slots=True)
class Watched:
    """An upstream that records the calls it receives."""

    app: ASGIApp
    asked: list[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.asked.append(f"{scope['method']} {scope['path']}")
        await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Two:
    """Ann owns the objects. Bob asks and changes nothing. Carl changes things.

    `told` has texts that only Ann may see. `pairs` is keyed by the name of a parameter, `bodies` by
    route.
    """

    ann: httpx.AsyncClient
    bob: httpx.AsyncClient
    carl: httpx.AsyncClient
    bobs: Mapping[str, int]  # the length of each of his lists
    told: tuple[str, ...]
    pairs: Mapping[str, tuple[Pair, ...]]
    bodies: Mapping[tuple[str, str], tuple[Pair, ...]]
    key: str
    metrics: str
    asked: list[str]
    before: list[list[JSON]]


LISTS = ("/v1/tasks", "/v1/endpoints", "/v1/deliveries", "/v1/events")


async def lists(client: httpx.AsyncClient) -> list[list[JSON]]:
    """Everything that the client's owner can list."""
    return [got(await client.get(path))["data"] for path in LISTS]


async def active(client: httpx.AsyncClient, owner: str, hook: str, late: int) -> str:
    """Creates two endpoints for an owner, one completed task, `late` unfinished ones, and their
    deliveries. Returns the id of a replay.
    """
    hooks = [
        got(
            await client.post(
                "/v1/endpoints", json={"url": hook, "description": f"{owner}'s hook"}
            ),
            201,
        )
        for _ in range(2)
    ]
    words = {"prompt": f"{owner}'s prompt", "metadata": {"of": owner}, "callback_url": hook}
    await submitted(client, UNTIL_DONE | {"idempotency-key": f"{owner}-key"}, **words)
    inputs = {"model": "wan2.5-image-to-image", "image_urls": [f"https://x.test/{owner}.png"]}
    for _ in range(late):
        await submitted(client, {}, sandbox=LATE, **words, **inputs)

    async def delivered() -> bool:
        found = got(await client.get("/v1/deliveries", params={"state": "delivered"}))["data"]
        # each event to both endpoints, and the task's own callback
        return len(found) == 2 * (2 + late) + 1

    await wait_until(delivered)
    replay: str = got(await client.post(f"/v1/endpoints/{hooks[0]['id']}/replay"))["id"]
    return replay


def ids_of(documents: object) -> list[str]:
    """Every text in the documents that looks like an id."""
    return sorted(
        set(re.findall(r"\b[a-z]+_[a-z2-7]{26}\b|task-unified-[\w-]+", json.dumps(documents)))
    )


def elsewhere(cursor: str) -> str:
    """A cursor of the same time that names an unknown object."""
    return f"{cursor.partition('_')[0]}_{NOTHING}"


async def parameters(
    ann: httpx.AsyncClient, documents: list[list[JSON]], replay: str
) -> dict[str, tuple[Pair, ...]]:
    """For each name in a path or a query Ann's values, each paired with an unknown one."""
    tasks, endpoints, deliveries, events = documents
    ours = [(task["id"], f"task_{NOTHING}") for task in tasks]
    theirs = [(task["upstream_id"], UNKNOWN) for task in tasks]
    entries = got(await ann.get("/v1/ledger"))["data"]
    cursors = [got(await ann.get(path, params={"limit": 1}))["next_cursor"] for path in LISTS[:3]]
    return {
        "task_id": (*ours, *theirs),
        "flatten": (),
        "from": (),
        "to": (),
        "by": (),
        "page": (),
        "pageSize": (),
        "file_id": ((got(await upload(ann, photo()), 201)["id"], f"file_{NOTHING}"),),
        "endpoint_id": tuple((endpoint["id"], f"ep_{NOTHING}") for endpoint in endpoints),
        "delivery_id": tuple((delivery["id"], f"dlv_{NOTHING}") for delivery in deliveries[:2]),
        "replay_id": ((replay, f"rpl_{NOTHING}"),),
        "key_id": ((f"key_{NOTHING}", "key_unknown"),),
        "task": (*ours, *theirs),
        "endpoint": ((endpoints[0]["id"], f"ep_{NOTHING}"),),
        "event": ((events[0]["id"], f"evt_{NOTHING}"),),
        "cursor": tuple((cursor, elsewhere(cursor)) for cursor in cursors),
        "metadata.KEY": (("ann", "nobody"),),
        "model": (("wan2.5-image-to-image", "nobodys"),),
        "/v1/tasks?state": (("submitted", "uncertain"),),
        "/v1/deliveries?state": (("dead", "pending"),),
        "type": (("callback.conflict", "task.parked"),),
        "error": (("content_policy_violation", "nothing"),),
        "/v1/deliveries?error": (("answered 500", "nothing"),),
        "status": (("500", "418"),),
        "prompt": (("ann's prompt", "nobody's"),),
        "after": (("0", "00"),),
        "/v1/ledger?after": ((entries[0]["id"], f"led_{NOTHING}"),),
        "/v1/audit?after": ((f"act_{NOTHING}", f"act_{NOTHING[::-1]}"),),
        "action": (("key.create", "nothing"),),
        "target": (("ann", "nobody"),),
        "wait": (("0", "0.0"),),
        "limit": (("1000", "999"),),
        "most": (("1000", "999"),),
        "owner": (("ann", "nobody"),),
        "since": (("2001-02-03T04:05:06Z", "2002-02-03T04:05:06Z"),),
        "until": (("2091-02-03T04:05:06Z", "2092-02-03T04:05:06Z"),),
    }


@pytest.fixture(scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Two]:
    """The workers finish everything first. The same store then serves without workers, so that only
    the test's requests cause activity.
    """
    folder, asked = tmp_path_factory.mktemp("two"), list[str]()
    options = SandboxOptions(networks=(ip_network(LOOPBACK),), delay_s=0.05, fetch_inputs=False)
    upstream = Watched(create_sandbox(options), asked)
    body = {"scopes": ["submit", "read", "subscribe"]}
    async with world(folder, upstream=upstream) as here, subscriber() as takes:
        owners = [{"owner": name, **body} for name in ("ann", "bob", "carl")]
        keys = [got(await here.client.post("/v1/keys", json=owner), 201)["key"] for owner in owners]
        async with here.with_key(keys[0]) as ann, here.with_key(keys[1]) as bob:
            replay = await active(ann, "ann", f"{takes.url}/anns-hook", 2)
            await active(bob, "bob", f"{takes.url}/bobs-hook", 0)
            metrics = (await here.client.get("/metrics")).text
    asked.clear()
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # No lookup of a key, and none of the pause, falls into the middle of a comparison.
        patch.setattr(auth, "CACHE_S", 3600)
        patch.setattr(pause, "LOOK_S", 3600)
        here = await stack.enter_async_context(
            world(folder, upstream=upstream, role=Role(workers=False))
        )
        await wait_until(lambda: asked)  # the start's own call
        ann, bob, carl = [await stack.enter_async_context(here.with_key(key)) for key in keys]
        before, bobs, _ = [await lists(client) for client in (ann, bob, carl)]
        task = before[0][0]
        named = [(task["id"], f"task_{NOTHING}"), (task["upstream_id"], UNKNOWN)]
        bodies = {
            ("POST", SUBMIT): tuple(
                (order(model_params={"task_id": a}), order(model_params={"task_id": b}))
                for a, b in named
            ),
            ("POST", "/v1/endpoints"): (
                ({"url": takes.url, "owner": "ann"}, {"url": takes.url, "owner": "nobody"}),
            ),
            ("PATCH", "/v1/endpoints/{endpoint_id}"): (({"status": "paused"},) * 2,),
            ("POST", "/v1/endpoints/{endpoint_id}/rotate"): (({"overlap_s": 0},) * 2,),
            ("POST", "/v1/endpoints/{endpoint_id}/replay"): (({"dry_run": True},) * 2,),
            ("POST", "/v1/endpoints/{endpoint_id}/test"): (({}, {}),),
            ("POST", "/v1/replays"): (
                (of_endpoint(before[1][0]["id"]), of_endpoint(f"ep_{NOTHING}")),
            ),
            ("POST", "/v1/estimates"): ((order(owner="ann"), order(owner="nobody")),),
            ("POST", "/v1/files"): (),
            ("POST", "/api/v1/files/upload/stream"): (),
            ("POST", "/api/v1/files/upload/base64"): (),
            ("POST", "/api/v1/files/upload/url"): (),
            ("POST", "/v1/keys/rotate-secret"): (({"owner": "ann"}, {"owner": "nobody"}),),
        }
        told = ("ann", "ann's prompt", "ann-key", replay, *ids_of(before))
        counts = {path: len(each) for path, each in zip(LISTS, bobs, strict=True)}
        asked.clear()
        yield Two(
            ann,
            bob,
            carl,
            counts,
            told,
            await parameters(ann, before, replay),
            bodies,
            "ann-key",
            metrics,
            asked,
            before,
        )


def of_endpoint(endpoint: str) -> JSON:
    return {"filter": {"endpoint": endpoint}}


@contextmanager
def statements() -> Iterator[list[str]]:
    """Records every SQL statement of every store, without its values."""
    seen: list[str] = []

    def see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", see)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", see)


@dataclass(frozen=True, slots=True)
class Said:
    """Everything that an answer reveals: its content, and the statements and calls behind it, which
    determine its duration.
    """

    status: int
    headers: Mapping[str, str]
    text: str
    statements: tuple[str, ...]
    asked: tuple[str, ...]


async def ask(two: Two, method: str, path: str, **more: Any) -> Said:
    two.asked.clear()
    with statements() as seen:
        answer = await two.bob.request(method, path, **more)
    headers = {
        name: value
        for name, value in answer.headers.items()
        if name not in ("x-request-id", "date")
    }
    asked = tuple(re.sub(r"task-unified-[\w-]+", "task-unified", each) for each in two.asked)
    assert not [id for id in two.told if any(id in each for each in two.asked)]
    text = answer.text.replace(answer.headers["x-request-id"], "")
    return Said(answer.status_code, headers, text, tuple(seen), asked)


def told(two: Two, text: str) -> list[str]:
    """Ann's texts that occur in `text`."""
    return [each for each in two.told if re.search(rf"\b{re.escape(each)}\b", text)]


def cases(two: Two, spec: Spec) -> Iterator[tuple[tuple[str, JSON], tuple[str, JSON]]]:
    """Yields pairs of requests, for Ann's object and for an unknown one. Raises KeyError for a
    route without a case.
    """
    names = re.findall(r"\{(\w+)\}", spec.path)
    body = two.bodies[spec.method, spec.path] if spec.body and spec.scopes != ("admin",) else ()
    for name in names:
        for pair in two.pairs[name]:
            sent = {"json": body[0][0]} if body else {}
            # mypy sees a tuple of unknown length, not a pair.
            yield tuple((spec.path.replace(f"{{{name}}}", value), sent) for value in pair)  # type: ignore[misc]
    for pair in () if names else body:
        # mypy sees a tuple of unknown length, not a pair.
        yield tuple((spec.path, {"json": value, "headers": ASYNC}) for value in pair)  # type: ignore[misc]
    for name in spec.query:
        for pair in two.pairs.get(f"{spec.path}?{name}") or two.pairs[name]:
            yield tuple(
                (spec.path, {"params": {name.replace("KEY", "of"): value}}) for value in pair
            )  # type: ignore[misc]  # a pair


ASKED = [spec for spec in SPECS if spec.scopes and not spec.path.startswith("/v1/catalogue")]


@pytest.mark.parametrize("spec", ASKED, ids=[f"{spec.method} {spec.path}" for spec in ASKED])
async def test_another_owners_object_is_answered_like_an_unknown_one(two: Two, spec: Spec) -> None:
    """Status, headers, body, statements and upstream calls are equal on every route, for every id,
    filter and body.
    """
    for (anothers, sent), (nobodys, same) in cases(two, spec):
        said = await ask(two, spec.method, anothers, **sent)
        assert said == await ask(two, spec.method, nobodys, **same), anothers
        assert not told(two, said.text.replace(anothers, "")), anothers
        assert said.status in (
            (404,) if "{" in spec.path else (200, 400, 403, 404, 415)
        ) or spec.scopes == ("admin",), anothers
    assert await lists(two.ann) == two.before


@pytest.mark.parametrize(
    "spec",
    [spec for spec in SPECS if spec.method == "GET" and "{" not in spec.path],
    ids=lambda spec: spec.path,
)
async def test_an_answer_without_an_id_shows_nothing_of_another_owner(two: Two, spec: Spec) -> None:
    """Bob's lists contain exactly his objects, and no answer to him names anything of Ann's."""
    said = await ask(two, "GET", spec.path)
    assert not told(two, said.text)
    if spec.path in two.bobs:
        assert len(json.loads(said.text)["data"]) == two.bobs[spec.path] > 0


@pytest.mark.parametrize(
    "spec",
    [spec for spec in ASKED if spec.method == "GET" and spec.scopes != ("admin",)],
    ids=lambda spec: spec.path,
)
async def test_its_owner_is_shown_all_of_it(two: Two, spec: Spec) -> None:
    """Ann can read every object. This guards against a service that shows nothing."""
    for (path, sent), _ in cases(two, spec):
        answer = await two.ann.get(path, **sent)
        assert answer.status_code == 200, answer.text


async def test_another_owners_cursor_is_only_a_position_in_ones_own_list(two: Two) -> None:
    """With Ann's cursor Bob continues in his own list."""
    for cursor, _ in two.pairs["cursor"]:
        for path in LISTS[:3]:
            everything = got(await two.bob.get(path))["data"]
            after = got(await two.bob.get(path, params={"cursor": cursor}))["data"]
            assert after == everything[len(everything) - len(after) :]


async def test_one_idempotency_key_of_two_owners_makes_two_tasks(two: Two) -> None:
    """The answer does not reveal whether another owner has used the key."""
    answers = []
    for key in (two.key, "nobodys-key"):
        with statements() as seen:
            answer = await two.carl.post(
                SUBMIT, json=order(), headers=ASYNC | {"idempotency-key": key}
            )
        answers.append((got(answer).keys(), answer.headers.keys(), tuple(seen)))
        assert answer.json()["id"] not in two.told
        assert "idempotency-replayed" not in answer.headers
        got(await two.carl.post(f"/v1/tasks/{answer.json()['id']}/cancel"))
    assert answers[0] == answers[1]


async def test_no_label_of_the_metrics_names_anybody_or_anything(two: Two) -> None:
    """After deliveries, downloads and calls the metrics are sums over all owners, with a fixed set
    of labels.
    """
    samples = [
        sample
        for family in text_string_to_metric_families(two.metrics)
        for sample in family.samples
    ]
    assert {name for sample in samples for name in sample.labels} <= LABELS
    assert sum(sample.value for sample in samples if sample.name == "darkroom_deliveries_total") > 0
    assert not told(two, two.metrics)
    assert not re.search(r"_[a-z2-7]{26}|task-unified|bob", two.metrics)
