"""Wrong tokens at the token bucket: a burst passes, a flood is delayed, and it writes few log
lines.
"""

import asyncio
import selectors
from types import SimpleNamespace

import pytest
from starlette.types import Message
from structlog.testing import capture_logs

from service.ops.metrics import Metrics
from service.signing import Keyring
from service.web.overload import BURST, MAX_DELAY_S, RATE, LogSampler, TokenBucket
from service.web.routes.callback_route import CallbackRoute

CONNECTIONS, REQUESTS = 50, 30


def refused(bucket: TokenBucket, sampler: LogSampler, now: float) -> tuple[float, int | None]:
    """The delay of a refusal, and the number of withheld lines if it has a line."""
    delay = bucket.delay(now)
    return delay, sampler.take(now, force=not delay)


def test_a_few_refusals_pass_at_once_and_each_has_its_line() -> None:
    """This holds for a burst at one moment, and without end at the steady rate."""
    bucket, sampler = TokenBucket(), LogSampler()
    assert [refused(bucket, sampler, 1000.0) for _ in range(BURST)] == [(0.0, 0)] * BURST
    steady = TokenBucket()
    assert {
        refused(steady, sampler, 1000.0 + number * 1.01 / RATE) for number in range(5 * RATE)
    } == {(0.0, 0)}


def test_refusals_above_the_rate_wait_longer_and_never_over_a_second() -> None:
    """Delays grow by one token at a time up to the limit."""
    bucket = TokenBucket()
    waits = [bucket.delay(1000.0) for _ in range(BURST + 3 * RATE)]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_DELAY_S
    assert 0 < min(wait for wait in waits if wait) <= 1.5 / RATE


def test_a_flood_has_a_line_a_second_which_counts_the_withheld_ones() -> None:
    """Each refusal has its own line or counts in the next line."""
    bucket, sampler = TokenBucket(), LogSampler()
    # 10 s with 5000 refusals per second
    counts = [refused(bucket, sampler, 1000.0 + number / 5000)[1] for number in range(50_001)]
    lines = [withheld for withheld in counts if withheld is not None]
    assert BURST <= len(lines) < BURST + 130
    assert sum(lines) + len(lines) <= len(counts)
    assert refused(bucket, sampler, 2000.0) == (0.0, len(counts) - sum(lines) - len(lines))


def test_after_a_flood_the_bucket_is_full_again() -> None:
    """Two seconds later, no refusal is delayed."""
    bucket = TokenBucket()
    for _ in range(10_000):
        bucket.delay(1000.0)
    assert bucket.delay(1002.1 + BURST / RATE) == 0.0


# --- on the route ---


class Leaping(selectors.SelectSelector):
    """A selector that never waits. When no file is ready, its clock leaps to the next timer."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        self.now += 0 if ready else timeout or 0
        return ready


class Loop(asyncio.SelectorEventLoop):
    """An event loop on the clock of its selector."""

    def __init__(self) -> None:
        self.leaping = Leaping()
        super().__init__(self.leaping)

    def time(self) -> float:
        return self.leaping.now


async def hammer(
    route: CallbackRoute, resources: object, headers: dict[str, str], answered: list[float]
) -> None:
    """A connection that sends wrong tokens one after another. It records the time of each
    response.
    """
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
        raise AssertionError("the body of a request with a wrong token was read")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 401
            answered.append(clock())

    for _ in range(REQUESTS):
        await route(scope, receive, send)


@pytest.mark.parametrize(
    "headers", [{"content-length": "2"}, {"content-length": "200000"}], ids=["short", "long"]
)
def test_connections_that_send_wrong_tokens_are_slowed_down(headers: dict[str, str]) -> None:
    """Fifty fast connections together get refusals at the rate of the bucket. Each request is
    refused in the end.
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
        assert seconds * RATE - CONNECTIONS <= within <= seconds * RATE + BURST + CONNECTIONS
