"""Checkpoints: they do nothing in a service, and send a signal to a process that a test armed."""

import os
import signal
import subprocess
import sys

import pytest

from service.queue.checkpoints import ARMED, Shot, checkpoint, shots
from tests.environment import clean_environment


def test_a_process_without_the_variables_is_not_armed() -> None:
    """An empty variable arms nothing either."""
    assert ARMED == {}
    assert shots({"DARKROOM_TEST_KILL": "", "PATH": "/bin"}) == {}
    checkpoint("submit.checked")


def test_the_variables_name_a_checkpoint_and_a_count() -> None:
    """The form is `name` or `name:count`. A count that is no number is an error."""
    given = {"DARKROOM_TEST_KILL": "settle.answered", "DARKROOM_TEST_PAUSE": "download.saved:2"}
    assert shots(given) == {
        "settle.answered": Shot(signal.SIGKILL, 1),
        "download.saved": Shot(signal.SIGSTOP, 2),
    }
    with pytest.raises(ValueError, match="twice"):
        shots({"DARKROOM_TEST_KILL": "settle.answered:twice"})


def test_the_signal_comes_once_when_the_count_is_reached() -> None:
    """The process sends the signal to itself at the nth pass of its checkpoint, and never again."""
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    try:
        armed = {"settle.answered": Shot(signal.SIGUSR1, 2)}
        seen = []
        for name in ("settle.answered", "settle.recorded", "settle.answered", "settle.answered"):
            checkpoint(name, armed)
            seen.append(len(got))
        assert seen == [0, 0, 1, 1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_armed_process_dies_at_its_checkpoint() -> None:
    """A process reads `DARKROOM_TEST_KILL` when it starts."""
    code = (
        "from service.queue.checkpoints import checkpoint; checkpoint('settle.claimed');"
        " print('on'); checkpoint('settle.answered')"
    )
    environment = clean_environment({"DARKROOM_TEST_KILL": "settle.answered"})
    done = subprocess.run(
        [sys.executable, "-uc", code],
        env=environment,
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"on" + os.linesep.encode())
