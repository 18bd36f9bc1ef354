"""Sends callbacks one after another to two services in turns, from a process of its own, so that
the work of an attacker in the test's process does not lengthen their times.

The arguments are process, port, path and body of each service. A line of input is a number of
callbacks. A line of output is the list of their milliseconds, as pairs. The time in which the
service's main thread, or the thread that commits, waited for a processor does not count: it grows
with the load of the machine, and more for a busy thread than for an idle one.
"""

import json
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path


def answered(connection: socket.socket) -> bytes:
    """A whole answer. Its head names its length."""
    answer = b""
    while True:
        answer += connection.recv(1 << 16)
        head, end, body = answer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if end and len(body) >= int(length):
            return head


def connected(port: str) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", int(port)))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def request(path: str, body: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json"]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", body]).encode()


def queued(process: str) -> dict[str, int]:
    """How many nanoseconds each thread was ready and waited for a processor."""
    found = {}
    for folder in Path(f"/proc/{process}/task").iterdir():
        with suppress(OSError):  # it has ended
            found[folder.name] = int((folder / "schedstat").read_bytes().split()[1])
    return found


def took(process: str, connection: socket.socket, callback: bytes) -> float:
    before, began = queued(process), time.perf_counter()
    connection.sendall(callback)
    assert b" 200 " in answered(connection)[:16]
    passed, after = time.perf_counter() - began, queued(process)
    waits = {thread: after[thread] - before[thread] for thread in before.keys() & after.keys()}
    waited = (waits.pop(process) + max(waits.values(), default=0)) / 1e9
    return (passed - min(waited, passed)) * 1000


def main(*arguments: str) -> None:
    services = [
        (process, connected(port), request(path, body))
        for process, port, path, body in zip(*(arguments[n::4] for n in range(4)), strict=True)
    ]
    for line in sys.stdin:
        times = [[took(*service) for service in services] for _ in range(int(line))]
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
