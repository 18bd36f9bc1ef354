"""One run of Schemathesis, as a process of its own, against a world in this process."""

import asyncio
import re
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.environment import ROOT, clean_environment
from tests.inputs import photo
from tests.world import ADMIN_KEY, World, answering, world

ROLES = ("user", "admin")
CASES = re.compile(r"(\d[\d,]*) generated")


@dataclass(frozen=True, slots=True)
class Run:
    status: int
    cases: int
    text: str


async def fuzzed(
    folder: Path,
    role: str,
    seed: int,
    examples: int,
    starting: asyncio.Lock,
    further: Sequence[str] = (),
    **settings: Any,
) -> Run:
    """`examples`: random cases per operation, beside those of the other phases. Migrations of two
    stores in one process exclude each other: `starting`.
    """

    async def receive(_: Request) -> Response:
        return Response(photo(), media_type="image/png")

    folder.mkdir(parents=True, exist_ok=True)
    receiver = Starlette(routes=[Route("/{path:path}", receive, methods=["GET", "POST"])])
    limits = {"max_endpoints": 10_000, "submit_give_up_s": 5}
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(answering(receiver))
        async with starting:
            here = await stack.enter_async_context(world(folder, **limits | settings))
        key = ADMIN_KEY if role == "admin" else await users_key(here)
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{here.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {key}"),
            *(
                "--seed",
                str(seed),
                "--max-examples",
                str(examples),
                *("--generation-database", "none"),
            ),
            *("--workers", "1", "--continue-on-failure", "--suppress-health-check", "all"),
            *("--request-timeout", "30", "--no-color", "--no-shrink", *further),
        ]
        environment = clean_environment(
            {"SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "DARKROOM_TEST_RECEIVER": url}
        )
        process = await asyncio.create_subprocess_exec(
            *(
                command[0],
                *command[1:3],
                "--config-file",
                str(ROOT / "tests/fuzz/schemathesis.toml"),
            ),
            *command[3:],
            env=environment,
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
    counted = CASES.search(output)
    return Run(process.returncode or 0, int(counted[1].replace(",", "")) if counted else 0, output)


async def users_key(here: World) -> str:
    body = {"owner": "fuzz", "scopes": ["submit", "read", "subscribe"]}
    key: str = (await here.client.post("/v1/keys", json=body)).json()["key"]
    return key
