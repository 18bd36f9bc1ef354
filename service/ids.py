"""Ids, the names of stored images, and times as text."""

import base64
import re
from datetime import UTC, datetime

PREFIXES = {
    "task": "task_",
    "image": "img_",
    "event": "evt_",
    "callback": "cb_",
    "endpoint": "ep_",
    "delivery": "dlv_",
    "replay": "rpl_",
    "attempt": "att_",
    "key": "key_",
    "entry": "led_",
    "act": "act_",
    "request": "req_",
    "file": "file_",
}
EXTENSIONS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/avif": "avif",
    "image/bmp": "bmp",
    "image/tiff": "tiff",
}
# An upstream's id becomes part of a URL: visible ASCII, no dot in front, at most 200 characters.
UPSTREAM_ID = r"[!-\-/-~][!-~]{0,199}"
QUARANTINE = "quarantine/"
BLOB = re.compile(
    rf"(?:{QUARANTINE})?(?:task_|task-unified-|file_)[a-z2-7]{{26}}/[0-9]{{1,9}}-[0-9a-f]{{64}}\.[a-z]{{1,8}}",
    re.ASCII,
)


def make_id(kind: str, now: int, random: bytes) -> str:
    """A prefix and 26 lower-case base32 characters of 48 bits of `now` and 80 random bits.

    The time comes first, so that ids of the same time are close in an index. `random` is 10 bytes.
    """
    if len(random) != 10:
        raise ValueError("an id wants 10 random bytes")
    raw = (now % 2**48).to_bytes(6, "big") + random
    return PREFIXES[kind] + base64.b32encode(raw).decode("ascii").rstrip("=").lower()


def rfc3339(ms: int) -> str:
    """`2026-01-31T23:59:59.123Z`."""
    time = datetime.fromtimestamp(ms // 1000, UTC)
    return f"{time.isoformat()[:19]}.{ms % 1000:03d}Z"


def rfc3339_or_none(ms: int | None) -> str | None:
    return None if ms is None else rfc3339(ms)


def sequence_text(sequence: int) -> str:
    """A sequence of the outbox as readers see it: 20 digits, so that text order is number order."""
    return f"{sequence:020d}"


def blob_name(task_id: str, index: int, sha256: str, media_type: str) -> str:
    """The blob of an image. The name is the same after a crash, and tasks share no blob."""
    return f"{task_id}/{index}-{sha256}.{EXTENSIONS[media_type]}"


def quarantine_name(task_id: str, index: int, sha256: str) -> str:
    """The blob of a body that is no image. No link leads to it."""
    return f"{QUARANTINE}{task_id}/{index}-{sha256}.bin"


def task_of_blob(name: str) -> str:
    return name.removeprefix(QUARANTINE).partition("/")[0]
