"""The states of a task and the moves between them."""

from collections.abc import Mapping
from enum import StrEnum

from service.upstreams.base import Status


class State(StrEnum):
    """Where a task is (contract section 3)."""

    QUEUED = "queued"
    SUBMITTING = "submitting"
    UNCERTAIN = "uncertain"
    SUBMITTED = "submitted"
    STORING = "storing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED, State.EXPIRED})


MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.SUBMITTING, State.FAILED, State.CANCELLED}),
    State.SUBMITTING: frozenset(
        {State.SUBMITTED, State.QUEUED, State.UNCERTAIN, State.FAILED, State.CANCELLED}
    ),
    State.UNCERTAIN: frozenset({State.SUBMITTED, State.FAILED, State.CANCELLED, State.SUBMITTING}),
    State.SUBMITTED: frozenset({State.STORING, State.FAILED, State.CANCELLED, State.EXPIRED}),
    State.STORING: frozenset({State.COMPLETED, State.FAILED, State.CANCELLED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.EXPIRED: frozenset(),
}


def may_become(before: State, after: State) -> bool:
    """Whether the contract's table of states allows the move."""
    return after in MOVES[before]


def status_of(state: State, upstream_status: Status | None) -> Status:
    """What the upstream's own clients are shown for a state of ours."""
    if state is State.SUBMITTED:
        return Status.PROCESSING if upstream_status is Status.PROCESSING else Status.PENDING
    return {
        State.QUEUED: Status.PENDING,
        State.SUBMITTING: Status.PENDING,
        State.UNCERTAIN: Status.PENDING,
        State.STORING: Status.PROCESSING,
        State.COMPLETED: Status.COMPLETED,
        State.FAILED: Status.FAILED,
        State.CANCELLED: Status.CANCELLED,
        State.EXPIRED: Status.FAILED,
    }[state]
