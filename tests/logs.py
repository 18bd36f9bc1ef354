"""Configures logging for a test and restores it afterwards."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from service.ops.logging import QUIET, configure


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


@contextmanager
def logged(level: str = "debug") -> Iterator[io.StringIO]:
    """The log lines of the block as JSON."""
    stream = io.StringIO()
    with restored():
        configure("json", level, stream)
        yield stream
