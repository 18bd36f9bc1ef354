"""Sends callbacks to services from a process of its own, so that the work of an attacker in the
test's process does not lengthen their times.

The first argument is how many senders share the callbacks. Each sends one callback after another,
to the services in turns. The further arguments are process, port, path and body of each service. A
line of input is a number of callbacks for each service. A line of output is a list for each of
them: its milliseconds, one number for each service. The time in which the service's main thread, or
the thread that commits, waited for a processor does not count: it grows with the load of the
machine, and more for a busy thread than for an idle one.
"""

import json
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def sender(*arguments: str) -> Callable[[int], list[list[float]]]:
    """A function that sends so many callbacks to each service, on connections of its own."""
    services = [
        (process, connected(port), request(path, body))
        for process, port, path, body in zip(*(arguments[n::4] for n in range(4)), strict=True)
    ]
    return lambda count: [[took(*service) for service in services] for _ in range(count)]


def main(at_once: str, *arguments: str) -> None:
    senders = [sender(*arguments) for _ in range(int(at_once))]
    with ThreadPoolExecutor(len(senders)) as threads:
        for line in sys.stdin:
            made = [threads.submit(send, int(line) // len(senders)) for send in senders]
            print(json.dumps([times for each in made for times in each.result()]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
