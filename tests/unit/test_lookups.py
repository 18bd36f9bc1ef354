"""Look-ups of names: a name server that never answers delays only the calls of its own host, and an
owner has a fair share of the threads.
"""

import asyncio
import gc
import socket
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.errors import NotConnected
from service.fair_slots import HOLDER
from service.net import egress_client
from service.net.egress_client import Egress, Rules
from service.net.transport import LOOKUPS, LOOKUPS_REST, SystemResolver
from tests.waiting import wait_until

SHARE = LOOKUPS // (LOOKUPS_REST + 1) + 1


class NameServer:
    """Answers no question about a host of `dead.test` before `answered` is set."""

    def __init__(self) -> None:
        self.answered, self.asked = threading.Event(), list[str]()

    def look_up(self, host: str, *_: object, **__: object) -> list[object]:
        self.asked.append(host)
        if host.endswith("dead.test"):
            self.answered.wait(60)
        return [(2, 1, 6, "", ("1.1.1.1", 0))]


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NameServer]:
    monkeypatch.setattr(egress_client, "CONNECT", 60)  # no call is given up on a busy machine
    made = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", made.look_up)
    yield made
    made.answered.set()


def begun(owner: str, call: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """A call on behalf of an owner."""
    HOLDER.set(owner)
    return asyncio.create_task(call)


@asynccontextmanager
async def hanging(egress: Egress, server: NameServer, names: int) -> AsyncIterator[None]:
    """One owner calls so many names whose server never answers."""
    urls = [f"https://{number}.dead.test/" for number in range(names)]
    tasks = [begun("greedy", egress.check(url)) for url in urls]
    await wait_until(lambda: len(server.asked) == min(names, SHARE))
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        server.answered.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("names", [1, SHARE, SHARE + 1, LOOKUPS, 3 * LOOKUPS])
async def test_one_owners_names_leave_look_ups_to_other_owners(
    server: NameServer, names: int
) -> None:
    """The rest of its names waits, and is looked up once the first are answered."""
    egress = Egress(Rules("endpoints"))
    async with hanging(egress, server, names):
        for owner in ("modest", "another"):
            await begun(owner, egress.check(f"https://{owner}.test/"))
    assert len(server.asked) == names + 2


async def test_one_purpose_leaves_look_ups_to_another(server: NameServer) -> None:
    """Even for the same owner."""
    async with hanging(Egress(Rules("endpoints")), server, LOOKUPS):
        await begun("greedy", Egress(Rules("upstream")).check("https://alive.test/"))


async def test_calls_to_one_host_share_a_look_up(server: NameServer) -> None:
    """So a slow one takes one place of its owner, however often the host is called."""
    egress = Egress(Rules("endpoints"))
    tasks = [begun("owner", egress.check("https://dead.test/")) for _ in range(LOOKUPS)]
    await wait_until(lambda: server.asked)
    await begun("owner", egress.check("https://alive.test/"))
    server.answered.set()
    await asyncio.gather(*tasks)
    assert server.asked == ["dead.test", "alive.test"]


async def test_a_look_up_counts_until_the_system_gives_it_up(
    server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call may have ended long before. The thread is taken until then."""
    egress = Egress(Rules("endpoints"))
    with monkeypatch.context() as patched:
        patched.setattr(egress_client, "CONNECT", 0.05)
        for _ in range(3):
            tasks = [
                begun("greedy", egress.check(f"https://{number}.dead.test/"))
                for number in range(SHARE)
            ]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in results} == {NotConnected}
    await wait_until(lambda: len(server.asked) >= SHARE)
    await begun("modest", egress.check("https://alive.test/"))
    server.answered.set()
    await begun("greedy", egress.check("https://late.test/"))
    assert len(server.asked) == SHARE + 2


async def test_a_name_without_an_address_is_looked_up_again(
    server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(host: str, *_: object, **__: object) -> list[object]:
        server.asked.append(host)
        raise OSError(socket.EAI_NONAME, "Name or service not known")

    egress = Egress(Rules("endpoints"))
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", fail)
        for _ in range(2):
            with pytest.raises(NotConnected):
                await egress.check("https://late.test/")
    await egress.check("https://late.test/")
    assert server.asked == ["late.test"] * 3


async def test_a_look_up_that_fails_after_its_call_was_given_up_is_no_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No call waits for the error. asyncio would report it as never retrieved."""
    answered, asked, faults = threading.Event(), list[str](), list[Any]()

    def fail(host: str, *_: object, **__: object) -> list[object]:
        asked.append(host)
        answered.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    gc.collect()  # what earlier tests left is reported now
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_exception_handler", faults.append)
    resolver = SystemResolver("test")
    call = asyncio.create_task(resolver("gone.test"))
    await wait_until(lambda: asked)
    call.cancel()
    await asyncio.wait([call])
    answered.set()
    await wait_until(lambda: not resolver._running)
    gc.collect()
    assert faults == []
