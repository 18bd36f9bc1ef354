"""Divides the compiling of a fresh checkout among the workers of a run.

Each worker collects all tests. On a fresh checkout each of them would compile every file and
rewrite its assertions, which takes half a minute of a processor. With this module each worker first
does its share and then finds the files of the others.
"""

import compileall
import os
import sys

import pytest
from _pytest.assertion import rewrite

from tests.environment import ROOT


def compile_share(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or sys.dont_write_bytecode or config.option.assertmode != "rewrite":
        return
    number, workers = int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    state = config.stash[rewrite.assertstate_key]
    paths = [*sorted((ROOT / "service").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
    for path in paths[number::workers]:
        if not path.name.startswith("test_"):
            compileall.compile_file(path, quiet=1)
            continue
        cached = rewrite.get_cache_dir(path) / (path.stem + rewrite.PYC_TAIL)
        if rewrite._read_pyc(path, cached) is None:
            rewrite.try_makedirs(cached.parent)
            source, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(state, code, source, cached)
