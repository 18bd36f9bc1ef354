"""The states of a task and the moves between them. docs/concepts.md draws them."""

from collections.abc import Mapping
from enum import StrEnum

from service.upstreams.base import Status


class State(StrEnum):
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
UNPROVED = frozenset({State.QUEUED, State.SUBMITTING, State.UNCERTAIN})
MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.SUBMITTING, State.FAILED, State.CANCELLED}),
    State.SUBMITTING: frozenset(
        {State.SUBMITTED, State.QUEUED, State.UNCERTAIN, State.FAILED, State.CANCELLED}
    ),
    State.UNCERTAIN: frozenset({State.SUBMITTED, State.FAILED, State.CANCELLED, State.SUBMITTING}),
    State.SUBMITTED: frozenset({State.STORING, State.FAILED, State.CANCELLED, State.EXPIRED}),
    State.STORING: frozenset({State.COMPLETED, State.FAILED, State.CANCELLED}),
    **dict.fromkeys(TERMINAL, frozenset()),
}
STATUSES: Mapping[State, Status] = {
    **dict.fromkeys(UNPROVED, Status.PENDING),
    State.SUBMITTED: Status.PENDING,
    State.STORING: Status.PROCESSING,
    State.COMPLETED: Status.COMPLETED,
    State.FAILED: Status.FAILED,
    State.CANCELLED: Status.FAILED,  # with the error `request_cancelled`, as documented
    State.EXPIRED: Status.FAILED,
}


def may_become(before: State, after: State) -> bool:
    return after in MOVES[before]


def status_of(state: State, upstream_status: Status | None) -> Status:
    """The status that the upstream's own clients see."""
    if state is State.SUBMITTED and upstream_status is Status.PROCESSING:
        return Status.PROCESSING
    return STATUSES[state]
