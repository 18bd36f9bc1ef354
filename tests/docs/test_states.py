"""docs/concepts.md draws the state machine that the code has."""

import re

from service.tasks.state import MOVES, State, status_of
from service.upstreams.base import Status
from tests.docs.render import DOCS

TEXT = (DOCS / "concepts.md").read_text("utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (.*) \| (.*) \|$", re.MULTILINE)


def test_the_drawing_has_every_move_of_a_task() -> None:
    """Each arrow between two states is an allowed move, and each allowed move is drawn."""
    arrows = re.findall(r"^ +(\w+) --> (\w+)", TEXT, re.MULTILINE)
    assert sorted(arrows) == sorted(
        (before.value, after.value) for before, moves in MOVES.items() for after in moves
    )


def test_the_table_of_states_is_what_the_code_has() -> None:
    """The moves of each state, and the `status` that clients of the upstream see for it."""
    rows = {name: (moves, shown) for name, moves, shown in ROW.findall(TEXT)}
    assert rows.keys() == {state.value for state in State}
    for state in State:
        moves, shown = (set(re.findall(r"`([a-z]+)`", cell)) for cell in rows[state.value])
        assert moves == {after.value for after in MOVES[state]}
        assert shown == {status_of(state, status).value for status in (None, *Status)}
