"""Named places in every step at which a test may kill or pause the process.

In production a checkpoint does nothing. With `DARKROOM_TEST_KILL=name` or `name:count` the process
kills itself the nth time it reaches the checkpoint. `DARKROOM_TEST_PAUSE` stops it there until
SIGCONT. docs/reliability.md lists the checkpoints.
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

SIGNALS = {"DARKROOM_TEST_KILL": signal.SIGKILL, "DARKROOM_TEST_PAUSE": signal.SIGSTOP}


@dataclass(slots=True)
class Shot:
    signal: int
    left: int  # how often the process still has to reach the checkpoint


def shots(environ: Mapping[str, str]) -> dict[str, Shot]:
    """The armed checkpoints of the environment. ValueError: a count is no number."""
    armed = {}
    for variable, number in SIGNALS.items():
        name, _, count = environ.get(variable, "").partition(":")
        if name:
            armed[name] = Shot(number, int(count or 1))
    return armed


ARMED = shots(os.environ)  # read once, when the process starts


def checkpoint(name: str, armed: Mapping[str, Shot] = ARMED) -> None:
    shot = armed.get(name)
    if shot is not None:
        shot.left -= 1
        if shot.left == 0:
            os.kill(os.getpid(), shot.signal)
