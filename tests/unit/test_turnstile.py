"""Refusals at the turnstile: the first ones pass, a flood waits, and its lines are few."""

import asyncio
import selectors
from types import SimpleNamespace

import pytest
from starlette.types import Message
from structlog.testing import capture_logs

from service.ops.metrics import Metrics
from service.signing import Keyring
from service.web.routes.callback_route import BURST, TURNS_S, WAIT_S, CallbackRoute, Turnstile

CONNECTIONS, REQUESTS = 50, 30


def test_a_few_refusals_pass_at_once_and_each_has_its_line() -> None:
    """As many as the burst at one moment, and for ever at the steady rate."""
    turnstile = Turnstile()
    assert [turnstile.turn(1000.0) for _ in range(BURST)] == [(0.0, 0)] * BURST
    steady = Turnstile()
    assert {steady.turn(1000.0 + number * 1.01 / TURNS_S) for number in range(5 * TURNS_S)} == {
        (0.0, 0)
    }


def test_whoever_comes_faster_waits_longer_and_never_over_a_second() -> None:
    """Waits grow one place at a time up to the limit."""
    turnstile = Turnstile()
    waits = [turnstile.turn(1000.0)[0] for _ in range(BURST + 3 * TURNS_S)]
    assert waits == sorted(waits)
    assert waits[-1] == WAIT_S
    assert 0 < min(wait for wait in waits if wait) <= 1.5 / TURNS_S


def test_a_flood_has_a_line_a_second_which_tells_of_the_others() -> None:
    """Each refusal is in a line of its own or in the number of those withheld before the next
    line.
    """
    turnstile = Turnstile()
    told = [
        turnstile.turn(1000.0 + number / 5000)[1] for number in range(50_001)
    ]  # 10 s of 5000 a second
    lines = [withheld for withheld in told if withheld is not None]
    assert BURST <= len(lines) < BURST + 130
    assert sum(lines) + len(lines) <= len(told)
    assert turnstile.turn(2000.0) == (0.0, len(told) - sum(lines) - len(lines))


def test_after_a_flood_the_turnstile_is_as_it_was() -> None:
    """Two seconds later nobody waits."""
    turnstile = Turnstile()
    for _ in range(10_000):
        turnstile.turn(1000.0)
    assert turnstile.turn(1002.1 + BURST / TURNS_S)[0] == 0.0


# --- what passes through it ---


class Leaping(selectors.SelectSelector):
    """Waits for nothing: when nobody is ready, its clock leaps to the next timer."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        self.now += 0 if ready else timeout or 0
        return ready


class Loop(asyncio.SelectorEventLoop):
    """An event loop on a clock of its own."""

    def __init__(self) -> None:
        self.leaping = Leaping()
        super().__init__(self.leaping)

    def time(self) -> float:
        return self.leaping.now


async def hammer(
    route: CallbackRoute, resources: object, headers: dict[str, str], answered: list[float]
) -> None:
    """One connection that sends wrong tokens one after the other; when each was answered."""
    clock = asyncio.get_running_loop().time
    path = {"upstream": "evolink", "task_id": "task_none", "token": "wrong"}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "state": {"context": SimpleNamespace(resources=resources)},
        "path_params": path,
        "headers": raw,
        "request_id": "req_1",
    }

    async def receive() -> Message:
        raise AssertionError("the body of a stranger is read")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 401
            answered.append(clock())

    for _ in range(REQUESTS):
        await route(scope, receive, send)


@pytest.mark.parametrize(
    "headers", [{"content-length": "2"}, {"content-length": "200000"}], ids=["short", "long"]
)
def test_whoever_sends_one_after_the_other_is_slowed_down(headers: dict[str, str]) -> None:
    """However quick fifty connections are: so many are refused in a time as it has turns, and all
    of them in the end.
    """
    answered: list[float] = []
    resources = SimpleNamespace(keyring=Keyring([b"k" * 32]), metrics=Metrics())

    async def flood() -> None:
        route = CallbackRoute()
        await asyncio.gather(
            *(hammer(route, resources, headers, answered) for _ in range(CONNECTIONS))
        )

    with asyncio.Runner(loop_factory=Loop) as runner, capture_logs():
        runner.run(flood())
    assert len(answered) == CONNECTIONS * REQUESTS
    for seconds in (1, 5, 10):
        within = sum(time < 1000.0 + seconds for time in answered)
        assert seconds * TURNS_S - CONNECTIONS <= within <= seconds * TURNS_S + BURST + CONNECTIONS
