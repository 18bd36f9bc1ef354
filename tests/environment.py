"""The environment of processes that tests start."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.known_secrets import know_settings

ROOT = Path(__file__).parents[1]
START_S, STOP_S = 90, 90


def clean_environment(given: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without Darkroom's settings. PYTHONPATH is the checkout. From now
    on no output may have the secrets that are given.
    """
    know_settings(given)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("DARKROOM_")
    }
    return {**inherited, "PYTHONPATH": str(ROOT), **given}


def run_module(module: str, *arguments: str, limit_s: float) -> "subprocess.CompletedProcess[str]":
    """Runs a module of the tests as a program of its own until it ends."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
