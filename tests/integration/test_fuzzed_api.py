"""Schemathesis finds nothing: every answer is what the OpenAPI document says, for any request."""

import asyncio
from pathlib import Path

import pytest

from tests.fuzz.runs import ROLES, fuzzed

SEED, EXAMPLES, CASES = 1, 2, 3000
# Their bodies are judged alike for every caller, and they have a third of all cases.
ORDERS = "^/(v1/(images/generations|estimates|files)|api/v1/files)"
FURTHER = {"user": (), "admin": ("--exclude-path-regex", ORDERS)}


@pytest.mark.timeout(180)  # three minutes, on a busy machine too
async def test_any_request_of_any_caller_gets_a_documented_answer(tmp_path: Path) -> None:
    """All checks, stateful ones too, as an ordinary owner and as an admin, each on a service of its
    own. The admin's run leaves the orders to the owner's. `python -m tests.fuzz` takes other seeds
    and more cases, and leaves nothing out.
    """
    starting = asyncio.Lock()
    runs = await asyncio.gather(
        *(fuzzed(tmp_path / role, role, SEED, EXAMPLES, starting, FURTHER[role]) for role in ROLES)
    )
    for run in runs:
        assert run.status == 0, run.text
    assert sum(run.cases for run in runs) >= CASES
