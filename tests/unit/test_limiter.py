"""The limiter of calls to the upstream: the number of calls at once, the order of the kinds, and
fewer calls of a kind after a 429.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import NoPlace
from service.net.responses import Response
from service.queue.limiter import RANK, ConcurrencyLimiter, Kind
from service.upstreams.base import (
    Accepted,
    Found,
    NoAnswer,
    NotCreated,
    NotFound,
    Refused,
    Report,
    Uncertain,
    throttled,
)

KINDS: tuple[Kind, ...] = tuple(RANK)
TOO_MANY, SUCCESS = NoAnswer("429", throttled=True), NotFound()


@dataclass(slots=True)
class Callers:
    """Calls that take a place and keep it until the test ends them. `entered` has their kinds in
    the order in which they got their places.
    """

    limiter: ConcurrencyLimiter
    entered: list[Kind] = field(default_factory=list)
    most: int = 0  # the most calls that ran at once
    calls: list["asyncio.Task[None]"] = field(default_factory=list)
    records: dict[int, Callable[[Any], None]] = field(
        default_factory=dict
    )  # the `record` functions of the calls with a place
    ends: dict[int, asyncio.Event] = field(default_factory=dict)

    def enter(self, *kinds: Kind, times: int = 1) -> None:
        for kind in kinds * times:
            number = len(self.calls)
            self.ends[number] = asyncio.Event()
            self.calls.append(asyncio.create_task(self._call(number, kind)))

    async def _call(self, number: int, kind: Kind) -> None:
        async with self.limiter.slot(kind) as record:
            self.entered.append(kind)
            self.records[number] = record
            self.most = max(self.most, len(self.records))
            try:
                await self.ends[number].wait()
            finally:
                del self.records[number]

    def finish(self, answer: Any, numbers: Sequence[int] | None = None) -> None:
        """Ends these calls, or all running ones, with this answer."""
        for number in list(self.records) if numbers is None else numbers:
            self.records[number](throttled(answer))
            self.ends[number].set()

    async def turns(self) -> None:
        """Lets every call go on as far as it can."""
        for _ in range(8):
            await asyncio.sleep(0)

    async def round(self, kind: Kind, answer: Any) -> int:
        """Runs as many calls of a kind as may run at once, each with this answer. Returns their
        number.
        """
        self.enter(kind, times=40)
        await self.turns()
        running = list(self.records)
        for number in {*range(len(self.calls))} - {*running}:
            self.calls[number].cancel()
        self.finish(answer)
        await self.turns()
        return len(running)


@asynccontextmanager
async def calling(limiter: ConcurrencyLimiter) -> AsyncIterator[Callers]:
    callers = Callers(limiter)
    try:
        yield callers
    finally:
        for call in callers.calls:
            call.cancel()
        await asyncio.gather(*callers.calls, return_exceptions=True)
        assert (limiter.used(), [len(limiter.kinds[kind].waiting) for kind in KINDS]) == (
            0,
            [0] * 4,
        ), "a place is lost, or a call still waits"


# --- number of calls


@pytest.mark.parametrize(
    ("concurrency", "submit", "passthrough", "both", "reconcile", "patient"),
    [
        (1, 1, 1, 1, 1, 1),
        (2, 1, 1, 1, 2, 2),
        (3, 2, 1, 2, 3, 3),
        (4, 3, 1, 3, 4, 4),
        (8, 6, 2, 6, 7, 7),
        (16, 12, 4, 12, 14, 14),
    ],
)
async def test_each_kind_has_its_share(
    concurrency: int, submit: int, passthrough: int, both: int, reconcile: int, patient: int
) -> None:
    """Clients' calls have at most three quarters of the places. An eighth is for confirmations
    alone, and confirmations may use every place.
    """
    table: list[tuple[tuple[Kind, ...], int]] = [
        (("submit",), submit),
        (("passthrough",), passthrough),
        (("submit", "passthrough"), both),
        (("reconcile",), reconcile),
        (("submit", "passthrough", "reconcile"), patient),
        (("confirm",), concurrency),
        (("submit", "reconcile", "confirm"), concurrency),
    ]
    for kinds, most in table:
        async with calling(ConcurrencyLimiter(concurrency)) as callers:
            for kind in kinds:
                callers.enter(kind, times=40)
                await callers.turns()
            assert callers.limiter.used() == len(callers.records) == most, kinds


@given(
    concurrency=st.integers(1, 9),
    script=st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.sampled_from(KINDS)),
            st.tuples(st.sampled_from(["end", "cancel", "429", "success"]), st.integers(0, 40)),
            st.tuples(st.just("turn"), st.none()),
        ),
        max_size=60,
    ),
)
async def test_calls_never_exceed_the_places_in_any_order_of_events(
    concurrency: int, script: list[tuple[str, Any]]
) -> None:
    """Calls arrive, end, are cancelled and get 429s in any order and within one turn of the event
    loop. No place is lost.
    """
    limiter = ConcurrencyLimiter(concurrency)
    async with calling(limiter) as callers:
        for act, which in script:
            before = {kind: limiter.used(kind) for kind in KINDS}
            match act:
                case "enter":
                    callers.enter(which)
                case "turn":
                    await callers.turns()
                    assert limiter.used() == len(callers.records)
                case "cancel" if callers.calls:
                    callers.calls[which % len(callers.calls)].cancel()
                case "end" | "429" | "success" if callers.records:
                    number = sorted(callers.records)[which % len(callers.records)]
                    answer = {"end": Uncertain("502"), "429": TOO_MANY, "success": SUCCESS}[act]
                    callers.finish(answer, [number])
            assert max(limiter.used(), callers.most) <= concurrency
            for kind in KINDS:
                assert 1 <= limiter.kinds[kind].limit <= concurrency
                assert limiter.used(kind) <= max(limiter.kinds[kind].limit, before[kind]), (
                    "a call was let in above its limit"
                )
        await callers.turns()
        if (
            limiter.used() < concurrency
            and limiter.used("confirm") < limiter.kinds["confirm"].limit
        ):
            assert len(limiter.kinds["confirm"].waiting) == 0, (
                "a call waits although a place is free"
            )


# --- order of calls


async def test_confirmations_go_first_and_reconciling_last() -> None:
    """Confirmations go first. Submissions and passed-through calls follow in their order of
    arrival, and reconciling comes last.
    """
    async with calling(ConcurrencyLimiter(1)) as callers:
        callers.enter(
            "submit",
            "reconcile",
            "reconcile",
            "passthrough",
            "submit",
            "confirm",
            "passthrough",
            "confirm",
        )
        for _ in callers.calls:
            await callers.turns()
            callers.finish(SUCCESS)
    assert callers.entered == [
        "submit",
        "confirm",
        "confirm",
        "passthrough",
        "submit",
        "passthrough",
        "reconcile",
        "reconcile",
    ]


async def test_a_kind_at_its_limit_does_not_block_the_other_kinds() -> None:
    """Submissions that wait for their share leave the rest of the places to the calls behind
    them.
    """
    async with calling(ConcurrencyLimiter(4)) as callers:
        callers.enter("submit", times=9)
        callers.enter("reconcile", times=2)
        await callers.turns()
        assert [callers.limiter.used(kind) for kind in KINDS] == [0, 3, 0, 1]
        callers.enter("confirm")
        callers.finish(SUCCESS, [9])
        await callers.turns()
        assert [callers.limiter.used(kind) for kind in KINDS] == [1, 3, 0, 0]


async def test_a_call_without_a_place_in_time_raises() -> None:
    """The call was not made, and it does not wait any more."""
    limiter = ConcurrencyLimiter(1)
    async with limiter.slot("submit"):
        with pytest.raises(NoPlace):
            async with limiter.slot("passthrough", 0.0):
                pytest.fail("there was no place")
        assert len(limiter.kinds["passthrough"].waiting) == 0
    async with limiter.slot("passthrough", 0.0):
        assert limiter.used() == 1


async def test_a_call_that_fails_frees_its_place() -> None:
    """The caller gets the call's exception, even if it is a timeout of its own."""
    limiter = ConcurrencyLimiter(1)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with limiter.slot("confirm"):
                raise TimeoutError
    assert limiter.used() == 0


