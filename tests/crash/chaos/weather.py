"""Draws the orders' faults and the acts against the processes from the seed of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from service.queue.leases import LEASE_MS
from service.upstreams.sandbox.effects import UNUSABLE

Faults = dict[str, Any]
LONG = 0.1  # the share of pauses that outlast a lease, in a run that is long enough
LONG_S = LEASE_MS / 1000 + 3


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of a run. Orders and acts are spread over `seconds`. The run then has `patience`
    seconds to finish undisturbed.
    """

    tasks: int
    kills: int
    restarts: int
    seconds: float
    patience: float = 1800  # a task whose callback is lost may wait 15 minutes for its fifth query


@dataclass(frozen=True, slots=True, order=True)
class Act:
    """One act: its start `at` and its duration `lasts` in seconds. `choice`, from 0 to 1, selects
    its target or variant.
    """

    at: float
    what: str
    lasts: float
    choice: float


# Each fault strikes its share of the orders. Most orders have no fault, and some have several.
TROUBLES: tuple[tuple[float, Callable[[Random], Faults]], ...] = (
    (0.50, lambda chance: {"delay": round(chance.uniform(0, 3), 2)}),
    (0.10, lambda chance: {"repeat_callback": chance.randint(2, 5)}),
    (0.05, lambda _: {"drop_callback": True}),
    (0.03, lambda chance: {"slow_callback": chance.choice([0.5, 2])}),
    (0.04, lambda _: {"callback_first": True}),
    (0.03, lambda _: {"contradict": True}),
    (0.03, lambda _: {"garbage_callback": True}),
    (
        0.05,
        lambda chance: {
            "submit_status": {"status": 429, "times": chance.randint(1, 2), "retry_after": 1}
        },
    ),
    (0.03, lambda _: {"submit_status": {"status": 503, "times": 1}}),
    (
        0.01,
        lambda chance: {
            "submit_status": {"status": chance.choice([500, 502, 524]), "html": True, "times": 1}
        },
    ),
    (0.01, lambda _: {"lose_submission": 1}),
    (0.02, lambda _: {"lose_answer": True}),
    (0.02, lambda _: {"submit_cut": 20}),
    (
        0.02,
        lambda chance: {"submit_delay": chance.choice([1, 5])},
    ),  # the second is a timeout after the task was created
    (
        0.04,
        lambda chance: {
            "query_status": chance.choice([404, 429, 500]),
            "query_times": chance.randint(1, 2),
        },
    ),
    (0.02, lambda _: {"query_delay": 5, "query_times": 1}),
    (
        0.04,
        lambda chance: {
            "file_status": chance.choice([403, 404, 500]),
            "file_times": chance.randint(1, 2),
        },
    ),
    (0.03, lambda _: {"file_cut": 2000, "file_times": 1}),
    (0.03, lambda chance: {"file_stall": chance.choice([1, 3]), "file_times": 1}),
    (0.03, lambda chance: {"fail": chance.choice(["content_policy_violation", "service_error"])}),
    (0.10, lambda chance: {"format": chance.choice(["png", "webp"])}),
    (0.10, lambda chance: {"unusable_field": chance.choice([*UNUSABLE])}),
    (0.10, lambda chance: {"results": chance.choice(["padded", "text", "objects"])}),
    # A cost that differs from the estimate and from the reservation, and a refund.
    (
        0.10,
        lambda chance: {
            "reserved": chance.choice([0.4, 2, 10]),
            "usage": chance.choice([0, 0.4, 2, 7.25]),
        },
    ),
    (0.10, lambda chance: {"refund": chance.choice([0.15, 2])}),
    (0.05, lambda _: {"images": 1}),
    # Last, so that `query_times` ends it.
    (0.10, lambda chance: {"results_late": True, "query_times": chance.randint(1, 2)}),
)


def faults(chance: Random) -> Faults:
    """Of one order."""
    drawn: Faults = {"format": "jpeg"}
    for share, trouble in TROUBLES:
        if chance.random() < share:
            drawn |= trouble(chance)
    return drawn


def acts(scale: Scale, store: str, chance: Random) -> list[Act]:
    """Returns the acts in the order of time."""
    away = max(1, round(scale.seconds / 30))
    counts: Mapping[str, int] = {
        "kill": scale.kills,
        "pause": max(1, scale.kills // 4),
        "restart": scale.restarts if store == "postgres" else 0,
        "refuse": away,
        "freeze": away,
        "unsubscribe": away,
    }
    longest = {
        "kill": 0.5,
        "pause": 3.0,
        "restart": 0.0,
        "refuse": 3.0,
        "freeze": 4.0,
        "unsubscribe": 4.0,
    }
    return sorted(
        Act(
            chance.uniform(0, scale.seconds),
            what,
            lasting(what, longest[what], scale, chance),
            chance.random(),
        )
        for what, count in counts.items()
        for _ in range(count)
    )


def lasting(what: str, longest: float, scale: Scale, chance: Random) -> float:
    if what == "pause" and scale.seconds > 2 * LONG_S and chance.random() < LONG:
        return LONG_S
    return chance.uniform(0, longest)
