"""Unicode line ends in events: readers that go by Python's `splitlines` or by Node's readline end a
line at NEL, LS and PS. In every way out of the service an event is on one line.
"""

import asyncio
import codecs
import importlib
import io
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import requests
from standardwebhooks import Webhook

from service.cli.output import put_json
from service.events.broker_worker import BrokerWorker, lease_sinks
from service.events.feed import Entry
from service.strict_json import compact_json
from tests.api import UNTIL_DONE, got, submitted
from tests.servers import missing
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber, world

httpx_sse = importlib.import_module("httpx_sse")

JSON = dict[str, Any]
ENDS = "\x85\u2028\u2029"
# Characters at which some line reader ends a line. JSON escapes the control characters by itself.
METADATA = {
    "note": "a\u2028b\u0085c",
    "paragraphs": "one\u2029two\u2029\u2029",
    "only": ENDS,
    "name\u2028with one": "value",
    "controls": "\x0b\x0c\x1c\x1d\x1e\r\n\t",
    "plain": "ü 猫 😀 \xa0\u200b\ufeff",
}


@dataclass(slots=True)
class Told:
    """The events of one task as each way out brings them."""

    here: World
    task: JSON
    events: list[JSON]
    secrets: dict[str, str]
    receiver: Subscriber
    published: list[bytes] = field(default_factory=list)


class Kept:
    """A broker that keeps the bodies."""

    name = "kept"
    types: Sequence[str] = ("image.task.*",)

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def open(self) -> None: ...

    async def publish(self, entry: Entry, trace: Mapping[str, str]) -> None:
        self.bodies.append(entry.document)

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
async def told(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Told]:
    async with subscriber() as receiver, world(tmp_path_factory.mktemp("lines")) as here:
        broker, resources = Kept(), here.context.resources
        await resources.store.write(lease_sinks, broker.name)
        publishing = asyncio.create_task(BrokerWorker(resources, broker).run())
        key = got(
            await here.client.post(
                "/v1/keys", json={"owner": "poet", "scopes": ["submit", "read", "subscribe"]}
            ),
            201,
        )
        async with here.with_key(key["key"]) as client:
            endpoint = got(
                await client.post("/v1/endpoints", json={"url": f"{receiver.url}/hook"}), 201
            )
            own = f"{receiver.url}/own"
            task = await submitted(client, UNTIL_DONE, metadata=METADATA, callback_url=own)
            events = got(await client.get("/v1/events"))["data"]
        await wait_until(lambda: len(receiver.received) == 3 and len(broker.bodies) == 2)
        secrets = {"/hook": endpoint["secret"], "/own": key["callback_secret"]}
        yield Told(here, task, events, secrets, receiver, broker.bodies)
        publishing.cancel()
        await asyncio.wait([publishing])


def whole(body: bytes) -> bool:
    """Whether Unicode's rules find one line in the body."""
    return len(body.decode().splitlines()) == 1


async def test_the_events_say_what_the_client_said(told: Told) -> None:
    assert [event["data"]["metadata"] for event in told.events] == [METADATA] * 2


@pytest.mark.parametrize("path", ["/hook", "/own"])
async def test_a_webhook_is_one_line_and_its_signature_covers_the_bytes_sent(
    told: Told, path: str
) -> None:
    """The same holds for a task's own callback_url."""
    sent = [each for each in told.receiver.received if each.path == path]
    assert sent
    for each in sent:
        assert whole(each.body)
        Webhook(told.secrets[path]).verify(each.body, dict(each.headers))
        document = json.loads(each.body)
        assert (document["data"] if path == "/hook" else document)["metadata"] == METADATA


async def test_a_brokers_message_is_one_line(told: Told) -> None:
    assert all(whole(body) for body in told.published)
    assert [json.loads(body) for body in told.published] == told.events


async def test_a_page_of_events_is_one_line(told: Told) -> None:
    answer = await told.here.client.get("/v1/events")
    assert whole(answer.content)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["data"] == told.events


