"""A client of tool servers over standard input and output: JSON-RPC messages, one on each line."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JSON = dict[str, Any]
PROTOCOL = "2025-06-18"
LONGEST_LINE = 1 << 20
CALL_S = 60


class ToolFailed(Exception):
    """The text of a tool that reports a failure, or the message of an error response."""


@dataclass(slots=True)
class ToolServer:
    """A running server. Calls may overlap: the id of a response names its request."""

    process: asyncio.subprocess.Process
    asked: dict[int, asyncio.Future[JSON]] = field(default_factory=dict)

    async def call(self, tool: str, **arguments: Any) -> str:
        """The text of a tool's result. ToolFailed if the tool did not succeed."""
        result = await self.request("tools/call", {"name": tool, "arguments": arguments})
        text = "\n".join(part["text"] for part in result["content"])
        if result.get("isError"):
            raise ToolFailed(text)
        return text

    async def request(self, method: str, params: JSON) -> JSON:
        number = len(self.asked)
        self.asked[number] = asyncio.get_running_loop().create_future()
        self.send({"id": number, "method": method, "params": params})
        async with asyncio.timeout(CALL_S):
            response = await self.asked[number]
        if "error" in response:
            raise ToolFailed(response["error"]["message"])
        result: JSON = response["result"]
        return result

    def send(self, message: JSON) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            message = json.loads(line)
            if "id" in message and "method" not in message:
                self.asked[message["id"]].set_result(message)


@asynccontextmanager
async def tool_server(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> AsyncIterator[ToolServer]:
    """A started server after its handshake. Its error stream goes to the file `faults`."""
    with (folder / "faults").open("ab") as faults:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=faults,
            limit=LONGEST_LINE,
        )
    server = ToolServer(process)
    reading = asyncio.create_task(server.read())
    try:
        caller = {"name": "tests", "version": "1"}
        hello = {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": caller}
        await server.request("initialize", hello)
        server.send({"method": "notifications/initialized"})
        yield server
    finally:
        process.kill()
        await process.wait()
        await reading
