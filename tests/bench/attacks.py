"""Measures what an attack costs the callbacks of others: `python -m tests.bench.attacks`.

A service is attacked, and a calm one runs beside it. A process sends one callback after the other
to them in turns. The time in which a service waited for a processor does not count, because the
attackers share the cores with it.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tests.attack.attacks import ATTACKS, attacked_and_calm
from tests.bench.program import compared, markdown, run


async def measured(
    folder: Path, rounds: int, names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """For each attack, the milliseconds of the slowest hundredth of callbacks: of the service under
    attack, and of the calm one.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    async with attacked_and_calm(folder) as (under, pulse):
        for _ in range(rounds):
            for name in names:
                async with ATTACKS[name](under):
                    attacked, calm = await pulse.p99()
                    found[name].append((attacked, calm))
    return found


def attacks(folder: Path, rounds: int, quick: bool) -> str:
    found = asyncio.run(measured(folder, rounds, ["slow bodies"] if quick else list(ATTACKS)))
    rows = [(name, *compared(times)) for name, times in found.items()]
    return markdown(("p99 of a callback, ms", "under attack", "in peace", "factor"), rows)


if __name__ == "__main__":
    run("python -m tests.bench.attacks", "attacks", attacks)
