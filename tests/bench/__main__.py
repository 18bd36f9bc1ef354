"""`make bench`: the service's cost compared with a bare route, and the time until a subscriber has
an event. The figures are those of one machine and no goal.

Everything runs on loopback, with the measured process on the first core and the measuring ones on
the last. The store is SQLite on the disk of `--folder`, with its usual durability.
"""

from dataclasses import replace
from pathlib import Path

from tests.bench.acknowledgement import FULL, QUICK, acknowledgement
from tests.bench.delivery import delivery
from tests.bench.program import run


def tables(folder: Path, rounds: int, quick: bool) -> str:
    scale = QUICK if quick else replace(FULL, rounds=rounds)
    warm_up, seconds = (0, 1) if quick else (3, 30)
    acknowledged = acknowledgement(folder, scale)
    return f"{acknowledged}\n\n{delivery(folder / 'delivery', 10, warm_up, seconds, rounds)}"


if __name__ == "__main__":
    run("make bench", "bench", tables)
