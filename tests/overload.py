"""Sends a burst of callbacks from a process of its own, as the upstream does: `python -m
tests.overload ADDRESS FILE CONNECTIONS PATIENCE`. It prints a line when it begins, and one with the
results.

Each line of FILE is a request, `{"path", "body"}`. All connections start at once and share the
requests. A connection sends its next request when it has the answer to the last one. A request
without a 200 within PATIENCE seconds is sent again on a new connection, after 1, 2 and 4 s. The
time of an attempt includes the connect. The client uses bare sockets and epoll, because a client
that costs more than the service would measure itself.
"""

import json
import os
import select
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path
from time import perf_counter
from typing import Any

from service.signing import Keyring
from service.web.server import allow_descriptors
from tests.attack.pulse import queued
from tests.bench.acknowledgement import SECRET_KEY
from tests.bench.load import request_bytes

AGAIN_S = (1.0, 2.0, 4.0)


def callback(task_id: str) -> dict[str, str]:
    """A callback that reports the failure of a task of `tests.bench.acknowledgement.prepare`."""
    token = Keyring([SECRET_KEY.encode()]).callback_token("evolink", task_id)
    error = {"code": "service_error", "message": "no", "type": "task_error"}
    body = {"id": f"upstream-{task_id}", "status": "failed", "error": error}
    return {"path": f"/callbacks/evolink/{task_id}/{token}", "body": json.dumps(body)}


class Connection:
    """Sends its requests one after the other. `tries` counts the attempts of the current request,
    and `began` is the start of the current attempt.
    """

    def __init__(self, requests: list[bytes], tries: int = 0) -> None:
        self.requests, self.tries = requests, tries
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.began, self.got = perf_counter(), b""

    def answer(self) -> str | None:
        """The whole answer, or None while a part is missing."""
        self.got += self.socket.recv(65536)
        head, end, body = self.got.partition(b"\r\n\r\n")
        if not end:
            return None if self.got else "ended"
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        if len(body) < length:
            return None
        self.got = b""
        status = head.split()[1].decode()
        return f"{status} {body.decode()}" if status == "200" else status


class Burst:
    """All connections. `seen` counts the results of attempts, `took` has the seconds of answered
    attempts, and `lost` counts requests that failed four times.
    """

    def __init__(self, address: tuple[str, int], patience_s: float) -> None:
        self.address, self.patience_s, self.poll = address, patience_s, select.epoll()
        self.open: dict[int, Connection] = {}
        self.seen, self.took, self.lost = Counter[str](), list[float](), 0
        self.due: list[tuple[float, int, list[bytes], int]] = []  # requests to send again

    def begin(self, requests: list[bytes], tries: int = 0) -> None:
        connection = Connection(requests, tries)
        self.open[connection.socket.fileno()] = connection
        connection.socket.connect_ex(self.address)
        self.poll.register(connection.socket, select.EPOLLOUT)

    def end(self, connection: Connection) -> None:
        del self.open[connection.socket.fileno()]
        connection.socket.close()

    def met(self, connection: Connection, what: str) -> None:
        """Records the result of an attempt and starts what follows."""
        self.seen[what] += 1
        if what[0].isdigit():
            self.took.append(perf_counter() - connection.began)
        if what.startswith("200") and len(connection.requests) > 1:
            connection.requests.pop()
            connection.began, connection.tries = perf_counter(), 0
            self.poll.modify(connection.socket, select.EPOLLOUT)
            return
        self.end(connection)
        if what.startswith("200"):
            return
        if connection.tries == len(AGAIN_S):
            self.lost += 1
            connection.requests.pop()
            if connection.requests:
                self.begin(connection.requests)
        else:
            at, tries = perf_counter() + AGAIN_S[connection.tries], connection.tries + 1
            heappush(self.due, (at, id(connection), connection.requests, tries))

    def happened(self, connection: Connection, event: int) -> None:
        try:
            if event & select.EPOLLOUT:
                connection.socket.send(connection.requests[-1])
                self.poll.modify(connection.socket, select.EPOLLIN)
            elif (what := connection.answer()) is not None:
                self.met(connection, what)
        except OSError as error:
            self.met(connection, type(error).__name__)

    def turn(self) -> None:
        for number, event in self.poll.poll(0.05):
            self.happened(self.open[number], event)
        now = perf_counter()
        while self.due and self.due[0][0] <= now:
            _, _, requests, tries = heappop(self.due)
            self.begin(requests, tries)

    def run(self, shares: Iterator[list[bytes]]) -> dict[str, Any]:
        began = looked = perf_counter()
        for number, share in enumerate(shares):
            self.begin(share)
            if number % 100 == 99:
                self.turn()
        while self.open or self.due:
            self.turn()
            if perf_counter() - looked > 0.1:
                looked = perf_counter()
                for connection in list(self.open.values()):
                    if looked - connection.began > self.patience_s:
                        self.met(connection, "timeout")
        return self.told(perf_counter() - began)

    def told(self, whole: float) -> dict[str, Any]:
        self.took.sort()
        p50, p99 = (self.took[int(share * (len(self.took) - 1))] for share in (0.5, 0.99))
        answered = sum(count for what, count in self.seen.items() if what.startswith("200"))
        figures = {"p50": p50, "p99": p99, "max": self.took[-1], "seconds": whole}
        figures["starved"] = starved(os.getpid())
        return {"seen": dict(self.seen), "lost": self.lost, "rate": answered / whole, **figures}


def starved(pid: int) -> float:
    """Seconds that the threads of a process have waited for a processor."""
    return sum(queued(str(pid)).values()) / 1e9


def burst(
    address: str, requests: Sequence[bytes], connections: int, patience_s: float
) -> dict[str, Any]:
    """The number of each answer, and the times in seconds."""
    host, _, port = address.removeprefix("http://").partition(":")
    return Burst((host, int(port)), patience_s).run(
        list(requests[number::connections]) for number in range(connections)
    )


if __name__ == "__main__":
    allow_descriptors()
    prebuilt = [
        request_bytes(**json.loads(line)) for line in Path(sys.argv[2]).read_text().splitlines()
    ]
    print("begun", flush=True)
    print(json.dumps(burst(sys.argv[1], prebuilt, int(sys.argv[3]), float(sys.argv[4]))))
