"""Rules of the model that hold for any input."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from service.credits import MAX_CREDITS, credits_number, millionths
from service.events.documents import type_matches
from service.ids import PREFIXES, make_id, rfc3339, sequence_text
from service.tasks.document import task_document
from service.tasks.rows import TaskRow
from service.tasks.state import TERMINAL, State, may_become, status_of
from service.upstreams.base import Status, outcome_digest

TIMES = st.integers(0, 253_402_300_799_999)  # up to the year 9999
RANDOM = st.binary(min_size=10, max_size=10)
KINDS = st.sampled_from(sorted(PREFIXES))
WORDS = st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,3}", fullmatch=True)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.decimals() | st.text(),
    lambda inner: st.lists(inner, max_size=2),
)


@given(st.lists(st.sampled_from(State), max_size=12))
def test_no_walk_through_the_states_leaves_a_terminal_state(walk: list[State]) -> None:
    state = State.QUEUED
    ended: State | None = None
    for after in walk:
        if may_become(state, after):
            assert ended is None
            state = after
        ended = state if state in TERMINAL else None
    assert status_of(state, None) in set(Status)


@given(KINDS, TIMES, RANDOM)
def test_an_id_names_its_kind_and_nothing_else(kind: str, now: int, random: bytes) -> None:
    """An id is a prefix and 26 characters that need no escaping."""
    made = make_id(kind, now, random)
    rest = made.removeprefix(PREFIXES[kind])
    assert len(rest) == 26
    assert set(rest) <= set("abcdefghijklmnopqrstuvwxyz234567")


@given(TIMES, RANDOM, RANDOM)
def test_different_randomness_makes_different_ids(now: int, one: bytes, other: bytes) -> None:
    """All 80 random bits are kept."""
    assert (make_id("task", now, one) == make_id("task", now, other)) is (one == other)


@given(TIMES)
def test_a_time_is_read_back_to_the_millisecond(ms: int) -> None:
    """Any reader of RFC 3339 can read it."""
    read = datetime.fromisoformat(rfc3339(ms))
    assert (read - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1) == ms


@given(TIMES, TIMES)
def test_the_order_of_times_is_the_order_of_their_text(one: int, other: int) -> None:
    """This holds for sequences too."""
    assert (rfc3339(one) < rfc3339(other)) is (one < other)
    assert (sequence_text(one) < sequence_text(other)) is (one < other)


@given(st.integers(0, 10**9 * 1_000_000))
def test_credits_are_read_back_exactly(value: int) -> None:
    """A JSON reader of the shown number gets the same number of millionths."""
    shown = credits_number(value)
    assert millionths(shown) == value
    assert millionths(json.loads(json.dumps(shown))) == value
    assert millionths(str(Decimal(value) / 1_000_000)) == value


@given(ANYTHING)
def test_no_value_for_credits_raises(value: object) -> None:
    """The result is a number of millionths that a 64-bit integer holds, or None."""
    result = millionths(value)
    assert result is None or 0 <= result <= MAX_CREDITS * 1_000_000 < 2**63


@given(
    *[
        st.tuples(
            st.none() | st.sampled_from(Status),
            st.lists(st.text(), max_size=3),
            st.none() | st.text(),
        )
    ]
    * 2
)
def test_two_outcomes_have_one_digest_only_if_they_are_equal(
    one: tuple[Status | None, list[str], str | None],
    other: tuple[Status | None, list[str], str | None],
) -> None:
    """The digest separates the results unambiguously."""
    assert (outcome_digest(*one) == outcome_digest(*other)) is (one == other)


@given(WORDS, WORDS)
def test_a_pattern_matches_itself_or_the_types_below_it(pattern: str, type: str) -> None:
    """`*` matches every type. A name matches itself. A name with `.*` matches the types that begin
    with its words.
    """
    assert type_matches("*", type)
    assert type_matches(pattern, type) is (pattern == type)
    assert type_matches(f"{pattern}.*", type) is (
        type.split(".")[: pattern.count(".") + 1] == pattern.split(".") and type != pattern
    )
    assert type_matches(f"{pattern}.*", f"{pattern}.{type}")


@given(st.sampled_from(State), st.integers(0, 100), st.booleans(), TIMES)
def test_every_tasks_document_is_json_with_the_same_keys(
    state: State, progress: int, can_cancel: bool, created: int
) -> None:
    """Every key is present in every state."""
    document = task_document(
        TaskRow(
            "task_1", "x", "evolink", "m", state, created, progress=progress, can_cancel=can_cancel
        )
    )
    assert json.loads(json.dumps(document)) == document
    assert set(document) == set(
        task_document(TaskRow("task_2", "y", "evolink", "m", State.QUEUED, 0))
    )
    assert (document["task_info"]["can_cancel"], document["created"]) == (
        can_cancel and state not in TERMINAL,
        created // 1000,
    )
    assert document["progress"] == (100 if state is State.COMPLETED else progress)
