"""Named places in every stage at which a test may kill the process, each with the effect of a kill.

The table of docs/reliability.md and the crash tests are made from this. In production a checkpoint
does nothing. With `DARKROOM_TEST_KILL=name` or `name:count` the process kills itself the nth time
it reaches the checkpoint. `DARKROOM_TEST_PAUSE` stops it there until SIGCONT.
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

CHECKPOINTS: Mapping[str, str] = {
    "submit.checked": (
        "The client gets no response and nothing is stored. The client submits again and"
        " gets a new task."
    ),
    "submit.inserted": (
        "The client gets no response, but the task goes on. The same `Idempotency-Key` returns it."
    ),
    "submission.claimed": "Nothing was sent. The next worker sends the submission.",
    "submission.started": (
        "Nothing was sent, but the store cannot tell. The task is `uncertain`, is not sent"
        " again, and fails with `submission_uncertain`."
    ),
    "submission.answered": (
        "The upstream's response is lost. The task is `uncertain` and is not sent again. The"
        " callback proves it, and the task goes on."
    ),
    "submission.recorded": (
        "The submission is not sent again. The task goes on with its callback or a query."
    ),
    "account.held": (
        "The waiting submissions become due after their wait. Any living worker tries them."
    ),
    "account.restored": "The waiting submissions become due after their wait.",
    "inbox.received": (
        "The upstream gets no 200 and sends the callback again. If it stops, a query finds"
        " the outcome."
    ),
    "inbox.committed": (
        "The upstream gets no 200 and sends the callback again, which is a `duplicate`. The"
        " first one settles the task."
    ),
    "settle.claimed": "The next worker queries the upstream.",
    "settle.answered": (
        "The next worker queries the upstream again. A query is free and changes nothing."
    ),
    "settle.recorded": "The downloads or the terminal event are committed and go on.",
    "download.fetched": (
        "The next worker downloads the image again. A later start removes the temporary file."
    ),
    "download.saved": (
        "The next worker downloads the image again and finds it stored under the same name."
    ),
    "download.recorded": (
        "The stored image stays. The other images are downloaded. The terminal event,"
        " committed with the last image, is delivered."
    ),
    "delivery.claimed": "The next worker sends the event.",
    "delivery.answered": "The next worker sends the event again under the same `webhook-id`.",
    "delivery.recorded": "The event is not sent again.",
    "erase.committed": (
        "The task's content is gone from every response. The sweep removes the image files"
        " within about a day."
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
