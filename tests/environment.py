"""The environment of processes that tests start."""

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_S, STOP_S = 60, 60


def clean_environment(given: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without Darkroom's settings. PYTHONPATH is the checkout."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("DARKROOM_")
    }
    return {**inherited, "PYTHONPATH": str(ROOT), **given}
