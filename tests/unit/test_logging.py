"""The form of a log line from the service or from a library (docs/observability.md)."""

import gc
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from service import VERSION
from service.ops.logging import QUIET, configure
from tests.logs import restored

JSON = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _earlier_rubbish() -> None:
    """What earlier tests left is reported now, and not in the lines of a test."""
    gc.collect()


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    with restored():
        yield


def lines_of(stream: io.StringIO) -> list[JSON]:
    text = stream.getvalue()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def configured(level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure("json", level, stream)
    return stream


def broken(message: str) -> None:
    raise ValueError(message)


def test_a_line_is_one_json_object_with_the_common_fields() -> None:
    """They are time, level, name, service and version, beside the given fields. No value is cut."""
    stream = configured()
    structlog.get_logger().info("task.queued", model="m\nn", text="é" * 5000, odd=object)
    (line,) = lines_of(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["timestamp"])
    assert (line["level"], line["event"], line["service"], line["version"]) == (
        "info",
        "task.queued",
        "darkroom",
        VERSION,
    )
    assert (line["model"], line["text"]) == ("m\nn", "é" * 5000)
    assert "object" in line["odd"]


def test_bound_fields_are_in_every_line() -> None:
    """A request or a job binds its ids once. A line's own value wins."""
    stream = configured()
    with structlog.contextvars.bound_contextvars(request_id="req_1", owner="ann"):
        structlog.get_logger().warning("auth.refused", owner="bob")
    structlog.get_logger().warning("auth.refused")
    bound, free = lines_of(stream)
    assert (bound["request_id"], bound["owner"]) == ("req_1", "bob")
    assert "request_id" not in free


@pytest.mark.parametrize(
    ("level", "seen"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
def test_a_level_leaves_out_the_lower_levels(level: str, seen: int) -> None:
    """There are four levels."""
    stream = configured(level)
    log = structlog.get_logger()
    for write in (log.debug, log.info, log.warning, log.error):
        write("task.queued")
    assert [line["level"] for line in lines_of(stream)] == ["debug", "info", "warning", "error"][
        -seen:
    ]


def test_a_librarys_warning_is_a_line_like_any_other() -> None:
    """Its text is a field, and its event is a name of ours. A library's lines below a warning are
    left out, also at the debug level.
    """
    stream = configured("debug")
    library = logging.getLogger("some.library")
    library.debug("detail")
    library.info("chatter")
    library.warning("it took %d s\nand more", 7)
    (line,) = lines_of(stream)
    assert (line["event"], line["level"], line["logger"], line["message"]) == (
        "library.message",
        "warning",
        "some.library",
        "it took 7 s\nand more",
    )
    assert (line["service"], line["version"]) == ("darkroom", VERSION)


def test_libraries_whose_lines_hold_addresses_are_quiet() -> None:
    """Their warnings are left out. Their errors are not."""
    stream = configured("debug")
    for name in QUIET:
        logging.getLogger(name).warning("GET https://x.test/?Signature=s")
        logging.getLogger(name).error("it broke")
    assert [line["logger"] for line in lines_of(stream)] == list(QUIET)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
        ("red\x9b31m", r"red\x9b31m"),
        ("a\r2026-01-01 [info] task.settled", r"a\r2026-01-01 [info] task.settled"),
        ("one\ntwo\tthree\x00\x7f", r"one\ntwo\tthree\x00\x7f"),
        ("png\u202egnp\u2066", r"png\u202egnp\u2066"),
        ("ein Ölbild, 订单 🎨", "ein Ölbild, 订单 🎨"),
    ],
)
def test_the_console_shows_control_characters_escaped(text: str, shown: str) -> None:
    """Text of clients, of the upstream and of libraries never reaches the terminal as a command,
    as a field, in a list or in a traceback.
    """
    stream = io.StringIO()
    configure("console", "info", stream)
    log = structlog.get_logger()
    log.info("task.queued", model=text)
    log.info("some.event", more=[text])
    logging.getLogger("some.library").warning("it said %s", text)
    try:
        broken(text)
    except ValueError:
        log.exception("http.failed")
    written = stream.getvalue()
    assert all(char.isprintable() or char == "\n" for char in written)
    # A value with spaces is quoted, with its backslashes. A traceback keeps its line breaks.
    assert written.replace("\\\\", "\\").count(shown) >= (3 if "\n" in text else 4)


def test_an_exception_is_in_its_line() -> None:
    """A traceback is a field of one line, from the service or from a library."""
    stream = configured()
    for log in (structlog.get_logger(), logging.getLogger("some.library")):
        try:
            broken("by nothing")
        except ValueError:
            log.exception("http.failed")
    ours, theirs = lines_of(stream)
    for line in (ours, theirs):
        assert line["exception"].startswith("Traceback")
        assert line["exception"].endswith("ValueError: by nothing")


@pytest.mark.parametrize(
    ("message", "logged"),
    [
        (
            "POST /callbacks/evolink/task_a/abcdefgh234567 HTTP/1.1",
            "POST /callbacks/evolink/task_a/*** HTTP/1.1",
        ),
        (
            "GET https://f.test/a.png?Expires=1&Signature=s failed",
            "GET https://f.test/a.png?*** failed",
        ),
        ("url='http://127.0.0.1:9/x?token=t'", "url='http://127.0.0.1:9/x?***'"),
        ("Authorization: Bearer dk_abc", "Authorization: Bearer ***"),
        ("key dk_abcdef and whsec_AAAA/+= (sk-123)", "key dk_*** and whsec_*** (sk-***)"),
        ("https://f.test/a.png is fine", "https://f.test/a.png is fine"),
    ],
)
def test_secrets_are_removed_from_library_messages_and_tracebacks(
    message: str, logged: str
) -> None:
    """They are tokens, signed queries and keys."""
    stream = configured()
    logging.getLogger("some.library").warning(message)
    try:
        broken(message)
    except ValueError:
        structlog.get_logger().exception("http.failed")
    library, failed = lines_of(stream)
    assert library["message"] == logged
    assert failed["exception"].endswith(f"ValueError: {logged}")


def test_the_console_format_has_the_same_lines_for_people() -> None:
    """It has no colours where there is no terminal."""
    stream = io.StringIO()
    configure("console", "info", stream)
    structlog.get_logger().info("task.queued", task_id="task_a")
    logging.getLogger("some.library").warning("careful")
    ours, theirs = stream.getvalue().splitlines()
    assert "task.queued" in ours
    assert ours.endswith(" task_a")
    assert "library.message" in theirs
    assert "message=careful" in theirs
    assert "\x1b" not in stream.getvalue()


def test_a_second_configuration_replaces_the_first() -> None:
    """Each line is written once, to the latest stream."""
    first, second = configured(), configured()
    logging.getLogger("some.library").warning("careful")
    assert (len(lines_of(first)), len(lines_of(second))) == (0, 1)


def test_a_log_that_cannot_be_written_raises_nothing() -> None:
    """A full disk or a closed reader costs lines and no task."""
    stream = configured()
    stream.close()
    structlog.get_logger().error("task.parked")
    logging.getLogger("some.library").error("it broke")
    logging.getLogger().handlers[0].flush()
