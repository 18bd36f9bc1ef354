"""The JSON Schema of log lines, made from the table of their names and fields."""

import re
from collections.abc import Mapping
from typing import Any

from tests.docs.log_lines import ALWAYS, LINES, WHERE_KNOWN

JSON = dict[str, Any]
BOUND = ("image_id", "replay_id")  # of the row that a worker holds, in every line of its work
TEXT: JSON = {"type": ["string", "null"]}
COUNT: JSON = {"type": ["integer", "null"]}
NUMBER: JSON = {"type": ["number", "null"]}
FLAG: JSON = {"type": "boolean"}
COUNTS = (
    *("attempt", "busy", "bytes", "callbacks", "count", "deliveries", "estimated_time", "events"),
    *("files", "free_bytes", "height", "images", "index", "limit_bytes", "refused", "removed"),
    *("results", "seen", "tasks", "unfinished", "waiting", "width", "withheld"),
)
NUMBERS = ("credits", "left", "limit", "needed", "reserved", "seconds", "spent")
SPECIAL: Mapping[str, JSON] = {
    "timestamp": {"type": "string", "format": "date-time"},
    "level": {"enum": ["debug", "info", "warning", "error", "critical"]},
    "service": {"const": "darkroom"},
    "version": {"type": "string"},
    "status": {"type": ["string", "integer", "null"]},
    "account": FLAG,
    "kept": FLAG,
    "replayed": FLAG,
    "settings": {"type": "object"},
    "detail": {},
    "session": {"type": ["string", "integer", "null"]},
}


def field(name: str) -> JSON:
    if name in SPECIAL:
        return SPECIAL[name]
    if name in COUNTS:
        return COUNT
    return NUMBER if name in NUMBERS or name.endswith(("_s", "_ms")) else TEXT


def line_schema(event: str) -> JSON:
    """A line with this name: the fields that it may have, and those that it always has."""
    own = re.findall(r"`([a-z_0-9]+)`", LINES[event])
    names = [*ALWAYS, *WHERE_KNOWN, *BOUND, *own]
    return {
        "title": event,
        "type": "object",
        "required": list(ALWAYS),
        "properties": {name: field(name) for name in dict.fromkeys(names)}
        | {"event": {"const": event}},
        "additionalProperties": False,
    }


def log_schema() -> JSON:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A log line of Darkroom",
        "description": "One JSON object per line. `event` names it.",
        "oneOf": [line_schema(event) for event in LINES],
    }
