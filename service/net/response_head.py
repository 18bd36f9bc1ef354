"""The head of a response, read as browsers and curl read it.

A head that breaks a rule of RFC 9112 is read if the RFC leaves one reading of the message. Such a
head is not `reusable`: its connection is closed behind the response, so that nothing can be
smuggled into the response to the next request.
"""

import re
from dataclasses import dataclass

# The limit of a response's head, with all interim ones.
MAX_HEAD = 1 << 20  # bytes
MAX_LINES = 1000

STATUS_LINE = re.compile(rb"(?i:HTTP)/1\.(\d)[ \t]+([1-9]\d\d)(?:[ \t][^\n]*)?\r?")
FOLD = re.compile(rb"\r?\n[ \t]+")  # a line that continues the one before (RFC 9112, 5.2)
NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
INVALID = re.compile(rb"[\0\r]")  # a space stands for each in a value (RFC 9110, 5.5)
LENGTH = re.compile(rb"\d{1,18}")
# Possessive, so that a hostile head takes linear time.
TIDY = re.compile(
    rb"HTTP/1\.[1-9] \d\d\d[^\0\r\n]*+\r\n"
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\0\r\n]*+\r\n)*+\r\n"
)
LISTS = (b"connection", b"content-length", b"transfer-encoding")


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Names are in lower case. `length`: the body's, in bytes. None: the body is chunked, or ends
    with the connection. `problem`: why the body cannot be read.
    """

    status: int
    fields: tuple[tuple[bytes, bytes], ...] = ()
    length: int | None = 0
    chunked: bool = False
    reusable: bool = False
    problem: str | None = None


def read_head(text: bytes, *, without_body: bool = False) -> ResponseHead:
    """The head in `text`, which ends with the empty line. `without_body`: it answers a HEAD.

    A line that is no field is left out, and so is a field that is repeated word for word. Raises
    ValueError if the first line is no status line.
    """
    first, *lines = FOLD.sub(b" ", text).split(b"\n")
    status = status_of(first)
    fields: dict[tuple[bytes, bytes], None] = {}
    values: dict[bytes, list[bytes]] = {}
    framed, tidy = 0, TIDY.fullmatch(text) is not None
    for line in lines:
        name, colon, value = line.partition(b":")
        name = name.rstrip(b" \t").lower()
        if colon and NAME.fullmatch(name):
            fields[name, value := INVALID.sub(b" ", value).strip(b" \t")] = None
            if name in LISTS:
                values.setdefault(name, []).append(value.lower())
                framed += name != b"connection"

    def listed(name: bytes) -> list[bytes]:
        parts = b",".join(values.get(name, ())).split(b",")
        return [part for each in parts if (part := each.strip(b" \t"))]

    # An early draft of HTTP/1.1 had the coding `identity`, which changes nothing.
    codings = [coding for coding in listed(b"transfer-encoding") if coding != b"identity"]
    lengths, chunked = listed(b"content-length"), codings[-1:] == [b"chunked"]
    length, problem = None, None
    tidy = tidy and framed <= 1 and len(lengths) + len(codings) == framed
    if without_body or status < 200 or status in (204, 304):
        tidy = tidy and (status != 204 or {b"0", *lengths, *codings} == {b"0"})
        length, chunked = 0, False
    elif codings:
        if others := [coding for coding in codings if coding != b"chunked"]:
            fields[b"content-encoding", b",".join(others)] = None
    elif all(map(LENGTH.fullmatch, lengths)) and len(numbers := set(map(int, lengths))) == 1:
        length = numbers.pop()
    elif b"content-length" in values:
        length, problem = 0, "its Content-Length is not one number"
    return ResponseHead(
        status,
        tuple(fields),
        length,
        chunked,
        tidy and (chunked or length is not None) and b"close" not in listed(b"connection"),
        problem,
    )


def status_of(line: bytes) -> int:
    """The status in a status line without its line feed. Raises ValueError."""
    match = STATUS_LINE.fullmatch(line)
    if match is None or match[2] == b"101":  # Darkroom never asks for another protocol
        raise ValueError("it is no response of HTTP/1.1")
    return int(match[2])
