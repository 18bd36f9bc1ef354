"""An S3 server for tests: moto in a process of its own, so that its clients use real HTTP.

`python -m tests.s3` serves on a free port until its input ends and prints its address on the first
line.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import DEVNULL, PIPE
from uuid import uuid4

import httpx
import pytest

from tests.environment import ROOT, STOP_S


@contextmanager
def s3_running() -> Iterator[str]:
    """The address of a server. The server ends with its input, so also if this process
    is killed.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "COVERAGE_"))
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.s3"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            address = server.stdout.readline().strip()
            assert address, "the S3 server did not start"
            yield address
        finally:
            server.stdin.close()
            server.wait(STOP_S)


def with_bucket(address: str, patch: pytest.MonkeyPatch) -> str:
    """Creates a publicly readable bucket, sets the server in the environment, and returns the
    bucket's name.
    """
    name = f"bucket-{uuid4().hex}"
    allow = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{name}/*",
    }
    policy = {"Version": "2012-10-17", "Statement": [allow]}
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        assert client.put(f"/{name}").status_code == 200
        assert client.put(f"/{name}?policy", json=policy).status_code in (200, 204)
    for variable in [each for each in os.environ if each.startswith("AWS_")]:
        patch.delenv(variable)
    known = {
        "ENDPOINT_URL": address,
        "ACCESS_KEY_ID": "key",
        "SECRET_ACCESS_KEY": "secret",
        "REGION": "us-east-1",
    }
    for variable, value in known.items():
        patch.setenv(f"AWS_{variable}", value)
    return name


def serve() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    serve()
