"""Runs Schemathesis with all checks against a whole world: service, sandbox and receiver.

.venv/bin/python -m tests.fuzz --seed 7 --examples 200
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from service.ops import logging
from tests.fuzz.runs import ROLES, Run, fuzzed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=20, help="random cases per operation")
    parser.add_argument("--as", dest="role", choices=ROLES, action="append")
    given, further = parser.parse_known_args()
    logging.configure("json", "error", sys.stderr)
    roles = given.role or ROLES

    async def run(folder: str) -> list[Run]:
        starting = asyncio.Lock()
        return await asyncio.gather(
            *(
                fuzzed(Path(folder) / role, role, given.seed, given.examples, starting, further)
                for role in roles
            )
        )

    with tempfile.TemporaryDirectory() as folder:
        runs = asyncio.run(run(folder))
    for role, each in zip(roles, runs, strict=True):
        print(each.text)
        print(f"{role}, seed {given.seed}: {each.cases} cases, exit {each.status}")
    return max(each.status for each in runs)


if __name__ == "__main__":
    sys.exit(main())
