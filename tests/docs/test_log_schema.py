"""The schema of log lines, and the check of the lines that all tests see."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema_rs
import pytest

from service.ops.logging import SECRETS
from tests import checked_lines, known_secrets
from tests.checked_lines import check_text, finish, found
from tests.docs.log_schema import log_schema
from tests.docs.render import DOCS, log_schema_text
from tests.known_secrets import know, know_settings, watch

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
    "a callback's token alone": "b" * 31 + "z",
    "a key that the tests made": "key-of-this-test-alone",
    "the value of a static header": "shop-7-password",
}
OUTPUT = {
    "a log line": json.dumps({**LINE, "exception": "before {} after"}),
    "a line for people": "12:00:01 error worker.failed exception=before {} after",
    "a traceback": '  File "signing.py", line 1\nValueError: {}',
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


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is noted during a test, which knows secrets of its own."""
    found: list[str] = []
    monkeypatch.setattr(checked_lines, "WRONG", found)
    known: set[str] = set()
    for module in (checked_lines, known_secrets):
        monkeypatch.setattr(module, "KNOWN", known)
    know_settings(
        {"DARKROOM_ADMIN_KEY": TELLING["a key that the tests made"], "HOME": "/root-home"}
    )
    know(json.dumps({"X-Shop-Password": TELLING["the value of a static header"]}))
    return found


@pytest.mark.parametrize("output", OUTPUT)
@pytest.mark.parametrize("name", TELLING)
def test_output_that_tells_a_secret_is_noted(name: str, output: str, noted: list[str]) -> None:
    """In any line of a process. The names of variables and headers are none."""
    check_text("X-Shop-Password /root-home DARKROOM_ADMIN_KEY\n")
    assert noted == []
    check_text(OUTPUT[output].replace("{}", TELLING[name]))
    assert len(noted) == 1


def test_the_file_of_a_process_is_checked_as_it_grows(
    tmp_path: Path, noted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each whole line once, also after the last test, which then fails the run."""
    outputs: dict[str, int] = {}
    for module in (checked_lines, known_secrets):
        monkeypatch.setattr(module, "OUTPUTS", outputs)
    monkeypatch.setattr(checked_lines, "LATE", [])
    secret, file = TELLING["an API key"], tmp_path / "service.log"
    file.write_text(f"one\n{secret[:9]}")
    watch(str(file), str(tmp_path / "gone"))
    assert found() == []
    with file.open("a") as more:
        more.write(f"{secret[9:]}\n")
    session, worker = SimpleNamespace(exitstatus=0), SimpleNamespace(workeroutput={})
    finish(worker, session)
    assert (len(worker.workeroutput["late"]), session.exitstatus, noted) == (1, 0, [])
    checked_lines.LATE.extend(worker.workeroutput["late"])
    finish(SimpleNamespace(), session)
    assert session.exitstatus == 1


@pytest.mark.parametrize("name", list(TELLING)[:5])
def test_a_masked_secret_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SECRETS.sub(r"\g<before>***", f"before {TELLING[name]} after")
    assert seen({**LINE, "exception": text}, monkeypatch) == []
