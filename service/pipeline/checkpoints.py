"""Where a process may die: named places in every stage, each with what comes of a death there.

The README's table and the crash tests are made from this. In the service a checkpoint does nothing;
a test that starts a process with `DARKROOM_TEST_KILL=name` or `name:count` has it kill itself the
nth time it gets there (`DARKROOM_TEST_PAUSE`: stop until SIGCONT).
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

CHECKPOINTS: Mapping[str, str] = {
    "submit.checked": (
        "The client gets no answer and nothing is kept: it submits again, and a new task is made."
    ),
    "submit.inserted": (
        "The client gets no answer, but the task goes on; the same"
        " `Idempotency-Key` is answered with it."
    ),
    "submission.claimed": "Nothing was sent: the next worker sends it.",
    "submission.started": (
        "Nothing was sent, but nobody can know: `uncertain`, not sent again,"
        " then failed `submission_uncertain`."
    ),
    "submission.answered": (
        "The answer is lost: `uncertain`, not sent again; the callback proves"
        " the task, and it goes on."
    ),
    "submission.recorded": "Not sent again; the task goes on with its callback or a query.",
    "account.held": (
        "What waits for the account is due by itself after its wait, and is tried by whoever lives."
    ),
    "account.restored": "The same: what waits is due by itself.",
    "inbox.received": (
        "The upstream gets no 200 and sends the callback again; else a query finds the end."
    ),
    "inbox.committed": (
        "The upstream gets no 200 and sends the callback again: `duplicate`. The"
        " first one is settled."
    ),
    "settle.claimed": "The upstream is asked by the next worker.",
    "settle.answered": "The upstream is asked again: a query is free and changes nothing.",
    "settle.recorded": (
        "What the answer led to, downloads or the terminal event, is in the store and goes on."
    ),
    "download.fetched": (
        "The picture is fetched again; the temporary file is removed at a later start."
    ),
    "download.saved": "The picture is fetched again, and is found under its name.",
    "download.recorded": (
        "What is stored stays; other pictures are fetched, or the terminal event,"
        " committed with the last, is delivered."
    ),
    "delivery.claimed": "The event is sent by the next worker.",
    "delivery.answered": "The event is sent again under the same `webhook-id`.",
    "delivery.recorded": "Not sent again.",
    "erase.committed": (
        "Nothing shows the task's content any more; the sweep removes the pictures'"
        " files within a day or so."
    ),
}
SIGNALS = {"DARKROOM_TEST_KILL": signal.SIGKILL, "DARKROOM_TEST_PAUSE": signal.SIGSTOP}


@dataclass(slots=True)
class Shot:
    signal: int
    left: int  # how often its checkpoint is still to be reached


def shots(environ: Mapping[str, str]) -> dict[str, Shot]:
    """What the environment asks for, by checkpoint; ValueError: a count that is no number."""
    found = {}
    for variable, number in SIGNALS.items():
        name, _, count = environ.get(variable, "").partition(":")
        if name:
            found[name] = Shot(number, int(count or 1))
    return found


ARMED = shots(os.environ)  # when the process starts, and never later


def checkpoint(name: str, armed: Mapping[str, Shot] = ARMED) -> None:
    shot = armed.get(name)
    if shot is not None:
        shot.left -= 1
        if shot.left == 0:
            os.kill(os.getpid(), shot.signal)


def markdown() -> str:
    """The README's table."""
    return "\n".join(
        [
            "| killed here | what happens |",
            "|---|---|",
            *(f"| `{name}` | {says} |" for name, says in CHECKPOINTS.items()),
        ]
    )
