"""The log format `console`: one line per event, for people at a terminal.

A line has the local time, the level, the event, the end of the task's id, and up to five fields.
"""

import os
import sys
from collections.abc import Iterator, MutableMapping
from datetime import datetime
from typing import Any, TextIO

FIELDS = 5
SHORT_ID = 8  # characters at the end of an id, which are random
WIDE = 80  # from here on the event and the id have columns
EVENT_WIDTH = 22

# The fields that an event's line shows, if the first five are not the important ones.
SHOWN = {
    "service.started": ("role", "address", "version"),
    "http.request": ("method", "route", "status", "duration_ms", "owner"),
    "http.failed": ("method", "route", "request_id"),
    "auth.refused": ("reason", "hint", "request_id"),
    "admin.action": ("action", "subject", "owner"),
    "upstream.called": ("kind", "outcome", "status", "duration_ms"),
    # The only line with the whole id of the task, which commands take. 80 columns have room for it.
    "task.queued": ("task_id", "replayed", "model", "owner", "prompt"),
    "task.submitted": ("state", "attempt", "estimated_time"),
    "ledger.entered": ("kind", "credits", "source", "entry_id"),
    "image.stored": ("index", "media_type", "width", "height", "bytes"),
    "image.retry": ("index", "reason", "attempt", "wait_s"),
    "image.lost": ("index", "reason", "attempt"),
    "delivery.attempted": ("result", "status", "error", "wait_s", "endpoint_id"),
    "delivery.exhausted": ("attempt", "endpoint_id", "delivery_id"),
    "endpoint.disabled": ("reason", "endpoint_id"),
    "library.message": ("logger", "message"),
}
# Fields of other events that are never shown: they are in the line already, or in its JSON form.
HIDDEN = {
    *("timestamp", "level", "event", "service", "version", "task_id", "exception"),
    *("request_id", "owner", "upstream_id", "callback_id", "event_id", "delivery_id"),
    *("endpoint_id", "trace_id", "image_id"),
}
LEVELS = {"warning": "warn", "critical": "error"}
COLOURS = {"debug": "2", "info": "32", "warn": "33", "error": "1;31"}


class ConsoleLine:
    """Renders a line for a stream. A terminal gets colours, unless NO_COLOR is set. Lines of the
    level `info` are cut at its width. Warnings and errors never are.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._colours = stream.isatty() and not plain

    def __call__(self, _: Any, __: str, line: MutableMapping[str, Any]) -> str:
        width = self._width()
        level = LEVELS.get(line["level"], line["level"])
        time = datetime.fromisoformat(line["timestamp"]).astimezone().strftime("%H:%M:%S")
        event, task = str(line["event"]), str(line.get("task_id") or "")
        task = task.rpartition("_")[2][-SHORT_ID:]
        columns = width is None or width >= WIDE
        if columns:
            cells = [time, f"{level:<5}", f"{event:<{EVENT_WIDTH}}", f"{task:<{SHORT_ID}}"]
        else:
            cells = [cell for cell in (time, level, event, task) if cell]
        used = len(" ".join(cells))
        fields = " ".join(shown_fields(line))
        if width is not None and level in ("info", "debug"):
            fields = clipped(fields, width - used - 1)
        for index, colour in ((0, "2"), (1, COLOURS[level]), (2, "1"), (3, "36")):
            if index < len(cells):
                cells[index] = self._coloured(cells[index], colour)
        text = " ".join([*cells, fields]).rstrip()
        trace = line.get("exception")
        return f"{text}\n{trace}" if trace else text

    def _coloured(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours else text

    def _width(self) -> int | None:
        """The columns of the terminal, as it is now. None: nothing is cut."""
        if not self._stream.isatty():
            return None
        columns = os.environ.get("COLUMNS", "")
        if columns.isdecimal() and int(columns) > 0:
            return int(columns)
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or None
        except (OSError, ValueError):
            return None


def shown_fields(line: MutableMapping[str, Any]) -> Iterator[str]:
    """`name=value` for the fields that matter. Empty and false ones are left out."""
    own = [name for name in line if name not in HIDDEN and name not in ("settings", "sha256")]
    names = SHOWN.get(line["event"], own)
    given = [
        name
        for name in names
        if (value := line.get(name)) not in (None, "", [], {}) and value is not False
    ]
    for name in given[:FIELDS]:
        text = str(line[name])
        if name == "task_id":
            yield text
            continue
        yield f'{name}="{text}"' if " " in text else f"{name}={text}"


def clipped(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    # A terminal with a narrow character set has no ellipsis.
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    mark = "…" if unicode else "~"
    return text[: width - 1] + mark if width > 0 else ""
