"""Which test runs the commands of the documentation.

tests/e2e/test_documented_commands.py runs the commands of the pages in `RUN_BY_STORIES`, in the
order of the page. `RUN_ELSEWHERE` lists the exceptions, each with the test that runs it or the
reason why no test can.
"""

from collections.abc import Mapping
from types import MappingProxyType

RUN_BY_STORIES = (
    "README.md",
    "docs/backup.md",
    "docs/deploy.md",  # in tests/e2e/test_ten_minutes.py
    "docs/consuming.md",
    "docs/editing.md",
    "docs/operations.md",
    "docs/sandbox.md",
)
RUN_BY_TYPED_CLIENTS = ("docs/clients.md",)  # in tests/consumers/test_typed_clients.py
# The set-ups need root, Docker and a package index. tests/crash/test_restarts.py runs the units and
# the HAProxy configuration without them. CONTRIBUTING.md needs a package index too.
NOT_RUN = ("deploy/README.md", "CONTRIBUTING.md")
SETS_UP = "this set-up is what runs the tests"
IS_THE_SUITE = "this is the suite itself"
CATALOGUE = "tests/integration/test_cli.py"
BENCHMARKS = "tests/bench/test_bench.py"

RUN_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "make setup": SETS_UP,
        "make demo": "tests/e2e/test_demo.py",
        "make dev": "tests/integration/test_cli.py",
        "make test": IS_THE_SUITE,
        "make bench": BENCHMARKS,
        "make bench-peers": BENCHMARKS,
        "make chaos": "tests/crash/test_chaos.py",
        ".venv/bin/python -m tests.bench.attacks": BENCHMARKS,
        ".venv/bin/python -m tests.bench.deliveries": BENCHMARKS,
        ".venv/bin/python -m tests.bench.downloads": BENCHMARKS,
        ".venv/bin/python -m tests.bench.growth": "tests/integration/test_growth.py",
        ".venv/bin/python -m tests.bench.memory": BENCHMARKS,
        ".venv/bin/python -m tests.bench.scaling --write": BENCHMARKS,
        ".venv/bin/python -m tests.bench.silent_endpoints": BENCHMARKS,
        ".venv/bin/python -m tests.bench.submissions": BENCHMARKS,
        "darkroom estimate wan2.5-text-to-image --n 3": CATALOGUE,
        "darkroom estimate mj-v7 --field model_params.speed=turbo": CATALOGUE,
        "darkroom submit 'a lighthouse in the fog' --n 2 --wait": CATALOGUE,
        "darkroom usage": CATALOGUE,
        "darkroom keys create --owner shop --scopes submit,read --budget 50/day": CATALOGUE,
        "darkroom budgets set shop 100/month": CATALOGUE,
        "darkroom budgets list": CATALOGUE,
        "darkroom budgets clear shop": CATALOGUE,
        "darkroom usage --by model --from 2026-02-01": CATALOGUE,
        ".venv/bin/python -m pytest tests/crash": IS_THE_SUITE,
    }
)
