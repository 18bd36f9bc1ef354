"""The bare loop beside Darkroom's deliveries: `python -m tests.bench.posts FILE AT_ONCE`, a process
of its own. It posts each body, so many at once, and neither signs nor stores anything.

Each line of FILE is a request, `{"url", "id", "body"}`. The requests are bytes before the first one
leaves. An answer other than 204 ends the process with an error.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import uvloop

Request = tuple[str, dict[str, str], bytes]  # URL, headers, body


async def post_all(requests: Sequence[Request], at_once: int) -> None:
    waiting = iter(requests)

    async def post(session: aiohttp.ClientSession) -> None:
        for url, headers, body in waiting:
            async with session.post(url, headers=headers, data=body) as answer:
                await answer.read()
                if answer.status != 204:
                    raise SystemExit(f"{url} answered {answer.status}")

    connector = aiohttp.TCPConnector(limit=at_once)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(post(session) for _ in range(at_once)))


if __name__ == "__main__":
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    kind = "application/cloudevents+json"
    prebuilt = [
        (each["url"], {"content-type": kind, "webhook-id": each["id"]}, each["body"].encode())
        for each in lines
    ]
    uvloop.run(post_all(prebuilt, int(sys.argv[2])))
