"""One JSON object a line on standard output, ours and the libraries' alike; `console` is for
people.
"""

import logging
import re
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog

from service import VERSION

QUIET = ("httpx", "httpcore", "aiohttp.access", "asyncio", "alembic", "sqlalchemy.engine", "PIL")

SILENT = (
    "aio_pika",
    "aiokafka",
    "aiormq",
    "faststream",
    "nats",
    "pamqp",
    "redis",
)  # a broker's faults are told by `sink.failed`, once

SECRETS = re.compile(
    r"""(?P<before> /callbacks/[^/\s]+/[^/\s]+/ | https?://[^\s?#'"<>]+\?
        | \b(?i:bearer)\s+ | \b(?:whsec|dk|sk)[_-] )
        [^\s'"<>)]+""",
    re.VERBOSE,
)


def _stamp(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    line["service"] = "darkroom"
    line["version"] = VERSION
    return line


def _library(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A library's sentence becomes a field: `event` is always one of our names."""
    line["message"] = line.pop("event")
    line["event"] = "library.message"
    line["logger"] = line["_record"].name
    return line


def _mask(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Takes what must not be told out of the two fields whose words are others': a sentence, a
    traceback.
    """
    for name in ("message", "exception"):
        if isinstance(line.get(name), str):
            line[name] = SECRETS.sub(r"\g<before>***", line[name])
    return line


class Unbreakable:
    """A stream whose failures stop nothing: a full disk or a reader that left must not cost a task.
    What is lost is counted.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = 0

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self.lost += 1

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def configure(format: str, level: str, stream: TextIO = sys.stdout) -> None:
    """Sets up structlog and the standard library's logging; `format` is `json` or `console`."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _stamp,
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty())
        if format == "console"
        else structlog.processors.JSONRenderer()
    )
    finish: list[Any] = [structlog.processors.ExceptionRenderer(), _mask]
    unbreakable = Unbreakable(stream)
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *finish, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, unbreakable)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(unbreakable)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _library],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *finish,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    for name in QUIET:  # their lines hold addresses with tokens or signed queries
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