async def test_the_command_line_prints_one_line_for_each_event(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()  # the service of this process writes its log lines there as well
    for event in told.events:
        put_json(event)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == told.events


async def test_a_stream_has_the_line_ends_of_server_sent_events_alone(told: Told) -> None:
    """The bytes of the stream, as a socket brings them."""
    url = httpx.URL(told.here.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    key = told.here.client.headers["authorization"]
    head = f"GET /v1/events?after=0 HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\n"
    writer.write(f"{head}accept: text/event-stream\r\n\r\n".encode())
    seen = b""
    while seen.count(b"\ndata: ") < 2 or not seen.endswith(b"\n\n\r\n"):
        seen += await asyncio.wait_for(reader.read(65536), 30)
    writer.close()
    assert not [end for end in ENDS if end.encode() in seen]
    datas = [line[6:] for line in seen.decode().splitlines() if line.startswith("data: ")]
    assert [json.loads(data) for data in datas] == told.events


# --- readers that clients use ---

LINES = Callable[[str, dict[str, str]], Iterator[str]]


def httpx_lines(url: str, headers: dict[str, str]) -> Iterator[str]:
    with httpx.stream("GET", url, headers=headers, timeout=30) as answer:
        yield from answer.iter_lines()


def requests_lines(url: str, headers: dict[str, str]) -> Iterator[str]:
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        answer.encoding = "utf-8"
        yield from map(str, answer.iter_lines(chunk_size=1, decode_unicode=True))


def received(url: str, headers: dict[str, str]) -> io.BytesIO:
    """The bytes of two events."""
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        body = b""
        for chunk in answer.iter_content(chunk_size=1):
            body += chunk
            if body.count(b"\ndata: ") == 2 and body.endswith(b"\n\n"):
                break
    return io.BytesIO(body)


def codec_lines(url: str, headers: dict[str, str]) -> Iterator[str]:
    """The codec's reader ends a line where `splitlines` does."""
    yield from codecs.getreader("utf-8")(received(url, headers))


def text_lines(url: str, headers: dict[str, str]) -> Iterator[str]:
    yield from io.TextIOWrapper(received(url, headers), "utf-8")


def node_lines(url: str, headers: dict[str, str]) -> Iterator[str]:
    program = shutil.which("node") or missing("Node.js")
    source = """
        const [url, headers] = process.argv.slice(1)
        require('node:http').get(url, {headers: JSON.parse(headers)}, (input) => {
          const lines = require('node:readline').createInterface({input})
          lines.on('line', (line) => console.log(JSON.stringify(line)))
        })
    """
    command = [program, "-e", source, url, json.dumps(headers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            process.kill()


READERS: list[LINES] = [httpx_lines, requests_lines, codec_lines, text_lines, node_lines]


def documents(lines: Iterator[str], count: int) -> list[JSON]:
    found: list[JSON] = []
    for line in lines:
        name, _, value = line.rstrip("\n").partition(": ")
        assert name in ("", "retry", "id", "event", "data"), f"a part of a line: {line!r}"
        if name == "data":
            found.append(json.loads(value))
            if len(found) == count:
                break
    return found


@pytest.mark.parametrize("lines", READERS)
async def test_a_line_reader_finds_whole_events_in_the_stream(told: Told, lines: LINES) -> None:
    headers = {
        "accept": "text/event-stream",
        "authorization": told.here.client.headers["authorization"],
    }
    url = f"{told.here.url}/v1/events?after=0"
    assert await asyncio.to_thread(documents, lines(url, headers), 2) == told.events


async def test_httpx_sse_finds_whole_events_in_the_stream(told: Told) -> None:
    """Whether its version ends lines at NEL, LS and PS or not."""
    found = []
    opened = httpx_sse.aconnect_sse(told.here.client, "GET", "/v1/events", params={"after": "0"})
    async with asyncio.timeout(30), opened as source:
        async for event in source.aiter_sse():
            found.append((event.id, event.event, json.loads(event.data)))
            if len(found) == 2:
                break
    assert found == [(event["sequence"], event["type"], event) for event in told.events]


@pytest.mark.parametrize("text", [*ENDS, f"{ENDS}x{ENDS}", "\\u2028", "\\\u2028", '"\u2029"'])
def test_escaping_changes_no_value(text: str) -> None:
    """A backslash in front of the character stays one, and text that looks escaped stays text."""
    written = compact_json({"text": text, text: [text]})
    assert json.loads(written) == {"text": text, text: [text]}
    assert len(written.splitlines()) == 1
