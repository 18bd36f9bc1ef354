"""A burst of callbacks from a process of its own: `python -m tests.overload ADDRESS FILE CONNECTIONS`.

Each line of FILE is a request, `{"path", "body"}`. They are shared out over the connections, which all begin at once; a connection sends
its next one when it has the answer to the last. The time of the first includes that of connecting, as the upstream's patience does.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import uvloop

from service.signing import Keyring
from service.web.server import allow_descriptors
from tests.bench.acknowledgement import SECRET_KEY


def callback(task_id: str) -> dict[str, str]:
    """One that says that a task of `tests.bench.acknowledgement.prepare` has failed."""
    token = Keyring([SECRET_KEY.encode()]).callback_token("evolink", task_id)
    error = {"code": "service_error", "message": "no", "type": "task_error"}
    body = {"id": f"upstream-{task_id}", "status": "failed", "error": error}
    return {"path": f"/callbacks/evolink/{task_id}/{token}", "body": json.dumps(body)}


def request_bytes(path: str, body: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: burst\r\ncontent-length: {len(body.encode())}\r\n\r\n{body}".encode()


async def send(address: tuple[str, int], requests: Sequence[bytes], seen: Counter[str], took: list[float]) -> None:
    began, left = perf_counter(), list(reversed(requests))
    try:
        reader, writer = await asyncio.open_connection(*address)
        while left:
            writer.write(left.pop())
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            took.append(perf_counter() - began)
            seen[f"{head.split()[1].decode()} {body.decode() if head.startswith(b'HTTP/1.1 200') else ''}".strip()] += 1
            began = perf_counter()
        writer.close()
    except (OSError, EOFError) as error:
        seen[type(error).__name__] += 1 + len(left)


async def burst(host: str, port: int, requests: Sequence[bytes], connections: int) -> dict[str, Any]:
    """What was answered how often, and how long it took in seconds."""
    seen, took = Counter[str](), list[float]()
    began = perf_counter()
    await asyncio.gather(*(send((host, port), requests[number::connections], seen, took) for number in range(connections)))
    whole = perf_counter() - began
    took.sort()
    p50, p99 = (took[int(share * (len(took) - 1))] for share in (0.5, 0.99))
    return {"seen": dict(seen), "p50": p50, "p99": p99, "max": took[-1], "seconds": whole, "rate": len(took) / whole}


if __name__ == "__main__":
    address, file, connections = sys.argv[1:]
    allow_descriptors()
    host, _, port = address.removeprefix("http://").partition(":")
    prebuilt = [request_bytes(**json.loads(line)) for line in Path(file).read_text().splitlines()]
    print(json.dumps(uvloop.run(burst(host, int(port), prebuilt, int(connections)))))
