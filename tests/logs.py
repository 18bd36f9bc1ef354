"""Configures logging for a test and restores it afterwards."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from service.ops.logging import QUIET, configure
from tests.checked_lines import check_line


@contextmanager
def restored() -> Iterator[None]:
    """Restores the logging configuration at the end of the block."""
    known, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in QUIET}
    try:
        yield
    finally:
        structlog.configure(**known)
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)


class CheckedText(io.StringIO):
    """Text whose lines are checked as they come."""

    def write(self, text: str) -> int:
        check_line(text)
        return super().write(text)


@contextmanager
def logged(level: str = "debug") -> Iterator[io.StringIO]:
    """The log lines of the block as JSON."""
    stream = CheckedText()
    with restored():
        configure("json", level, stream)
        yield stream
