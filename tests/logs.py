"""Logging set up for a test, and put back as it was."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from service.ops.logging import QUIET, configure


@contextmanager
def restored() -> Iterator[None]:
    """Whatever is configured within ends with it."""
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
    """What is logged meanwhile, as JSON lines."""
    stream = io.StringIO()
    with restored():
        configure("json", level, stream)
        yield stream
