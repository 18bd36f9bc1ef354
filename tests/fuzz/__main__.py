"""Runs Schemathesis with all checks against a whole world: service, sandbox and receiver.

.venv/bin/python -m tests.fuzz --seed 7 --examples 200
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from service.ops import logging
from tests.fuzz.runs import ROLES, fuzzed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=20, help="random cases per operation")
    parser.add_argument("--as", dest="role", choices=ROLES, action="append")
    given, further = parser.parse_known_args()
    logging.configure("json", "error", sys.stderr)
    status = 0
    for role in given.role or ROLES:
        with tempfile.TemporaryDirectory() as folder:
            run = asyncio.run(fuzzed(Path(folder), role, given.seed, given.examples, further))
            print(run.text)
            print(f"{role}, seed {given.seed}: {run.cases} cases, exit {run.status}")
            status = status or run.status
    return status


if __name__ == "__main__":
    sys.exit(main())
