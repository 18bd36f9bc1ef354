"""Compares what a process sends with what the disk is sure to hold at that moment.

- The row of every id that leaves the process is durable.
- The row of a callback is durable before the callback gets 200.
- A submission leaves only after its row durably says that it may have left.
- All bytes of an image are durable before a document, an event or the log's `image.stored` names
  it.
- The key that signs and encrypts is durable.
"""

import hashlib
import json
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.ids import PREFIXES
from tests.api import SUBMIT
from tests.durability.disk import Disk
from tests.durability.trace import Call, Moment
from tests.launcher import LOG

TABLES = {PREFIXES["task"]: "tasks", PREFIXES["event"]: "events", PREFIXES["endpoint"]: "endpoints"}
ID = re.compile(rb"(?<![a-z2-7_])(task_|evt_|ep_)[a-z2-7]{26}(?![a-z2-7])")
PICTURE = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')
ANSWER = re.compile(rb"HTTP/1\.1 200 .*\r\nx-request-id: ([^\r]+)\r\n", re.DOTALL)
SENT = re.compile(
    rb"POST " + SUBMIT.encode() + rb" HTTP/1\.1\r\n.*\r\nidempotency-key: (task_[a-z2-7]{26})\r\n",
    re.DOTALL | re.IGNORECASE,
)
DATABASE, KEY, IMAGES = "data/darkroom.db", "data/secret.key", "data/images/"


@dataclass(slots=True)
class Watch:
    """Reads a trace and updates a disk. `callbacks` has the task's id and the status of each
    callback request in the log, by request.

    `held` counts the promises that the disk held. `broken` names the promises that it did not hold.
    `unsure` has the calls that a kill cut, whose effect is unknown.
    """

    disk: Disk
    callbacks: dict[str, str]
    held: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    unsure: list[Moment] = field(default_factory=list)
    _known: dict[str, set[str]] = field(default_factory=dict)
    _known_at: int = -1

    def observe(self, moments: Iterable[Moment]) -> None:
        for moment in moments:
            if not moment.done and moment.call.data:
                self._heard(moment.call, moment.line)
            if moment.call.cut:
                self.unsure.append(moment)
            else:
                self.disk.observe(moment)

    def _heard(self, call: Call, line: int) -> None:
        if call.path.startswith("socket:"):
            self._told(call.data, line)
        elif call.path.endswith("/" + LOG):
            for said in map(
                json.loads, filter(lambda each: each.startswith(b"{"), call.data.splitlines())
            ):
                if said["event"] == "image.stored":
                    self._judge("stored", said["sha256"], self.stored(said["sha256"]), line)

    def _told(self, data: bytes, line: int) -> None:
        for found in {match[0].decode() for match in ID.finditer(data)}:
            table = TABLES[found.partition("_")[0] + "_"]
            self._judge(table, found, found in self.rows(table), line)
        for sha256 in {match[1].decode() for match in PICTURE.finditer(data)}:
            self._judge("shown", sha256, self.stored(sha256), line)
        if answer := ANSWER.match(data):
            key = self.disk.left(below=KEY).get(KEY, b"")
            self._judge(
                "key",
                "of an answer",
                key != b"" and key == self.disk.left(lambda: True, KEY)[KEY],
                line,
            )
            callback = self.callbacks.get(answer[1].decode())
            if callback is not None:
                self._judge("callbacks", callback, callback in self.rows("callbacks"), line)
        if sent := SENT.match(data):
            self._judge(
                "submissions", sent[1].decode(), sent[1].decode() in self.rows("submitting"), line
            )

    def _judge(self, kind: str, what: str, good: bool, line: int) -> None:
        if good:
            self.held[kind] += 1
        else:
            self.broken.append(f"line {line}: {kind} {what} would be lost")

    def stored(self, sha256: str) -> bool:
        """Whether a row and a file of that image are durable."""
        files = self.disk.left(below=IMAGES)
        whole = any(
            sha256 in name and hashlib.sha256(data).hexdigest() == sha256
            for name, data in files.items()
        )
        return whole and sha256 in self.rows("stored")

    def rows(self, kind: str) -> set[str]:
        """The ids that a power cut would leave in a table. For submissions these are the tasks that
        may have left, and for images the checksums.
        """
        if self._known_at != self.disk.syncs:
            self._known, self._known_at = rows_of(self.disk.left(below=DATABASE)), self.disk.syncs
        return self._known.get(kind, set())


QUERIES = {
    **{table: f"SELECT id FROM {table}" for table in TABLES.values()},
    "callbacks": (
        "SELECT task_id || ' ' || status FROM callbacks UNION ALL"
        " SELECT task_id || ' ' || json_extract(CAST(body AS TEXT), '$.status') FROM inbox"
    ),
    "submitting": "SELECT id FROM tasks WHERE state <> 'queued'",
    "stored": "SELECT sha256 FROM images WHERE state = 'stored'",
}


def rows_of(files: dict[str, bytes]) -> dict[str, set[str]]:
    """Reads the store's files with SQLite. Returns nothing if SQLite cannot open them."""
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            (Path(folder) / Path(path).name).write_bytes(content)
        with closing(sqlite3.connect(Path(folder) / Path(DATABASE).name)) as connection:
            try:
                return {
                    name: {row[0] for row in connection.execute(query)}
                    for name, query in QUERIES.items()
                }
            except sqlite3.DatabaseError:
                return {}


def callbacks_of(log: str) -> dict[str, str]:
    """The callbacks in a service's log at the level debug, by request. Their ids connect the line
    of the request with the line of the verdict.
    """
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    said = {
        line["callback_id"]: f"{line['task_id']} {line['status']}"
        for line in lines
        if line["event"] == "callback.received"
    }
    return {
        line["request_id"]: said[line["callback_id"]]
        for line in lines
        if line["event"] == "http.request"
        and is_answered_callback(line)
        and line["callback_id"] in said
    }


def is_answered_callback(line: dict[str, Any]) -> bool:
    return line["status"] == 200 and str(line["route"]).startswith("/callbacks/")
