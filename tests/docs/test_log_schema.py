"""The schema of log lines, and the check of the lines that all tests see."""

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from service.ops.logging import SECRETS
from tests import checked_lines
from tests.docs.log_schema import log_schema
from tests.docs.render import DOCS, log_schema_text

LINE: dict[str, Any] = {
    "timestamp": "2026-01-31T23:59:59.123456Z",
    "level": "info",
    "event": "task.confirmed",
    "service": "darkroom",
    "version": "1.0.0",
    "task_id": "task_a",
    "status": "completed",
    "results": 2,
}
LACKING = {key: value for key, value in LINE.items() if key != "level"}
WRONG: dict[str, dict[str, Any]] = {
    "an unknown name": {**LINE, "event": "task.undone"},
    "an unknown field": {**LINE, "color": "red"},
    "a field of another line": {**LINE, "verdict": "accepted"},
    "a wrong type": {**LINE, "results": "two"},
    "an unknown level": {**LINE, "level": "trace"},
    "a missing field": LACKING,
}
# Made here, so that no scanner takes them for real ones.
TELLING = {
    "a webhook secret": "whsec_" + "A1b2" * 8,
    "an API key": "dk_" + "a1B2" * 8,
    "a callback's token": f"/callbacks/evolink/task_{'a' * 26}/{'b' * 32}",
    "a signed query": "https://x.test/a.png?Signature=abc",
    "a header": "Bearer " + "a1B2" * 8,
    "a key of the tests": "admin-key-of-the-tests",
}


def test_the_published_schema_is_made_from_the_table() -> None:
    assert Path(DOCS / "log.schema.json").read_text("utf-8") == log_schema_text()
    jsonschema_rs.validator_for(log_schema())


def seen(line: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(checked_lines, "WRONG", found)
    checked_lines.check_text("not a line\n" + json.dumps(line) + "\n")
    return found


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_noted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the published schema, and by the check of every test."""
    published = jsonschema_rs.validator_for(log_schema())
    assert published.is_valid(LINE)
    assert seen(LINE, monkeypatch) == []
    assert not published.is_valid(WRONG[name])
    assert len(seen(WRONG[name], monkeypatch)) == 1


@pytest.mark.parametrize("name", TELLING)
def test_a_line_that_tells_a_secret_is_noted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {**LINE, "exception": f"before {TELLING[name]} after"}
    assert len(seen(line, monkeypatch)) == 1


@pytest.mark.parametrize("name", list(TELLING)[:5])
def test_a_masked_secret_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SECRETS.sub(r"\g<before>***", f"before {TELLING[name]} after")
    assert seen({**LINE, "exception": text}, monkeypatch) == []
