"""Responses that browsers and curl read although they break a rule or a usual limit, and a server
that sends them byte by byte. This module imports nothing from the service.
"""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from typing import TypeVar

Write = Callable[[bytes], bytes]
Made = TypeVar("Made", bound="Scripted")


@dataclass(frozen=True, slots=True)
class Shape:
    """`write` makes the whole response of a body. `ends`: the server closes the connection behind
    it. `tidy`: the connection may be used again.
    """

    write: Write
    ends: bool = False
    tidy: bool = False


def response(*lines: bytes | str, status: str = "200 OK", end: bytes = b"\r\n") -> Write:
    """A response with these header lines, in which `%d` stands for the body's length."""

    def write(body: bytes) -> bytes:
        made = [line.encode("latin-1") if isinstance(line, str) else line for line in lines]
        head = [f"HTTP/1.1 {status}".encode(), *made]
        return end.join([*head, b"", b""]).replace(b"%d", b"%d" % len(body)) + body

    return write


def packed(pack: Write, write: Write) -> Write:
    return lambda body: write(pack(body))


def before(first: bytes, write: Write) -> Write:
    return lambda body: first + write(body)


def behind(write: Write, rest: bytes) -> Write:
    return lambda body: write(body) + rest


def chunks(line: bytes = b"%x\r\n", last: bytes = b"0\r\n\r\n", end: bytes = b"\r\n") -> Write:
    """The body in two chunks."""

    def pack(body: bytes) -> bytes:
        parts = body[:7], body[7:]
        return b"".join(line % len(part) + part + end for part in parts if part) + last

    return pack