@pytest.mark.parametrize("first", ["given", "cancelled"])
async def test_a_waiting_call_that_is_cancelled_as_it_gets_a_place_frees_it(first: str) -> None:
    """The place is freed and the waiting call is cancelled in one turn of the event loop, in either
    order. The next call gets the place.
    """
    async with calling(ConcurrencyLimiter(1)) as callers:
        async with callers.limiter.slot("confirm"):
            callers.enter("confirm", "submit")
            await callers.turns()
            if first == "cancelled":
                callers.calls[0].cancel()
        if first == "given":
            callers.calls[0].cancel()
        await callers.turns()
        assert (callers.entered, callers.limiter.used()) == (["submit"], 1)


# --- limits after 429s


async def test_429s_of_calls_that_ran_together_halve_the_limit_once() -> None:
    """Sixteen calls at once halve it once. The next 429 halves it again, and one call may always
    run.
    """
    async with calling(ConcurrencyLimiter(16)) as callers:
        rounds = [await callers.round("confirm", TOO_MANY) for _ in range(7)]
    assert rounds == [16, 8, 4, 2, 1, 1, 1]


async def test_a_429_halves_only_the_limit_of_its_own_kind() -> None:
    """Queries may be too many when submissions are not."""
    limiter = ConcurrencyLimiter(16)
    async with calling(limiter) as callers:
        await callers.round("reconcile", TOO_MANY)
    assert [limiter.kinds[kind].limit for kind in KINDS] == [16, 12, 4, 7]


