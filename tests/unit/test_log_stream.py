"""The log's stream: a line that cannot be written must never cost a task."""

import io
import logging

import structlog

from service.ops.logging import configure


class Full(io.StringIO):
    """A stream on a full disk, or with a closed reader."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_logging_goes_on_over_a_broken_stream() -> None:
    """The configured logger raises nothing when standard output is gone."""
    before = structlog.get_config()
    try:
        configure("json", "info", Full())
        structlog.get_logger().info("task.queued", task_id="task_a")
        logging.getLogger("library").error("the same of a library")
    finally:
        structlog.configure(**before)
