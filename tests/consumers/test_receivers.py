"""Runs the receivers of docs/consuming.md unchanged at a real service."""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.db.tables import counters
from service.db.tables import events as outbox
from service.db.transaction import Transaction
from service.signing import sign_webhook
from tests.api import ASYNC, UNTIL_DONE, got, submitted
from tests.consumers.programs import LIBRARIES, listening, running, written
from tests.servers import free_port
from tests.waiting import wait_until
from tests.world import World, world

RECEIVERS = (
    "with_starlette.py",
    "with_fastapi.py",
    "with_flask.py",
    "with_http.mjs",
    "with_express.mjs",
)
READERS = ("follow.py", "pull.py")
OLD_S = 6 * 60


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("here")) as made:
        yield made


def signed(secret: str, body: bytes, at: float, id: str = "evt_forged") -> dict[str, str]:
    headers = {
        "webhook-id": id,
        "webhook-timestamp": str(int(at)),
        "content-type": "application/cloudevents+json",
    }
    return headers | {"webhook-signature": sign_webhook([secret], id, int(at), body)}


def forgeries(secret: str) -> dict[str, tuple[bytes, Mapping[str, str]]]:
    """Requests that every receiver must refuse."""
    body, now = b'{"specversion": "1.0", "id": "evt_forged"}', time.time()
    right = signed(secret, body, now)
    strange = ("v1,%%%", "v1", "v2,x", "v1,é", "v1,AAAA v1a,AAAA")
    return {
        "another body": (body + b" ", right),
        "another id": (body, {**right, "webhook-id": "evt_other"}),
        "a secret of another endpoint": (body, signed("whsec_" + "A" * 32, body, now)),
        "too old": (body, signed(secret, body, now - OLD_S)),
        "too new": (body, signed(secret, body, now + OLD_S)),
        "not UTF-8": (b"\xff", signed(secret, b"\xff", now)),
        "no body": (b"", right),
        "no headers": (body, {}),
        **{
            f"the signature {text}": (body, {**right, "webhook-signature": text})
            for text in strange
        },
    }


def reading(client: httpx.AsyncClient) -> dict[str, str]:
    """The settings of a program that reads with that client's key."""
    return {
        "DARKROOM_URL": str(client.base_url),
        "DARKROOM_API_KEY": client.headers["authorization"].removeprefix("Bearer "),
    }


