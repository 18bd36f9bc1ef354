"""Drawings of a task's timeline and state machine, and the difference of two callbacks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from service.strict_json import JSON
from service.tasks.state import MOVES, State

LANES = ("Task", "Upstream", "Callbacks", "Images", "Deliveries")
LANE_OF = {"upstream": 1, "callback": 2, "image": 3, "event": 4, "delivery": 4}
LEFT, WIDTH, LANE, FOLD, LEAST = 92, 900, 30, 44, 4
LONG_MS = 2000  # a wait from here on is folded
BAD = ("fail", "unreadable", "conflict", "lost", "refused", "uncertain", "expired", "dead")
ABSENT = "–"
# Centres of the states in a drawing of 640 by 230.
PLACES: Mapping[State, tuple[int, int]] = {
    State.QUEUED: (60, 40),
    State.SUBMITTING: (190, 40),
    State.SUBMITTED: (320, 40),
    State.STORING: (450, 40),
    State.COMPLETED: (580, 40),
    State.UNCERTAIN: (190, 115),
    State.EXPIRED: (450, 115),
    State.FAILED: (320, 190),
    State.CANCELLED: (190, 190),
}
PATH = (State.QUEUED, State.SUBMITTING, State.SUBMITTED, State.STORING, State.COMPLETED)


def offsets(steps: Sequence[JSON]) -> list[int]:
    """Milliseconds from the first step."""
    times = [datetime.fromisoformat(step["time"]) for step in steps]
    return [round((time - times[0]).total_seconds() * 1000) for time in times]


def timeline_drawing(steps: Sequence[JSON]) -> JSON:
    """Marks in lanes, with the time to scale. A wait of at least `LONG_MS` has a fixed width."""
    times = offsets(steps)
    waits = [max(0, later - time) for time, later in pairwise(times)]
    folded = sum(wait >= LONG_MS for wait in waits)
    short = sum(wait for wait in waits if wait < LONG_MS)
    room = max(200, WIDTH - 40 - folded * FOLD - LEAST * len(waits))
    scale = room / max(short, 1)
    x, marks, folds = float(LEFT + 16), [], []
    for number, step in enumerate(steps):
        if number:
            wait = waits[number - 1]
            if wait >= LONG_MS:
                folds.append({"x": round(x + FOLD / 2, 1), "seconds": wait / 1000})
            x += FOLD if wait >= LONG_MS else LEAST + wait * scale
        lane = LANE_OF.get(step["step"].partition(".")[0], 0)
        bad = bool(step.get("error")) or any(word in json.dumps(step) for word in BAD)
        kind = "bad" if bad else "good"
        y = lane * LANE + LANE // 2
        marks.append({"x": round(x, 1), "y": y, "kind": kind, "number": number, "step": step})
    height, wide = len(LANES) * LANE, max(LEFT + WIDTH, round(x) + 16)
    lanes = [(name, number * LANE + LANE // 2) for number, name in enumerate(LANES)]
    return {"marks": marks, "folds": folds, "lanes": lanes, "width": wide, "height": height}


def state_drawing(state: str) -> JSON:
    """The states, the way of a task that meets no fault, and the moves from the present state."""
    present = State(state)
    nodes = [{"name": each.value, "x": x, "y": y} for each, (x, y) in PLACES.items()]
    usual = [edge(a, b) for a, b in pairwise(PATH)]
    following = sorted(each.value for each in MOVES[present])
    moves = [edge(present, State(each)) for each in following]
    return {"nodes": nodes, "usual": usual, "moves": moves, "next": following, "state": state}


def edge(start: State, end: State) -> tuple[float, float, float, float]:
    """A line between the borders of two boxes."""
    (x1, y1), (x2, y2) = PLACES[start], PLACES[end]
    if y1 == y2:
        side = 48 if x2 > x1 else -48
        return x1 + side, y1, x2 - side, y2
    down = 15 if y2 > y1 else -15
    return x1, y1 + down, x2, y2 - down


def difference(first: str | None, second: str | None) -> list[tuple[str, str, str]]:
    """The fields in which two JSON bodies differ: path, and both values."""
    try:
        one, two = dict(leaves(json.loads(first or ""))), dict(leaves(json.loads(second or "")))
    except (ValueError, RecursionError):
        return []
    paths = dict.fromkeys([*one, *two])
    return [
        (path, one.get(path, ABSENT), two.get(path, ABSENT))
        for path in paths
        if one.get(path) != two.get(path)
    ][:100]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{number}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False)[:500]
