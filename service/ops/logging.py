"""Log lines: one JSON object a line on standard output, also for libraries. The format `console` is
for people.
"""

import json
import logging
import re
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog

from service import VERSION
from service.ops.console_lines import ConsoleLine

# Their lines below an error hold addresses with tokens or signed queries.
QUIET = ("httpx", "httpcore", "aiohttp.access", "asyncio", "alembic", "sqlalchemy.engine", "PIL")
# `sink.failed` reports a broker's faults, once.
SILENT = ("aio_pika", "aiokafka", "aiormq", "faststream", "nats", "pamqp", "redis")

SECRETS = re.compile(
    r"""(?P<before> /callbacks/[^/\s]+/[^/\s]+/ | https?://[^\s?#'"<>]+\?
        | \b(?i:bearer)\s+ | \b(?:whsec|dk|sk)[_-] )
        [^\s'"<>)]+""",
    re.VERBOSE,
)


def _add_version(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    line["service"] = "darkroom"
    line["version"] = VERSION
    return line


def _name_library(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Makes a library's sentence a field. `event` is always a name of ours."""
    line["message"] = line.pop("event")
    line["event"] = "library.message"
    line["logger"] = line["_record"].name
    return line


def _mask(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Masks secrets in the two fields with words of libraries: sentences and tracebacks."""
    for name in ("message", "exception"):
        if isinstance(line.get(name), str):
            line[name] = SECRETS.sub(r"\g<before>***", line[name])
    return line


def _escape(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escapes control characters, which a terminal would obey. The renderer escapes what is no
    text, and a traceback keeps its lines.
    """
    for name, value in line.items():
        if isinstance(value, str):
            lines = value.split("\n") if name == "exception" else [value]
            line[name] = "\n".join(map(printable, lines))
    return line


def printable(text: str) -> str:
    """The text with `\\x1b` and the like in the place of every character that does not print."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class Unbreakable:
    """A stream without failures: a full disk or a closed pipe must not fail a task."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def configure(format: str, level: str, stream: TextIO = sys.stdout) -> None:
    """Sets up structlog and the standard library's logging. `format` is `json` or `console`."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_version,
    ]
    # One encoder for all lines: to make one takes longer than to use it.
    encode = json.JSONEncoder(default=repr).encode
    form: list[Any] = [lambda _, __, line: encode(line)]
    if format == "console":
        form = [_escape, ConsoleLine(stream)]
    finish: list[Any] = [structlog.processors.ExceptionRenderer(), _mask, *form]
    unbreakable = Unbreakable(stream)
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *finish],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, unbreakable)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(unbreakable)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _name_library],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finish],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    for names, least in ((QUIET, logging.ERROR), (SILENT, logging.CRITICAL)):
        for name in names:
            logging.getLogger(name).setLevel(least)
