"""Schemathesis finds nothing: every answer is what the OpenAPI document says, for any request."""

import asyncio
from pathlib import Path

import pytest

from tests.fuzz.runs import ROLES, fuzzed

SEED, EXAMPLES, CASES = 1, 2, 3000


@pytest.mark.timeout(180)  # three minutes, on a busy machine too
async def test_any_request_of_any_caller_gets_a_documented_answer(tmp_path: Path) -> None:
    """All checks, stateful ones too, as an ordinary owner and as an admin, each on a service of its
    own. `python -m tests.fuzz` takes other seeds and more cases.
    """
    starting = asyncio.Lock()
    runs = await asyncio.gather(
        *(fuzzed(tmp_path / role, role, SEED, EXAMPLES, starting) for role in ROLES)
    )
    for run in runs:
        assert run.status == 0, run.text
    assert sum(run.cases for run in runs) >= CASES
