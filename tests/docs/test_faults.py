"""docs/faults.md holds together with the behaviours that the end-to-end test tries."""

import re
from pathlib import Path

import pytest

from service.ops.metrics import Metrics
from service.settings import Settings
from service.web.event_schemas import EVENT_TYPES
from tests.docs.log_lines import LINES
from tests.e2e.faults import BEHAVIOURS

TEXT = (Path(__file__).parents[2] / "docs" / "faults.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| `")
]
# # a row without a name is an error here
KNOWN = {re.match(r"`(\w+)`: ", row[0])[1]: row for row in ROWS}  # type: ignore[index]


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_each_fault_has_one_row_and_each_row_its_fault() -> None:
    """The table has what is tried, and what is tried is in the table."""
    assert sorted(BEHAVIOURS) == sorted(re.findall(r"^\| `(\w+)`: ", TEXT, re.MULTILINE))
    assert {len(row) for row in ROWS} == {4}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_row_tells_what_the_test_expects(name: str) -> None:
    """State, code and status stand where the application looks, log lines and events where
    operators look.
    """
    expected, (_, _, application, operators) = BEHAVIOURS[name], KNOWN[name]
    assert {expected.state, expected.code} - {None} <= words(application)
    assert re.findall(r"answered (\d+)", application) == [str(expected.status)] * (
        expected.status != 200
    )
    assert set(expected.tells) <= words(operators)
    assert expected.tells


def test_every_name_in_the_table_exists() -> None:
    """Settings, log lines, events and metrics are called what the code calls them."""
    named = {word for row in ROWS for cell in row for word in words(cell)}
    exposed = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in Metrics().registry.collect()
    }
    assert {word for word in named if word.startswith("darkroom_")} <= exposed
    settings = {word.partition("=")[0] for word in re.findall(r"DARKROOM_[A-Z_]+", TEXT)}
    assert settings <= {f"DARKROOM_{name.upper()}" for name in Settings.model_fields}
    assert {word for row in ROWS for word in words(row[3]) if "." in word} <= {*LINES, *EVENT_TYPES}
