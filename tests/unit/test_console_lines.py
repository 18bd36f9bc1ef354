"""The log format `console` on wide and narrow terminals (docs/observability.md)."""

import gc
import io
import re
import time
from collections.abc import Iterator

import pytest
import structlog

from service import VERSION
from service.ops.console_lines import FIELDS, SHOWN
from service.ops.logging import configure
from tests.docs.log_lines import LINES, WHERE_KNOWN
from tests.logs import restored

TASK = "task_agrcpm5etuipcslv4ehjiuc2fa"
STORED = {
    "task_id": TASK,
    "owner": "dev",
    "index": 0,
    "media_type": "image/png",
    "bytes": 61972,
    "width": 1280,
    "height": 1280,
    "sha256": "ea" * 32,
    "duration_ms": 1053,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module", autouse=True)
def _earlier_rubbish() -> None:
    """What earlier tests left is reported now, and not in the lines of a test."""
    gc.collect()


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with restored():
        yield


def written(stream: io.StringIO, event: str = "image.stored", level: str = "info") -> str:
    configure("console", "debug", stream)
    fields = STORED if event == "image.stored" else {"task_id": TASK, "reason": "x" * 200}
    getattr(structlog.get_logger(), level)(event, **fields)
    return stream.getvalue()


def test_a_line_has_the_local_time_the_level_the_event_a_short_id_and_its_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # 14 hours ahead of UTC
    time.tzset()
    try:
        hour = time.localtime().tm_hour
        line = written(io.StringIO())
    finally:
        monkeypatch.undo()
        time.tzset()
    assert line[9:] == (
        "info  image.stored           hjiuc2fa"
        " index=0 media_type=image/png width=1280 height=1280 bytes=61972\n"
    )
    assert int(line[:2]) in (hour, (hour + 1) % 24)
    assert re.match(r"\d\d:\d\d:\d\d ", line)


@pytest.mark.parametrize("columns", [140, 100, 80, 79, 60, 40])
def test_information_is_one_line_of_a_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow terminal cuts fields. The time, the event and the short id stay."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    line = written(Terminal()).removesuffix("\n")
    assert "\n" not in line
    assert len(line) <= columns
    assert "image.stored" in line
    assert "hjiuc2fa" in line


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_warning_is_never_cut(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert "x" * 200 in written(Terminal(), "image.retry", level)


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_no_color_turns_colours_off(
    variables: dict[str, str], *, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in written(Terminal())) is coloured


def test_the_settings_are_not_in_the_line_of_a_start() -> None:
    stream = io.StringIO()
    configure("console", "info", stream)
    structlog.get_logger().info(
        "service.started", role="serve", address="127.0.0.1:1", settings={"host": "h"}
    )
    assert stream.getvalue().endswith(f"role=serve address=127.0.0.1:1 version={VERSION}\n")


@pytest.mark.parametrize("event", sorted(SHOWN))
def test_the_shown_fields_are_documented(event: str) -> None:
    assert len(SHOWN[event]) <= FIELDS
    known = {*re.findall(r"`(\w+)`", LINES[event]), *WHERE_KNOWN, "version"}
    assert set(SHOWN[event]) <= known
