"""The load: `python -m tests.bench.load ADDRESS FILE once|again CONNECTIONS WARM_UP SECONDS GOOD`,
a process of its own on a core of its own.

Each line of FILE is a request, `{"path", "body"}`, perhaps with `"headers"`. With `again`, the load
starts over after the last request. A connection sends its next request when it has the answer to
the previous one. The requests are bytes before the clock starts. The load checks only where an
answer ends, that it is 200 and that it contains GOOD, so that the figures are those of the server.
"""

import asyncio
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import cast

import uvloop

LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
GOOD = '{"status":"accepted"}'


def request_bytes(path: str, body: str, headers: Mapping[str, str] | None = None) -> bytes:
    content = body.encode()
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type:"
        f" application/json\r\ncontent-length: {len(content)}\r\n{more}\r\n"
    )
    return head.encode() + content


class Run:
    """One measurement: the requests still to send, and for each answer its time in seconds from the
    start and its latency.
    """

    def __init__(self, requests: Iterator[bytes], seconds: float, good: str) -> None:
        self.requests = requests
        self.seconds = seconds
        self.good = good.encode()
        self.started = perf_counter()
        self.answered: list[tuple[float, float]] = []
        self.wrong = 0
        self.open = 0
        self.over = asyncio.Event()

    def next(self) -> bytes | None:
        return next(self.requests, None) if perf_counter() - self.started < self.seconds else None


class Connection(asyncio.Protocol):
    """Sends one request after the other."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.buffer = b""
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's have no base class
        self.run.open += 1
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.open -= 1
        if not self.run.open:
            self.run.over.set()

    def send(self) -> None:
        request = self.run.next()
        if request is None:
            self.transport.close()
            return
        self.buffer = b""
        self.sent = perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        length = LENGTH.search(head) if end else None
        if length is None or len(body) < int(length[1]):
            return
        now = perf_counter()
        self.run.answered.append((now - self.run.started, now - self.sent))
        self.run.wrong += not head.startswith(b"HTTP/1.1 200 ") or self.run.good not in body
        self.send()


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank's value."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def load(
    address: str,
    requests: Iterator[bytes],
    connections: int,
    warm_up: float,
    seconds: float,
    good: str,
) -> dict[str, float]:
    """Answers a second, and their p50 and p99 in seconds, measured after `warm_up`. `wrong` counts
    the answers that accepted nothing. `started` is a time of the machine's monotonic clock.
    """
    host, _, port = address.removeprefix("http://").partition(":")
    run = Run(requests, warm_up + seconds, good)
    loop = asyncio.get_running_loop()
    await asyncio.gather(
        *(
            loop.create_connection(lambda: Connection(run), host, int(port))
            for _ in range(connections)
        )
    )
    await run.over.wait()
    took = [took for at, took in run.answered if at >= warm_up]
    rate = len(took) / (run.answered[-1][0] - warm_up)
    return {
        "count": len(run.answered),
        "wrong": run.wrong,
        "started": run.started,
        "rate": rate,
        "p50": percentile(took, 0.5),
        "p99": percentile(took, 0.99),
    }


if __name__ == "__main__":
    address, file, repeat, connections, warm_up, seconds, good = sys.argv[1:]
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    prebuilt = [request_bytes(**line) for line in lines]
    requests = cycle(prebuilt) if repeat == "again" else iter(prebuilt)
    times = float(warm_up), float(seconds)
    print(json.dumps(uvloop.run(load(address, requests, int(connections), *times, good))))
