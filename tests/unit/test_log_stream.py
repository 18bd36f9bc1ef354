"""The log's stream: a line that cannot be written must never cost a task."""

import io

import structlog

from service.ops.logging import Unbreakable, configure


class Full(io.StringIO):
    """A stream on a full disk, or with a closed reader."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_stream_that_fails_counts_its_lost_lines() -> None:
    """The caller goes on."""
    stream = Unbreakable(Full())
    for _ in range(3):
        stream.write("line\n")
        stream.flush()
    assert stream.lost == 3


def test_logging_goes_on_over_a_broken_stream() -> None:
    """The configured logger raises nothing when standard output is gone."""
    before = structlog.get_config()
    try:
        configure("json", "info", Full())
        structlog.get_logger().info("task.queued", task_id="task_a")
    finally:
        structlog.configure(**before)


def test_a_stream_that_works_gets_every_line() -> None:
    sink = io.StringIO()
    stream = Unbreakable(sink)
    stream.write("one\n")
    stream.flush()
    assert (sink.getvalue(), stream.lost) == ("one\n", 0)
