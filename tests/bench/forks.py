"""Runs a benchmark in the process of a test. Its servers are forks of the launcher, which start in
a tenth of the time. `test_the_benchmark_of_memory_runs` starts everything as a user does.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from tests.bench import processes
from tests.bench.peers import contenders
from tests.environment import ROOT, STOP_S
from tests.launcher import Forked, shared_launcher
from tests.logs import restored

MODULE = "runpy.run_module({!r}, run_name='__main__', alter_sys=True); raise SystemExit"


class Fork(Forked):
    """A process of `python -m MODULE ARGUMENTS`, whose output goes to a file."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        stdout: IO[bytes],
        stderr: int,
        start_new_session: bool = False,
    ) -> None:
        module, *arguments = command[2:]
        lines = ["import os, runpy"]
        if start_new_session:
            lines.append("os.setsid()")
        if module != "service":
            lines.append(MODULE.format(module))
        launcher = shared_launcher(coverage=True)
        files = stdout.name, stdout.name
        pid = launcher.start(arguments, cwd, env, *files, "\n".join(lines))
        os.sched_setaffinity(pid, os.sched_getaffinity(0))
        super().__init__(launcher, pid)

    def wait(self, timeout: float = STOP_S) -> int:
        return super().wait(timeout)


def popen(command: Sequence[str], **how: Any) -> "Fork | subprocess.Popen[bytes]":
    """Forks the command, or starts it anew if it has LD_PRELOAD, which a fork would ignore."""
    return subprocess.Popen(command, **how) if "LD_PRELOAD" in how["env"] else Fork(command, **how)


def printed(capsys: pytest.CaptureFixture[str], module: str, *arguments: str) -> str:
    """What this benchmark prints with these arguments."""
    forking = SimpleNamespace(**vars(subprocess) | {"Popen": popen})
    path = ROOT.joinpath(*module.split("."))
    program = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, restored():
        for each in (processes, contenders):
            patch.setattr(each, "subprocess", forking)
        patch.setattr(sys, "argv", [str(program), *arguments])
        runpy.run_path(str(program), run_name="__main__")
    return capsys.readouterr().out