def deflated(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


def cut(write: Write) -> Write:
    """Announces a thousand bytes too many."""
    return lambda body: write(body + b"x" * 1000)[:-1000]


LENGTH, CHUNKED = "Content-Length: %d", "Transfer-Encoding: chunked"
PLAIN, LONG = response(LENGTH), "x" * 9000
IN_CHUNKS = response(CHUNKED)


def limit(*lines: str, status: str = "200 OK") -> Shape:
    return Shape(response(LENGTH, *lines, status=status), tidy=True)


def coded(coding: str, pack: Write) -> Shape:
    return Shape(packed(pack, response(LENGTH, f"Content-Encoding: {coding}")), tidy=True)


LIMITS: Mapping[str, Shape] = {
    "a policy of 9,000 bytes": limit(f"Content-Security-Policy: {LONG}"),
    "a cookie of 9,000 bytes": limit(f"Set-Cookie: a={LONG}"),
    "a line of 64 KiB": limit("X-Debug: " + "x" * 65_527),
    "four lines of 60 KiB": limit(*(f"Set-Cookie: {n}={'x' * 61_440}" for n in range(4))),
    "400 lines": limit(*(f"Set-Cookie: {n}=1" for n in range(400))),
    "a name of 9,000 bytes": limit(f"{LONG}: 1"),
    "9,000 blanks": limit(f"X-Padded:{' ' * 9000}1"),
    "a reason of 9,000 bytes": limit(status=f"200 {LONG}"),
    "no reason": limit(status="200"),
    "an early hint of 9,000 bytes": Shape(
        before(f"HTTP/1.1 103 Early Hints\r\nLink: <{LONG}>\r\n\r\n".encode(), PLAIN), tidy=True
    ),
    "twenty interim responses": Shape(before(b"HTTP/1.1 100\r\n\r\n" * 20, PLAIN), tidy=True),
    "a chunk's extension of 9,000 bytes": Shape(
        packed(chunks(b"%x;" + LONG.encode() + b"\r\n"), IN_CHUNKS), tidy=True
    ),
    "a trailer of 9,000 bytes": Shape(
        packed(chunks(last=f"0\r\nX-Sum: {LONG}\r\n\r\n".encode()), IN_CHUNKS)
    ),
    "400 trailers": Shape(packed(chunks(last=b"0\r\n" + b"X: 1\r\n" * 400 + b"\r\n"), IN_CHUNKS)),
}
CODINGS: Mapping[str, Shape] = {
    "gzip": coded("gzip", gzip.compress),
    "x-gzip": coded("x-gzip", gzip.compress),
    "GZIP": coded("GZIP", gzip.compress),
    "gzip, identity": coded("gzip, identity", gzip.compress),
    "deflate": coded("deflate", zlib.compress),
    "deflate without zlib": coded("deflate", deflated),
    "gzip that is none": coded("gzip", lambda body: body),
    "an unknown coding that is none": coded("utf-8", lambda body: body),
    "gzip in chunks": Shape(
        packed(
            lambda body: chunks()(gzip.compress(body)), response(CHUNKED, "Content-Encoding: gzip")
        ),
        tidy=True,
    ),
    "gzip until the end": Shape(
        packed(gzip.compress, response("Content-Encoding: gzip")), ends=True
    ),
    "gzip as transfer coding": Shape(
        packed(
            lambda body: chunks()(gzip.compress(body)), response("Transfer-Encoding: gzip, chunked")
        )
    ),
}
FRAMING: Mapping[str, Shape] = {
    "the same length twice": Shape(response(LENGTH, LENGTH)),
    "the same length with a zero before it": Shape(response(LENGTH, "Content-Length: 00%d")),
    "the same length in one line": Shape(response("Content-Length: %d, %d")),
    "a length behind a blank": Shape(response("Content-Length : %d")),
    "a name with a blank": Shape(response("X Powered By: us", LENGTH)),
    "a name with a tab": Shape(response("X-\tOne: 1", LENGTH)),
    "a name beyond ASCII": Shape(response("X-Bäse: 1", LENGTH)),
    "no name": Shape(response(": 1", LENGTH)),
    "no colon": Shape(response("nothing", LENGTH)),
    "a folded line": Shape(response("X-One: 1\r\n  , 2", LENGTH)),
    "a folded first line": Shape(response("  X-One: 1", LENGTH)),
    "NUL in a value": Shape(response("X-One: a\0b", LENGTH)),
    "a carriage return in a value": Shape(response("X-One: a\rb", LENGTH)),
    "line feeds alone": Shape(response(LENGTH, end=b"\n")),
    "two blanks in the status line": Shape(response(LENGTH, status=" 200  OK")),
    "small letters in the status line": Shape(
        lambda body: PLAIN(body).replace(b"HTTP/1.1", b"http/1.1")
    ),
    "blank lines first": Shape(before(b"\r\n\r\n", PLAIN), tidy=True),
    "chunked before a length": Shape(packed(chunks(), response(CHUNKED, LENGTH))),
    "chunked behind a length": Shape(packed(chunks(), response("Content-Length: 3", CHUNKED))),
    "chunked twice": Shape(packed(chunks(), response(CHUNKED, CHUNKED))),
    "chunked behind a blank": Shape(packed(chunks(), response("Transfer-Encoding : chunked"))),
    "Chunked": Shape(packed(chunks(), response("Transfer-Encoding: Chunked")), tidy=True),
    "identity beside a length": Shape(response("Transfer-Encoding: identity", LENGTH)),
    "chunked in HTTP/1.0": Shape(
        lambda body: IN_CHUNKS(chunks()(body)).replace(b"HTTP/1.1", b"HTTP/1.0"), ends=True
    ),
    "a padded chunk size": Shape(packed(chunks(b"%x    \r\n"), IN_CHUNKS), tidy=True),
    "chunks with line feeds": Shape(packed(chunks(b"%x\n", b"0\n\n", b"\n"), IN_CHUNKS)),
    "no line behind the chunks": Shape(packed(chunks(last=b"0\r\n"), IN_CHUNKS)),
    "an untidy trailer": Shape(packed(chunks(last=b"0\r\nX Y\r\n\r\n"), IN_CHUNKS)),
    "no length": Shape(response(), ends=True),
    "bytes behind the body": Shape(behind(PLAIN, b"\r\nrest")),
    "bytes behind the chunks": Shape(behind(packed(chunks(), IN_CHUNKS), b"rest")),
}
# Only the status decides what these mean.
RECEIVERS: Mapping[str, Shape] = {
    "204 with a body": Shape(lambda _: response(status="204 No Content")(b"hello")),
    "204 with a length and a body": Shape(lambda _: response(LENGTH, status="204 No")(b"hello")),
    "204 with an announced body": Shape(
        lambda _: response("Content-Length: 5", status="204 No Content")(b"")
    ),
    "204 with chunks": Shape(
        lambda _: packed(chunks(), response(CHUNKED, status="204 No Content"))(b"hello")
    ),
    "204 with a policy of 9,000 bytes": Shape(
        lambda _: response(f"Content-Security-Policy: {LONG}", status="204 No Content")(b""),
        tidy=True,
    ),
    "205 with a body": Shape(response(LENGTH, status="205 Reset Content"), tidy=True),
    "200 cut": Shape(lambda _: response("Content-Length: 100")(b"ok"), ends=True),
    "200 cut in its chunks": Shape(lambda _: IN_CHUNKS(b"9\r\nok"), ends=True),
    "200 cut in its head": Shape(lambda _: b"HTTP/1.1 200 OK\r\nServer: us\r\nCon", ends=True),
    "200 that falls silent": Shape(lambda _: response("Content-Length: 100")(b"ok")),
    "200 with lengths that differ": Shape(
        lambda _: response("Content-Length: 2", "Content-Length: 3")(b"ok")
    ),
    "200 with a length that is none": Shape(lambda _: response("Content-Length: all")(b"ok")),
    "200 with malformed chunks": Shape(lambda _: IN_CHUNKS(b"no size\r\nok\r\n")),
    "200 with a chunk over its size": Shape(lambda _: IN_CHUNKS(b"1\r\nok\r\n0\r\n\r\n")),
    "200 with an endless chunk size": Shape(lambda _: IN_CHUNKS(b"2;" + b"x" * 100_000)),
    "200 with gzip that is none": Shape(response(LENGTH, "Content-Encoding: gzip"), tidy=True),
    "200 with a megabyte": Shape(lambda _: response(LENGTH)(b"x" * (1 << 20))),
    "200 with a head over a mebibyte": Shape(
        lambda _: response(*(f"X: {n:060000}" for n in range(20)))(b""), ends=True
    ),
    "200 with 5,000 lines": Shape(lambda _: response(*("X: 1",) * 5000)(b""), ends=True),
    "299": Shape(response(LENGTH, status="299 Fine"), tidy=True),
}


@dataclass(slots=True)
class Scripted:
    """An upstream with results and a receiver, on one address. Every result is `image`. `shapes`
    are by kind and name. A kind is `submission` (the name is the prompt), `query`, `picture` or
    `receiver`.

    `asked` are the kinds and names of all requests. `reused` names the requests that came over a
    connection which an untidy response had left open.
    """

    image: bytes
    url: str = ""
    shapes: dict[tuple[str, str], Shape] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    reused: list[tuple[str, str]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # by upstream id
    connections: int = 0

    def answer(self, method: str, path: str, sent: bytes) -> tuple[tuple[str, str], bytes]:
        """The request's kind and name, and the body of its response."""
        first, key = path.strip("/").rsplit("/", 1)
        if path == "/v1/images/generations":
            name, id = json.loads(sent)["prompt"], f"task-unified-{len(self.names)}"
            self.names[id] = name
            return ("submission", name), json.dumps({"id": id, "status": "pending"}).encode()
        if first == "v1/tasks":
            link = f"{self.url}/files/{key}"
            document = {"id": key, "status": "completed", "results": [link]}
            return ("query", self.names[key]), json.dumps(document).encode()
        if first == "files":
            return ("picture", self.names[key]), self.image
        return ("receiver", self.names.get(key, key)), b"ok"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        ended, tidy = False, True
        with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):
            while not ended:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lines = head.lower().split("\r\n")
                sizes = [line[15:] for line in lines if line.startswith("content-length:")]
                sent = await reader.readexactly(int(sizes[0]) if sizes else 0)
                method, path, _ = head.split(" ", 2)
                place, body = self.answer(method, path, sent)
                self.asked.append(place)
                if not tidy:
                    self.reused.append(place)
                shape = self.shapes.get(place, Shape(PLAIN, tidy=True))
                writer.write(shape.write(body))
                await writer.drain()
                ended, tidy = shape.ends, shape.tidy


@asynccontextmanager
async def scripted(made: Made) -> AsyncIterator[Made]:
    """Serves its answers."""
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield made
