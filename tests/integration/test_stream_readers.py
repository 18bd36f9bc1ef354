"""Readers of server-sent events that clients have, on a stream that is silent for a while. None may
see an event that is none, and none may lose its place.
"""

import asyncio
import codecs
import importlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import requests
from structlog.testing import capture_logs

from service.web.routes import event_routes
from tests.api import UNTIL_DONE, got, refused, submitted
from tests.world import World, world

httpx_sse = importlib.import_module("httpx_sse")
sseclient = importlib.import_module("sseclient")

JSON = dict[str, Any]
SSE = {"accept": "text/event-stream"}


@dataclass(frozen=True, slots=True)
class Silent:
    """A service whose streams comment ten times a second, and the events of one task."""

    here: World
    events: list[JSON]

    @property
    def headers(self) -> dict[str, str]:
        return {**SSE, "authorization": self.here.client.headers["authorization"]}


@pytest.fixture(scope="module")
async def silent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Silent]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_routes, "CHECK_S", 0.02)
        patch.setattr(event_routes, "COMMENT_S", 0.1)
        async with world(tmp_path_factory.mktemp("silent")) as here:
            await submitted(here.client, UNTIL_DONE)
            yield Silent(here, await here.events())


# --- readers: each yields id, type and data of the events as it understands them

Seen = tuple[str, str, str]
Reader = Callable[[str, dict[str, str]], Iterator[Seen]]


def by_httpx_sse(url: str, headers: dict[str, str]) -> Iterator[Seen]:
    with httpx.Client(timeout=30) as client:
        connected = httpx_sse.connect_sse(client, "GET", url, headers=headers)
        with connected as source:
            for event in source.iter_sse():
                yield event.id, event.event, event.data


def by_sseclient(url: str, headers: dict[str, str]) -> Iterator[Seen]:
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        for event in sseclient.SSEClient(answer.iter_content(chunk_size=1)).events():
            yield event.id, event.event, event.data


def by_the_standard(url: str, headers: dict[str, str]) -> Iterator[Seen]:
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        yield from interpreted(answer.iter_content(chunk_size=1))


def interpreted(chunks: Iterable[bytes]) -> Iterator[Seen]:
    """WHATWG HTML, 9.2.6: how an event stream is interpreted."""
    last_id, type, data = "", "", ""
    for line in lines_of(chunks):
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield last_id, type or "message", data.removesuffix("\n")
            type = data = ""
        elif name == "event":
            type = value
        elif name == "data":
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            last_id = value