async def test_successes_restore_the_limit_step_by_step() -> None:
    """A full round of successes adds one place, up to the full limit."""
    limiter = ConcurrencyLimiter(8)
    async with calling(limiter) as callers:
        for _ in range(3):
            await callers.round("confirm", TOO_MANY)
        rounds = [await callers.round("confirm", SUCCESS) for _ in range(9)]
    assert rounds == [1, 2, 3, 4, 5, 6, 7, 8, 8]


async def test_calls_that_started_before_a_429_do_not_change_the_limit_after_it() -> None:
    """Their successes do not restore it, and their 429s do not halve it."""
    limiter = ConcurrencyLimiter(8)
    async with calling(limiter) as callers:
        callers.enter("confirm", times=8)
        await callers.turns()
        callers.finish(TOO_MANY, [0])
        for answer, number in zip([SUCCESS] * 6 + [TOO_MANY], range(1, 8), strict=True):
            callers.finish(answer, [number])
        assert limiter.kinds["confirm"].limit == 4


async def test_running_calls_go_on_when_the_limit_falls() -> None:
    """No new call starts until fewer calls run than the limit allows."""
    async with calling(ConcurrencyLimiter(8)) as callers:
        callers.enter("confirm", times=12)
        await callers.turns()
        for number, running in [(0, 7), (1, 6), (2, 5), (3, 4), (4, 4)]:
            callers.finish(TOO_MANY, [number])
            await callers.turns()
            assert callers.limiter.used() == running


async def test_a_rising_limit_lets_waiting_calls_in() -> None:
    """The success frees one place and adds one, so two calls follow it."""
    async with calling(ConcurrencyLimiter(2)) as callers:
        await callers.round("confirm", TOO_MANY)
        callers.enter("confirm", times=3)
        await callers.turns()
        assert callers.limiter.used() == 1
        callers.finish(SUCCESS)
        await callers.turns()
        assert callers.limiter.used() == 2


async def test_limits_are_reported() -> None:
    """A gauge gets them at the start and at each change."""
    reported: list[tuple[Kind, int]] = []
    limiter = ConcurrencyLimiter(4, lambda kind, limit: reported.append((kind, limit)))
    assert reported == [("confirm", 4), ("submit", 3), ("passthrough", 1), ("reconcile", 4)]
    for answer in (SUCCESS, TOO_MANY, SUCCESS, SUCCESS, Uncertain("x"), SUCCESS):
        async with limiter.slot("submit") as record:
            record(throttled(answer))
    assert reported[4:] == [("submit", 1), ("submit", 2), ("submit", 3)]


def answered(status: int) -> Response:
    return Response(status, {}, b"", duration=0.0)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (NotCreated("429", throttled=True), True),
        (NoAnswer("429", throttled=True), True),
        (answered(429), True),
        *(
            (answer, False)
            for answer in (
                Accepted(Report("x")),
                Refused(400, {}),
                Found(Report()),
                NotFound(),
                answered(200),
                answered(404),
            )
        ),
        *(
            (answer, None)
            for answer in (
                NotCreated("503"),
                NotCreated("401", account=True),
                NoAnswer("502"),
                Uncertain("504"),
                answered(503),
            )
        ),
    ],
)
def test_only_429_counts_as_too_many_calls(answer: Any, verdict: bool | None) -> None:
    """Any other real answer is a success. A missing answer and the upstream's own failure do not
    count.
    """
    assert throttled(answer) is verdict
