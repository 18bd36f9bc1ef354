"""Sends callbacks one after another, from a process of its own: the work of an attacker in the
test's process does not lengthen their times. A line of input is a number of callbacks. A line of
output is the list of their milliseconds.
"""

import json
import socket
import sys
import time


def answered(connection: socket.socket) -> bytes:
    """A whole answer. Its head names its length."""
    answer = b""
    while True:
        answer += connection.recv(1 << 16)
        head, end, body = answer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if end and len(body) >= int(length):
            return head


def main(port: int, path: str, body: str) -> None:
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for line in sys.stdin:
            times = []
            for _ in range(int(line)):
                began = time.perf_counter()
                connection.sendall((head + body).encode())
                assert b" 200 " in answered(connection)[:16]
                times.append((time.perf_counter() - began) * 1000)
            print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
