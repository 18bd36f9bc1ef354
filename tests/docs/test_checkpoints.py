"""The table of kills and the code hold together."""

import ast
from pathlib import Path

import service
from tests.checkpoints import CHECKPOINTS, INPUT_CHECKPOINTS


def test_every_checkpoint_of_the_table_is_passed_at_one_place_of_the_code() -> None:
    """`checkpoint("name")` stands once for each row, and there is a row for each."""
    trees = [
        ast.parse(path.read_text("utf-8")) for path in Path(service.__file__).parent.rglob("*.py")
    ]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    passed = [
        ast.literal_eval(call.args[0])
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "checkpoint"
    ]
    assert sorted(passed) == sorted([*CHECKPOINTS, *INPUT_CHECKPOINTS])
