"""What a piece of work costs a store, counted: statements and transactions of SQLite, and round
trips to PostgreSQL. Counts are exact on a busy machine too, so tests may limit them.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from sqlalchemy import Engine, event

READ, WRITE = "BEGIN", "BEGIN IMMEDIATE"
SOCKET = ".s.PGSQL.5432"
PROTOCOL = (3 << 16).to_bytes(4)  # a startup message with another number asks for encryption
# Messages that wait for an answer: a simple query, the end of extended ones, an early answer.
ASKING = "QSH"


@contextmanager
def counted_statements() -> Iterator[list[str]]:
    """The statements of connections to SQLite that open from now on, in order. A statement that
    fires triggers is traced again for each of them, and counts once.
    """
    statements: list[str] = []

    def note(text: str) -> None:
        if statements[-1:] != [text]:
            statements.append(text)

    def trace(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.set_trace_callback(note)

    event.listen(Engine, "connect", trace)
    try:
        yield statements
    finally:
        event.remove(Engine, "connect", trace)


@dataclass(slots=True)
class Relay:
    """Stands before a PostgreSQL server and counts the round trips of clients at `url`."""

    server: str
    url: str
    round_trips: int = 0
    texts: list[str] = field(default_factory=list)  # statements that are new to their connection

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(f"{self.server}/{SOCKET}")
        ways = [
            asyncio.create_task(self._count(reader, far_writer)),
            asyncio.create_task(self._copy(far_reader, writer)),
        ]
        with suppress(asyncio.CancelledError):
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        writer.close()
        far_writer.close()

    async def _count(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = b""
        while not body.startswith(PROTOCOL):
            length = await reader.readexactly(4)
            body = await reader.readexactly(int.from_bytes(length) - 4)
            writer.write(length + body)
        while True:
            head = await reader.readexactly(5)
            body = await reader.readexactly(int.from_bytes(head[1:]) - 4)
            kind = chr(head[0])
            self.round_trips += kind in ASKING
            if kind in "QP":
                self.texts.append(body.split(b"\0")[kind == "P"].decode())
            writer.write(head + body)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65536):
            writer.write(chunk)


@asynccontextmanager
async def relay(url: str, folder: Path) -> AsyncIterator[Relay]:
    """A relay before the server of this URL, with its socket in the folder."""
    server = parse_qs(urlsplit(url).query)["host"][0]
    made = Relay(server, url.replace(server, str(folder)))
    async with await asyncio.start_unix_server(made.serve, folder / SOCKET):
        yield made
