"""What the lists of the command line show (docs/cli.md)."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from service.cli.list_rows import age
from service.cli.output import flat
from tests.processes import Running, darkroom, started


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("dev")
    with started("serve", "--sandbox", "--json", "--port", "0", folder=folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(dev: Running) -> Mapping[str, str]:
    return {"DARKROOM_URL": dev.address, "DARKROOM_API_KEY": dev.announcement["key"]}


def said(client: Mapping[str, str], *arguments: str) -> str:
    done = darkroom(*arguments, folder=Path(__file__).parent, **client)
    assert done.returncode == 0, done.stderr
    return done.stdout


def document(client: Mapping[str, str], *arguments: str) -> Any:
    return json.loads(said(client, *arguments, "--json"))


def table(client: Mapping[str, str], *arguments: str) -> list[dict[str, str]]:
    """The rows of a table by its columns. Two blanks end a cell."""
    head, *lines = said(client, *arguments).splitlines()
    names = head.split()
    return [dict(zip(names, re.split(" {2,}", line), strict=True)) for line in lines]


@pytest.fixture(scope="module")
def failing(client: Mapping[str, str]) -> str:
    """An endpoint that nothing listens at, with a failed delivery."""
    endpoint = str(document(client, "endpoints", "create", "http://127.0.0.1:9/")["id"])
    document(client, "submit", "a gull", "--wait")

    for delivery in document(client, "deliveries", "list", "--endpoint", endpoint)["data"]:
        document(client, "deliveries", "retry", delivery["id"])
    return endpoint


def test_deliveries_show_type_last_error_and_next_attempt(
    client: Mapping[str, str], failing: str
) -> None:
    rows = table(client, "deliveries", "list", "--endpoint", failing)[-2:]
    assert [row["type"] for row in rows] == ["image.task.completed", "image.task.submitted"]
    for row in rows:
        assert (row["state"], row["endpoint"]) == ("pending", failing)
        assert row["last_error"].startswith("NotConnected")
        assert row["next_attempt"] > row["created_at"]


def test_endpoints_show_success_and_since_when_they_have_their_status(
    client: Mapping[str, str], failing: str
) -> None:
    """A success rate of 0 is shown, and none before the first attempt."""
    unused = document(client, "endpoints", "create", "http://127.0.0.1:9/x", "--type", "*")
    rows = {row["id"]: row for row in table(client, "endpoints", "list")}
    assert rows[failing]["success"] == "0.0%"
    assert rows[unused["id"]]["success"] == "-"
    assert rows[unused["id"]]["since"] == unused["created_at"] == unused["status_since"]
    for status in ("paused", "enabled", "disabled"):
        changed = document(client, "endpoints", "patch", unused["id"], "--status", status)
        assert changed["status_since"] > unused["status_since"]
        (row,) = (row for row in table(client, "endpoints", "list") if row["id"] == unused["id"])
        assert (row["status"], row["since"]) == (status, changed["status_since"])
        unused = changed
    assert document(client, "endpoints", "get", failing)["failing_since"]


def test_tasks_show_cost_and_age(client: Mapping[str, str]) -> None:
    """The cost is in brackets while it is only reserved."""
    delay = ("--set", 'sandbox={"delay": 60}', "--metadata", "list=cost")
    document(client, "submit", "slow", *delay)
    document(client, "submit", "quick", "--metadata", "list=cost", "--wait")
    quick, slow = table(client, "tasks", "--metadata", "list=cost")
    assert (quick["cost"], slow["cost"]) == ("2", "(2)")
    assert re.fullmatch("[0-9]+s", slow["age"])


@pytest.mark.parametrize("act", ["get", "retry"])
def test_attempts_are_a_table(client: Mapping[str, str], failing: str, act: str) -> None:
    delivery = document(client, "deliveries", "list", "--endpoint", failing)["data"][0]
    lines = said(client, "deliveries", act, delivery["id"]).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("time "))
    assert lines[at].split() == ["time", "status", "duration_ms", "error"]
    assert all("NotConnected" in line for line in lines[at + 1 :])
    assert not any(mark in "".join(lines) for mark in "{}[]")


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ({"a": {"b": 1, "c": None}}, [("a.b", "1")]),
        ({"types": ["x", "y"]}, [("types", "x, y")]),
        ({"images": [{"id": "i"}, {"id": "j"}]}, [("images.0.id", "i"), ("images.1.id", "j")]),
        ({"done": True, "empty": [], "none": {}}, [("done", "true")]),
        ({"deep": [[1, 2], [3]]}, [("deep.0", "1, 2"), ("deep.1", "3")]),
    ],
)
def test_nested_values_are_lines_and_no_json(value: object, lines: object) -> None:
    assert list(flat(value)) == lines


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0s"),
        (59.9, "59s"),
        (60, "1m 0s"),
        (3725, "1h 2m"),
        (86_400, "1d 0h"),
        (9e6, "104d 4h"),
    ],
)
def test_an_age_has_two_units(seconds: float, words: str) -> None:
    assert age(seconds) == words
