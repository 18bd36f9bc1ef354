"""Checks every log line that the tests see: its schema, and that it tells no secret.

A test fails after its end if a service of it, in this process or in another one, wrote a line that
`docs/log.schema.json` does not allow, or a secret.
"""

import json
import re
import sys
from typing import Any

import jsonschema_rs

from tests.docs.log_lines import LINES
from tests.docs.log_schema import line_schema

# By form: API keys, webhook secrets, callback tokens and signed queries. By name: the keys of the
# tests' settings.
SECRETS = re.compile(
    r"whsec_[A-Za-z0-9+/=]{24}|\bdk_[A-Za-z0-9_-]{20}|whsk_|[?&](?:X-Amz-)?Signature=[^*\"]"
    r"|/callbacks/[a-z]+/task_[a-z2-7]{26}/[a-z2-7]{32}|(?i:bearer) [A-Za-z0-9._-]{12}"
    r"|test-admin-key-0123456789|admin-key-of-the-tests|sk-upstream|upstream-key-of-the-test"
)
WRONG: list[str] = []


# A line without any of these has none of them.
SIGNS = ("whs", "dk_", "ignature=", "/callbacks/", "earer ", "key-0", "key-of-the-test", "sk-up")
VALID: set[tuple[Any, ...]] = set()


def check_text(text: str) -> None:
    """Notes what is wrong with output of a process, line by line."""
    for line in text.splitlines():
        check_line(line)


def check_line(line: str) -> None:
    if not line.startswith('{"') or '"service":' not in line:
        return
    if any(sign in line for sign in SIGNS) and (found := SECRETS.search(line)):
        WRONG.append(f"a secret, {found[0][:12]}…: {line[:1000]}")
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


def problem_of(line: dict[str, Any]) -> str | None:
    if line.get("event") not in LINES:
        return "a name that the table does not have"
    validator = jsonschema_rs.validator_for(line_schema(line["event"]))
    error = next(validator.iter_errors(line), None)
    return None if error is None else str(error.message)[:300]


class CheckedOutput:
    """The standard output of the moment, for lines that are checked on their way."""

    def write(self, text: str) -> int:
        check_line(text)
        return sys.stdout.write(text)

    def flush(self) -> None:
        sys.stdout.flush()
