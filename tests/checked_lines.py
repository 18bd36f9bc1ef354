"""Checks what the tests see of the service's output: that no line tells a secret, and each log line
against `docs/log.schema.json`.

A test fails after its end if a service of it, in this process or in another one, wrote such a line.
A line that comes after the last test fails the run.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs

from tests.docs.log_lines import LINES
from tests.docs.log_schema import line_schema
from tests.known_secrets import KNOWN, OUTPUTS, PART, SHOWING

# By form: API keys, webhook secrets, callback tokens and signed queries.
SECRETS = re.compile(
    r"whsec_[A-Za-z0-9+/=]{24}|\bdk_[A-Za-z0-9_-]{20}|whsk_|[?&](?:X-Amz-)?Signature=[^*\"]"
    r"|/callbacks/[a-z]+/task_[a-z2-7]{26}/[a-z2-7]{32}|(?i:bearer) [A-Za-z0-9._-]{12}"
)
# A line without any of these has none of them.
SIGNS = ("whs", "dk_", "ignature=", "/callbacks/", "earer ")
TOKEN = re.compile(r"[a-z2-7]*[g-z][a-z2-7]*")  # of a callback, if it has 32 characters
# A service on a sandbox tells its address and its key.
ANNOUNCED = re.compile(r'\{.*"address":|[a-z]+ {3,}.*dk_')
WRONG: list[str] = []
LATE: list[str] = []  # found after the last test
VALID: set[tuple[Any, ...]] = set()


def check_text(text: str) -> None:
    """Notes what is wrong with output of a process, line by line."""
    for line in text.splitlines():
        check_line(line)


def check_line(line: str) -> None:
    ours = line.startswith('{"') and '"service":' in line
    if not ours and ANNOUNCED.match(line):
        return
    if secret := secret_in(line):
        WRONG.append(f"a secret, {secret[:12]}…: {line[:1000]}")
    if not ours:
        return
    try:
        said = json.loads(line)
    except ValueError:  # cut off by a kill
        return
    if said.get("service") != "darkroom":
        return
    # The schema speaks of names and types alone, so that lines of one form are checked once.
    form = (said.get("event"), said.get("level"), *((key, type(said[key])) for key in said))
    if form not in VALID:
        if problem := problem_of(said):
            WRONG.append(f"{problem}: {line[:1000]}")
        else:
            VALID.add(form)


def secret_in(line: str) -> str | None:
    if any(sign in line for sign in SIGNS) and (told := SECRETS.search(line)):
        return str(told[0])
    parts: list[str] = PART.findall(line)
    if not KNOWN.isdisjoint(parts):
        return next(part for part in parts if part in KNOWN)
    return next((part for part in parts if len(part) == 32 and TOKEN.fullmatch(part)), None)


def problem_of(line: dict[str, Any]) -> str | None:
    if line.get("event") not in LINES:
        return "a name that the table does not have"
    validator = jsonschema_rs.validator_for(line_schema(line["event"]))
    error = next(validator.iter_errors(line), None)
    return None if error is None else str(error.message)[:300]


def check_command(arguments: Sequence[str], out: str, err: str) -> None:
    """The output of a command that has ended."""
    check_text(f"{out}\n{err}" if SHOWING.isdisjoint(arguments) else err)


def check_files() -> None:
    """Checks what processes have written since the last time, in whole lines."""
    for file, checked in list(OUTPUTS.items()):
        if not Path(file).is_file():
            del OUTPUTS[file]
            continue
        with Path(file).open("rb") as opened:
            opened.seek(checked)
            more = opened.read()
        whole = more[: more.rfind(b"\n") + 1]
        OUTPUTS[file] = checked + len(whole)
        check_text(whole.decode("utf-8", "replace"))


def found() -> list[str]:
    """What was found since this was last asked."""
    check_files()
    wrong, WRONG[:] = WRONG[:], []
    return wrong


def finish(config: Any, session: Any) -> None:
    """What came after the last test fails the run. With several processes, the one that reports
    hears it from the others.
    """
    if (output := getattr(config, "workeroutput", None)) is not None:
        output["late"] = found()
    else:
        LATE.extend(found())
    if LATE:
        session.exitstatus = 1


class CheckedOutput:
    """The standard output of the moment, for lines that are checked on their way."""

    def write(self, text: str) -> int:
        check_line(text)
        return sys.stdout.write(text)

    def flush(self) -> None:
        sys.stdout.flush()
