"""Answers of an upstream that are usable only in part, as raw bytes, and a server that sends them.
This module imports nothing from the service.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count

from tests.untidy import Scripted

PENDING = b'{"id": "$ID", "status": "pending"}'
COMPLETED = b'{"id": "$ID", "status": "completed", "results": ["$LINK"]}'
NAMES = (f"order-{number}" for number in count())
# Parts that nobody needs, beside what is paid for. Most are no JSON that a strict parser takes.
UNUSABLE = {
    "half an emoji": b'"prompt": "cut \\ud83d"',
    "the other half": b'"prompt": "\\udca5 cut"',
    "half an emoji in a name": b'"\\ud83d": 1',
    "an escaped NUL": b'"note": "a\\u0000b"',
    "a NUL": b'"note": "a\0b"',
    "a NUL in a name": b'"a\\u0000b": {"c": "\\u0000"}',
    "a line end in a text": b'"note": "a\nb\tc"',
    "NaN": b'"score": NaN',
    "infinities": b'"scores": [Infinity, -Infinity, {"x": NaN}]',
    "a number beyond any float": b'"score": 1e999',
    "5,000 digits": b'"seed": ' + b"9" * 5000,
    "Latin-1": b'"note": "caf\xe9"',
    "an encoded surrogate": b'"note": "\xed\xa0\x80"',
    "a cut character": b'"note": "\xf0\x9f\x92"',
    "an escape of no JSON": b'"path": "C:\\pictures\\x"',
    "words of no JSON": b'"scores": [nan, -NaN, inf, undefined, True, None, +1, .5, 007, 0x1f]',
    "trailing commas": b'"scores": [1, 2 ,], "usage": {"x": "a,]",}',
    "escapes and words": b'"path": "C:\\x", "score": nan, "note": "\\\\"',
    "a cut escape": b'"note": "cut \\ud8"',
    "a name twice": b'"note": 1, "note": 2',
    "a name twice, further in": b'"usage": {"x": [1], "x": "\\ud83d"}',
    "300 levels": b'"debug": ' + b"[" * 300 + b"]" * 300,
    "figures that are none": b'"usage": NaN, "task_info": "\\ud83d", "progress": NaN',
}


@dataclass(slots=True)
class Said(Scripted):
    """Answers with the bytes of a test: `bodies` are by kind and name, and the last one repeats. In
    a body, `$ID` stands for the upstream's id and `$LINK` for a result's link.
    """

    bodies: dict[tuple[str, str], list[bytes]] = field(default_factory=dict)
    count: defaultdict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))

    def scripted(self, *queries: bytes, first: bytes = PENDING) -> str:
        """The name of a task whose submission and queries are answered with these bytes."""
        name = next(NAMES)
        self.bodies["submission", name] = [first]
        self.bodies["query", name] = list(queries)
        return name

    def answer(self, method: str, path: str, sent: bytes) -> tuple[tuple[str, str], bytes]:
        path = path.partition("?")[0]
        if path.startswith("/moved/"):
            return ("moved", self.names[path.removeprefix("/moved/")]), self.image
        place, body = Scripted.answer(self, method, path, sent)
        if bodies := self.bodies.get(place):
            body = bodies[min(self.count[place], len(bodies) - 1)]
            self.count[place] += 1
            id = next((id for id, name in self.names.items() if name == place[1]), "")
            body = self.filled(body, id)
        return place, body

    def filled(self, body: bytes, id: str) -> bytes:
        link = f"{self.url}/files/{id}".encode()
        return body.replace(b"$LINK", link).replace(b"$ID", id.encode())