def lines_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a UTF-8 stream, without a byte order mark. They end with CR LF, LF or CR."""
    decode, rest = codecs.getincrementaldecoder("utf-8-sig")("replace").decode, ""
    for chunk in chunks:
        *lines, rest = re.split(r"\r\n|\n|\r(?!\n|\Z)", rest + decode(chunk))
        yield from lines


@pytest.mark.parametrize(
    ("stream", "seen"),
    [
        ("data: YHOO\ndata: +2\ndata: 10\n\n", [("", "message", "YHOO\n+2\n10")]),
        (
            ": test\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third\n\n",
            [("1", "message", "first event"), ("", "message", "second event"),
             ("", "message", " third")],
        ),
        ("data\n\ndata\ndata\n\ndata:", [("", "message", ""), ("", "message", "\n")]),
        ("data:test\n\ndata: test\n\n", [("", "message", "test")] * 2),
        ("\ufeffevent: add\r\ndata: 7\u2028\x85\r\n\r\n", [("", "add", "7\u2028\x85")]),
        ("event: add\rid: 1\0\rretry: 5\rdata: 7\r\r:", [("", "add", "7")]),
        ("event: none\nid: 4\n\ndata: 5\n\n", [("4", "message", "5")]),
    ],
)  # fmt: skip
def test_the_parsing_rules_read_the_examples_of_the_standard(
    stream: str, seen: Sequence[Seen]
) -> None:
    """In whole and byte by byte. Then they may judge the streams of the service."""
    content = stream.encode()
    assert list(interpreted([content])) == seen
    assert list(interpreted(content[at : at + 1] for at in range(len(content)))) == seen


def strict(url: str, headers: dict[str, str]) -> Iterator[Seen]:
    """A reader of a few lines: every blank line ends an event, which must have all its fields."""
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        fields: dict[str, str] = {}
        for line in map(bytes.decode, answer.iter_lines(chunk_size=1)):
            name, _, value = line.partition(": ")
            if line:
                fields[name] = value
            else:
                yield fields["id"], fields["event"], fields["data"]
                fields = {}


READERS: list[Reader] = [by_httpx_sse, by_sseclient, by_the_standard, strict]


@pytest.mark.parametrize("reader", READERS)
async def test_a_reader_of_a_silent_stream_sees_events_alone(
    silent: Silent, reader: Reader
) -> None:
    """Comments before the first event, and between two, add no event and no empty id. The reader
    goes on from the id that it saw last.
    """
    here, last = silent.here, (await silent.here.events())[-1]["sequence"]
    url = f"{here.url}/v1/events?after={last}"
    found: list[Seen] = []

    def read(count: int) -> None:
        for seen in reader(url, silent.headers):
            found.append(seen)
            if len(found) == count:
                return

    reading = asyncio.create_task(asyncio.to_thread(read, 4))
    tasks = []
    for _ in range(2):
        await asyncio.sleep(0.35)  # a few comments
        tasks.append((await submitted(here.client, UNTIL_DONE))["id"])
    await asyncio.wait_for(reading, 60)
    told = [event for event in await here.events() if event["subject"] in tasks]
    assert [(id, type, json.loads(data)) for id, type, data in found] == [
        (event["sequence"], event["type"], event) for event in told
    ]


async def test_the_bytes_of_a_silent_stream_have_no_blank_line(silent: Silent) -> None:
    """`retry:` and each comment are lines of their own, and no blank line follows."""
    url = f"/v1/events?after={(await silent.here.events())[-1]['sequence']}"
    seen = b""
    async with asyncio.timeout(30), silent.here.client.stream("GET", url, headers=SSE) as answer:
        async for chunk in answer.aiter_raw():
            seen += chunk
            if seen.count(b"\n:") >= 3:
                break
    assert seen.startswith(b"retry: 1000\n:")
    assert b"\n\n" not in seen


# --- positions


@pytest.mark.parametrize("headers", [{}, SSE])
@pytest.mark.parametrize("query", ["after=", "after=&limit=1", "limit=1&after=", "after=%20"])
async def test_an_empty_after_is_refused(
    silent: Silent, query: str, headers: dict[str, str]
) -> None:
    """A page and a stream would begin somewhere that the client did not ask for."""
    answer = await silent.here.client.get(f"/v1/events?{query}", headers=headers)
    error = refused(answer, 400, "invalid_request", param="after")
    assert error["message"].endswith(("''", "' '"))


@pytest.mark.parametrize("ends", ["last-event-id:", "last-event-id: ", "Last-Event-ID:\t"])
async def test_an_empty_last_event_id_counts_as_none_and_is_logged(
    silent: Silent, ends: str
) -> None:
    """The stream begins after `after`."""
    where = httpx.URL(silent.here.url)
    reader, writer = await asyncio.open_connection(where.host, where.port)
    head = "".join(f"{name}: {value}\r\n" for name, value in silent.headers.items())
    with capture_logs() as lines:
        writer.write(f"GET /v1/events?after=0 HTTP/1.1\r\nhost: x\r\n{head}{ends}\r\n\r\n".encode())
        wanted = silent.events[0]["sequence"].encode()
        async with asyncio.timeout(30):
            await reader.readuntil(b"\nid: " + wanted)
    writer.close()
    assert [line["after"] for line in lines if line["event"] == "events.position_empty"] == ["0"]


async def test_a_page_knows_no_last_event_id(silent: Silent) -> None:
    """The header is part of server-sent events. A page ignores it."""
    answer = await silent.here.client.get("/v1/events", headers={"last-event-id": ""})
    assert got(answer)["data"] == await silent.here.events()
