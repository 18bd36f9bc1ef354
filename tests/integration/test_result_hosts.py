"""Result hosts that a setting or a name server refuses for now: the download waits, operators are
told, and a corrected setting or name heals it. The upstream answers over raw sockets.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.cli.list_rows import why_held
from tests.downloads import bytes_of, downloading, link, links_die, lost, made, steps
from tests.hostile import Names
from tests.upstream import Upstream, picture
from tests.waiting import wait_until
from tests.world import JSON, World

HOSTS, NETWORKS = "DARKROOM_EVOLINK_RESULT_HOSTS", "DARKROOM_UPSTREAM_NETWORKS"
SLOW = "600"  # seconds: only a start can make the next attempt


def ok(body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def sent_on(url: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()


@asynccontextmanager
async def raw_host(*answers: bytes) -> AsyncIterator[int]:
    """The port of a host that answers each request with the next of these, the last for ever."""
    left = list(answers)

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def causes(here: World) -> list[str]:
    answer = await here.client.get("/readyz")
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == ("degraded" if body["causes"] else "ok")
    found: list[str] = body["causes"]
    return found


async def at_risk(here: World, task: JSON) -> JSON:
    """The one event that tells operators, as soon as it is there."""
    return await here.told(task["id"], "image.at_risk")


@pytest.fixture(scope="module")
def names() -> Iterator[Names]:
    """A name server of the test."""
    names = Names()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", names.look_up)
        yield names


async def waits(here: World, task: JSON, host: str, setting: str | None) -> None:
    """The result waits. The event, `/readyz` and the timeline name host and setting."""
    told = await at_risk(here, task)
    assert (told["host"], told["setting"], told["index"]) == (host, setting, 0)
    assert host in told["reason"]
    assert setting is None or setting in told["reason"]
    assert await causes(here) == ["result_hosts"]

    async def storing() -> bool:
        return bool((await here.task(task["id"]))["state"] == "storing")

    await wait_until(storing)
    assert ("image.retry", told["reason"]) in await steps(here, task)
    said = why_held(await here.steps(task["id"]))
    assert said == f"image 0 is not saved yet: {told['reason']}", "what darkroom submit --wait says"


async def heals(folder: Path, upstream: Upstream, task: JSON, **corrected: Any) -> None:
    """A start with the corrected setting fetches the picture at once. Nothing else helps it."""
    async with downloading(folder, upstream, download_schedule=SLOW, **corrected) as here:
        ended = await here.ended(task["id"])
        assert ended["state"] == "completed"
        assert await bytes_of(here, ended["images"][0]) == picture()
        assert await causes(here) == []
        assert await here.events(task=task["id"], type="image.task.failed") == []


# --- a host that is not listed


@pytest.mark.parametrize(
    ("listed", "named", "corrected"),
    [
        ("files.example", "127.0.0.1", "127.0.0.1"),
        (".evolink.ai", "media.test", ".evolink.ai,media.test"),
        (".media.test", "media.test", "media.test"),
        ("media.test", "cdn.media.test", ".media.test"),
        ("media.test", "MEDIA.example.TEST.", "media.example.test"),
    ],
)
async def test_a_host_that_is_not_listed_waits_for_the_corrected_setting(
    listed: str, named: str, corrected: str, tmp_path: Path, names: Names
) -> None:
    """The operator did not know the host, or took `.x` for `x`."""
    host = named.lower().rstrip(".")
    names.zone[host] = names.zone[named] = [["127.0.0.1"]]
    upstream = Upstream()
    async with raw_host(ok(picture())) as port:
        with capture_logs() as lines:
            async with downloading(
                tmp_path, upstream, evolink_result_hosts=listed, download_schedule=SLOW
            ) as here:
                assert await causes(here) == []
                task = await made(here, upstream, f"http://{named}:{port}/a.png")
                await waits(here, task, host, HOSTS)
        (refused,) = [line for line in lines if line["event"] == "egress.refused"]
        assert refused["host"] == host
        assert HOSTS in refused["reason"]
        await heals(tmp_path, upstream, task, evolink_result_hosts=corrected)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_a_host_that_is_not_listed_waits_too(
    status: int, tmp_path: Path, names: Names
) -> None:
    """A content network is often such a second host."""
    names.zone["second.test"] = [["127.0.0.1"]]
    upstream = Upstream()
    async with (
        raw_host(ok(picture())) as second,
        raw_host(sent_on(f"http://second.test:{second}/a.png", status)) as first,
    ):
        async with downloading(tmp_path, upstream, download_schedule=SLOW) as here:
            task = await made(here, upstream, f"http://127.0.0.1:{first}/a.png")
            await waits(here, task, "second.test", HOSTS)
        await heals(tmp_path, upstream, task, evolink_result_hosts="127.0.0.1,second.test")


async def test_a_network_that_is_not_listed_waits_for_the_corrected_setting(
    tmp_path: Path, names: Names
) -> None:
    """The name leads to an address that only `DARKROOM_UPSTREAM_NETWORKS` allows."""
    names.zone["inside.test"] = [["127.0.0.2"]]
    upstream, only = Upstream(), {"evolink_result_hosts": "inside.test"}
    async with raw_host(ok(picture())) as port:
        async with downloading(
            tmp_path, upstream, download_schedule=SLOW, upstream_networks="127.0.0.1/32", **only
        ) as here:
            task = await made(here, upstream, f"http://inside.test:{port}/a.png")
            await waits(here, task, "inside.test", NETWORKS)
        names.zone["inside.test"] = [["127.0.0.1"]]
        await heals(tmp_path, upstream, task, **only)


# --- a name that resolves to a reserved address for a while


@pytest.fixture(scope="module")
async def here(
    upstream: Upstream, names: Names, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    hosts = "127.0.0.1,.test,10.0.0.5,198.18.0.5,::1"
    folder = tmp_path_factory.mktemp("names")
    async with downloading(folder, upstream, evolink_result_hosts=hosts) as made:
        assert names.zone
        yield made


RESERVED = {
    "vpn": ["198.18.0.5"],
    "portal": ["10.0.0.1"],
    "filter": ["0.0.0.0"],
    "carrier": ["100.64.0.7"],
    "metadata": ["169.254.169.254"],
    "local6": ["fd00::7"],
    "mapped": ["::ffff:10.0.0.1"],
    "one-of-two": ["1.1.1.1", "10.0.0.1"],
}


@pytest.mark.parametrize("name", RESERVED)
async def test_a_name_with_a_reserved_address_is_retried(
    name: str, here: World, upstream: Upstream, names: Names
) -> None:
    """The first two attempts get the reserved address, the third the real one. Each attempt looks
    an http link up twice. The log names the setting.
    """
    host = f"{name}.test"
    names.zone[host] = [*[RESERVED[name]] * 4, ["127.0.0.1"]]
    async with raw_host(ok(picture())) as port:
        with capture_logs() as lines:
            task = await made(here, upstream, f"http://{host}:{port}/a.png")
            ended = await here.ended(task["id"])
    assert ended["state"] == "completed"
    assert await bytes_of(here, ended["images"][0]) == picture()
    assert [step for step, _ in await steps(here, task)] == [*["image.retry"] * 2, "image.stored"]
    refused = [line for line in lines if line["event"] == "egress.refused"]
    assert [line["host"] for line in refused] == [host] * 2
    assert all(NETWORKS in line["reason"] for line in refused)
    told = await at_risk(here, task)
    assert (told["host"], told["setting"]) == (host, NETWORKS)
    assert await causes(here) == []


async def test_a_name_with_very_many_addresses_is_retried(
    here: World, upstream: Upstream, names: Names
) -> None:
    """No setting would help, so none is named."""
    names.zone["many.test"] = [[f"1.1.{number}.1" for number in range(65)], ["127.0.0.1"]]
    async with raw_host(ok(picture())) as port:
        task = await made(here, upstream, f"http://many.test:{port}/a.png")
        assert (await here.ended(task["id"]))["state"] == "completed"
    told = await at_risk(here, task)
    assert (told["host"], told["setting"]) == ("many.test", None)


@pytest.mark.parametrize(
    "url",
    [
        "https://198.18.0.5/a.png",
        "http://10.0.0.5/a.png",
        "https://192.168.1.1/a.png",
        "https://169.254.169.254/latest",
        "https://[::1]/a.png",
        "https://[::ffff:10.0.0.1]/a.png",
        "https://2130706433/a.png",
    ],
)
async def test_a_reserved_address_in_the_links_own_text_is_final(
    url: str, here: World, upstream: Upstream
) -> None:
    """It is final at once, whether the list of hosts has it or not."""
    reason = await lost(here, upstream, url)
    assert "not globally routable" in reason or "an address in an odd notation" in reason


PASSING = {
    "a reserved address": "https://198.18.0.5/a.png",
    "an address of another network": "http://10.0.0.5/a.png",
    "an odd notation": "https://2130706433/a.png",
    "itself": "/a.png",
    "a loop of two": "/b.png",
    "another scheme": "data:text/html,busy",
    "a page of the browser": "about:blank",
    "a user": "https://u:p@127.0.0.1/a.png",
    "no host": "https:///login",
    "a port of another protocol": "https://127.0.0.1:25/",
    "a long URL": "/" + "x" * 17_000,
    "two places": "/a.png\r\nLocation: https://elsewhere/",
    "nothing": "",
    "bytes": "https://ho\xffst\x01/",
}


@pytest.mark.parametrize("kind", PASSING)
async def test_a_redirect_that_the_guard_refuses_is_retried(
    kind: str, here: World, upstream: Upstream
) -> None:
    """The host, a captive portal or its login page redirects for a while. The log names the host
    that redirects, or the one to which it redirects.
    """
    away = sent_on(PASSING[kind])
    async with raw_host(*[away] * 7, ok(picture())) as port:
        with capture_logs() as lines:
            task = await made(here, upstream, f"http://127.0.0.1:{port}/a.png")
            ended = await here.ended(task["id"])
    assert ended["state"] == "completed"
    assert await bytes_of(here, ended["images"][0]) == picture()
    named = [step for step in await steps(here, task) if step[0] == "image.retry"]
    assert len(named) >= 1
    reasons = [reason for _, reason in named if "answered" not in reason]
    assert all("127.0.0.1" in reason for reason in reasons)
    refused = [line["host"] for line in lines if line["event"] == "egress.refused"]
    assert len(refused) == len(reasons)
    assert set(refused) <= {"127.0.0.1", "198.18.0.5", "10.0.0.5"}
    assert await causes(here) == []


async def test_a_refused_redirect_is_lost_with_its_link(tmp_path: Path) -> None:
    """A loop that never ends is final when the link's time is up, and the task says why."""
    upstream = Upstream()
    async with raw_host(sent_on("/a.png")) as port, downloading(tmp_path, upstream) as here:
        task = await made(here, upstream, f"http://127.0.0.1:{port}/a.png")
        told = await at_risk(here, task)
        await links_die(here, task)
        task = await here.ended(task["id"])
    assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")
    assert "127.0.0.1: more than 5 redirects" in task["error"]["message"]
    assert (told["host"], told["setting"]) == ("127.0.0.1", None)


@pytest.mark.parametrize("url", ["https://u:p@127.0.0.1/a.png", "https://127.0.0.1/\u2028"])
async def test_a_link_that_cannot_be_read_is_lost_with_its_time(url: str, tmp_path: Path) -> None:
    """The upstream was asked for another one until then. The task says why."""
    upstream = Upstream()
    async with downloading(tmp_path, upstream) as here:
        task = await made(here, upstream, url)
        await wait_until(lambda: upstream.asked[task["upstream_id"]] >= 3)
        await links_die(here, task)
        task = await here.ended(task["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")
        assert "a URL has no" in task["error"]["message"]
        assert await causes(here) == []


async def test_a_refused_host_is_lost_with_its_link(tmp_path: Path) -> None:
    """The message of the task names host and setting."""
    upstream = Upstream()
    async with downloading(
        tmp_path, upstream, evolink_result_hosts="files.example", evolink_result_ttl_s=0.4
    ) as here:
        task = await here.ended((await made(here, upstream, link(here, "a.png")))["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")
        assert "127.0.0.1" in task["error"]["message"]
        assert HOSTS in task["error"]["message"]
        assert await causes(here) == []