async def events(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = got(await client.get("/v1/events"))["data"]
    return found


async def told(
    client: httpx.AsyncClient, task: Mapping[str, Any], **query: str
) -> list[Mapping[str, Any]]:
    """The deliveries of a task once all are delivered."""

    async def look() -> list[Mapping[str, Any]]:
        found = got(await client.get("/v1/deliveries", params={"task": task["id"], **query}))[
            "data"
        ]
        return found if found and all(each["state"] == "delivered" for each in found) else []

    found: list[Mapping[str, Any]] = await wait_until(look, 30)
    return found


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("receiver", RECEIVERS)
async def test_a_receiver_takes_each_event_once_and_nothing_forged(
    here: World, tmp_path: Path, receiver: str, library: str
) -> None:
    """The receiver answers a repeated event with success and drops it, and refuses an unsigned or
    old request. During a rotation both secrets work.
    """
    written(tmp_path, library)
    port = free_port()
    async with here.owner() as client:
        made = got(
            await client.post("/v1/endpoints", json={"url": f"http://127.0.0.1:{port}/hooks"}), 201
        )
        with running(tmp_path, receiver, {"SECRET": made["secret"]}, port) as program:
            await listening(port)
            task = await submitted(client, UNTIL_DONE, metadata={"order": "七\u2028"})
            sent = await told(client, task)
            ids = {event["id"] for event in await events(client)}
            await wait_until(lambda: len(program.taken) >= len(ids))
            assert set(program.taken) == {each["event"] for each in sent} == ids
            again = got(await client.post(f"/v1/deliveries/{sent[0]['id']}/retry"))
            assert [attempt["status"] for attempt in again["attempts"]] == [204, 204]
            async with httpx.AsyncClient(trust_env=False) as anybody:
                for name, (body, headers) in forgeries(made["secret"]).items():
                    wire = [(name.encode(), value.encode()) for name, value in headers.items()]
                    assert (
                        await anybody.post(made["url"], content=body, headers=wire)
                    ).status_code == 401, name
            rotated = got(await client.post(f"/v1/endpoints/{made['id']}/rotate"))
            assert got(await client.post(f"/v1/endpoints/{made['id']}/test"))["status"] == 204
        assert len(program.taken) == len(ids) + 1
        if library != "standardwebhooks":  # the inbox does not know the library
            return
        with running(tmp_path, receiver, {"SECRET": rotated["secret"]}, port) as program:
            await listening(port)
            assert (
                got(await client.post(f"/v1/deliveries/{sent[0]['id']}/retry"))["attempts"][-1][
                    "status"
                ]
                == 204
            )
            assert got(await client.post(f"/v1/endpoints/{made['id']}/test"))["status"] == 204
        assert len(program.taken) == 1, "a receiver remembers its events across a restart"


@pytest.mark.parametrize("receiver", ["with_starlette.py", "with_http.mjs"])
async def test_a_receiver_takes_what_a_tasks_own_callback_url_gets(
    here: World, tmp_path: Path, receiver: str
) -> None:
    """The callback carries the task, signed with the owner's callback secret, under the id of its
    terminal event.
    """
    written(tmp_path)
    port = free_port()
    key = got(
        await here.client.post(
            "/v1/keys", json={"owner": f"own-{port}", "scopes": ["submit", "read", "subscribe"]}
        ),
        201,
    )
    async with here.with_key(key["key"]) as client:
        with running(tmp_path, receiver, {"SECRET": key["callback_secret"]}, port) as program:
            await listening(port)
            task = await submitted(client, ASYNC, callback_url=f"http://127.0.0.1:{port}/hooks")
            await told(client, task)
        _, terminal = got(await client.get("/v1/events", params={"task": task["id"]}))["data"]
        assert program.taken == [terminal["id"]]


async def test_a_receiver_verifies_by_the_public_key_alone(here: World, tmp_path: Path) -> None:
    """It has no secret. What another endpoint was sent, and what is old or changed, is refused."""
    written(tmp_path)
    port = free_port()
    async with here.owner() as client, httpx.AsyncClient(trust_env=False) as anybody:
        url = f"http://127.0.0.1:{port}/hooks"
        made, other = [
            got(await client.post("/v1/endpoints", json={"url": url, "types": [name]}), 201)
            for name in ("image.task.completed", "task.parked")
        ]
        settings = {"DARKROOM_URL": here.url, "ENDPOINT": made["id"]}
        with running(tmp_path, "with_public_key.py", settings, port) as program:
            await listening(port)
            task = await submitted(client, UNTIL_DONE)
            (sent,) = await told(client, task)
            await wait_until(lambda: program.taken)
            assert program.taken == [sent["event"]]
            keyring, body, now = here.context.resources.keyring, b"{}", int(time.time())

            def openly(endpoint: str, at: int) -> dict[str, str]:
                signature = keyring.sign_openly(endpoint, "evt_more", at, body)
                return signed(made["secret"], body, at, "evt_more") | {
                    "webhook-signature": f"v1,AAAA {signature}"
                }

            right = openly(made["id"], now)
            wrong = forgeries(made["secret"]) | {
                "signed with the secret": (body, signed(made["secret"], body, now)),
                "sent to another endpoint": (body, openly(other["id"], now)),
                "signed long ago": (body, openly(made["id"], now - OLD_S)),
                "changed": (b"{ }", right),
                "under another id": (body, {**right, "webhook-id": "evt_other"}),
            }
            for name, (content, headers) in wrong.items():
                wire = [(key.encode(), value.encode()) for key, value in headers.items()]
                answer = await anybody.post(url, content=content, headers=wire)
                assert answer.status_code == 401, name
            assert (await anybody.post(url, content=body, headers=right)).status_code == 204
        assert program.taken == [sent["event"], "evt_more"]


@pytest.mark.parametrize("reader", READERS)
async def test_a_reader_goes_on_where_it_was(here: World, tmp_path: Path, reader: str) -> None:
    """The first run reads from the beginning, each event once and in sequence, with any text. After
    a restart the reader continues with the new events.
    """
    written(tmp_path)
    async with here.owner() as client:
        seen: list[str] = []
        for _ in range(2):
            await submitted(client, UNTIL_DONE, metadata={"order": "七\u2028\x85"})
            count = len(await events(client)) + 2 - len(seen)
            with running(tmp_path, reader, reading(client)) as program:
                await submitted(client, UNTIL_DONE)
                # called within this iteration
                await wait_until(lambda: len(program.taken) >= count, 90)  # noqa: B023
            seen += program.taken
        assert seen == [event["id"] for event in await events(client)]


@pytest.mark.parametrize("reader", READERS)
async def test_a_reader_whose_place_is_gone_reads_the_tasks(tmp_path: Path, reader: str) -> None:
    """At a `resync` the reader reads the tasks and then continues with the available events."""
    written(tmp_path)

    def forget(tx: Transaction, items: Sequence[int]) -> list[None]:
        tx.connection.execute(outbox.delete().where(outbox.c.sequence <= items[0]))
        tx.connection.execute(
            counters.update().where(counters.c.name == "forgotten").values(value=items[0])
        )
        return [None]

    async with world(tmp_path) as here:
        tasks = [await submitted(here.client, UNTIL_DONE) for _ in range(2)]
        first, *rest = await events(here.client)
        await here.context.resources.store.write(forget, int(first["sequence"]))
        with running(tmp_path, reader, reading(here.client)) as program:
            await wait_until(lambda: len(program.taken) >= len(rest), 90)
        assert program.lines[:2] == [f"{task['id']} completed" for task in reversed(tasks)]
        assert program.taken == [event["id"] for event in rest]


def test_the_document_has_no_program_that_is_not_run(tmp_path: Path) -> None:
    """Each named block of the document is a program that these tests run, or a part that those
    programs share.
    """
    written(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        # test_killed.py runs the first program
        *RECEIVERS, *READERS, "with_public_key.py", "from_nats.py", "inbox.py", "inbox.mjs",
        "darkroom.py", "node_modules",
    }  # fmt: skip
    assert json.loads((Path(__file__).parent / "package.json").read_text())["private"] is True
