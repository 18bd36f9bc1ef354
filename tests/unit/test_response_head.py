"""The head of a response: its framing, and the time that a hostile head takes."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.net.response_head import MAX_HEAD, MAX_LINES, ResponseHead, read_head

OK = b"HTTP/1.1 200 OK\r\n"


def head(*lines: bytes, first: bytes = OK, without_body: bool = False) -> ResponseHead:
    return read_head(
        first + b"".join(line + b"\r\n" for line in (*lines, b"")), without_body=without_body
    )


def test_a_tidy_head_keeps_its_connection() -> None:
    """Names are in lower case and values without the blanks around them."""
    found = head(b"Content-Length:  5 ", b"X-One:a:b")
    assert found == ResponseHead(
        200, ((b"content-length", b"5"), (b"x-one", b"a:b")), 5, reusable=True
    )
    assert head(b"Transfer-Encoding: chunked") == ResponseHead(
        200, ((b"transfer-encoding", b"chunked"),), None, chunked=True, reusable=True
    )


@pytest.mark.parametrize(
    ("lines", "length", "chunked"),
    [
        ((b"Content-Length: 5", b"Connection: close"), 5, False),
        ((b"Content-Length: 5", b"Connection: x, Close"), 5, False),
        ((b"Content-Length: 5", b"content-length:5"), 5, False),
        ((b"Content-Length: 5,5",), 5, False),
        ((b"Content-Length: 5", b"Transfer-Encoding: chunked"), None, True),
        ((b"Transfer-Encoding: chunked, chunked",), None, True),
        ((b"Transfer-Encoding: gzip",), None, False),
        ((b"Transfer-Encoding: chunked, gzip", b"Content-Length: 5"), None, False),
        ((b"Transfer-Encoding: identity",), None, False),
        ((b"Transfer-Encoding: identity", b"Content-Length: 5"), 5, False),
        ((b"Content-Length: 5", b"Content Length: 7"), 5, False),
        ((b"Content-Length: 5", b" 7"), 0, False),
        ((), None, False),
    ],
)
def test_the_framing_is_that_of_the_rfc(
    lines: tuple[bytes, ...], length: int | None, chunked: bool
) -> None:
    """Any doubt, and a body that ends with the connection, closes the connection."""
    found = head(*lines)
    assert (found.length, found.chunked, found.reusable) == (length, chunked, False)


@pytest.mark.parametrize("status", [b"204", b"304", b"103"])
def test_some_statuses_have_no_body(status: bytes) -> None:
    """Their length is that of another response. Only a 204 must not name one."""
    found = head(b"Content-Length: 5", first=b"HTTP/1.1 %s X\r\n" % status)
    assert (found.length, found.reusable, found.problem) == (0, status != b"204", None)
    assert head(b"Content-Length: 0", first=b"HTTP/1.1 204 X\r\n").reusable
    assert head(b"Content-Length: 5", without_body=True).reusable


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 101 Switching\r\n",
        b"HTTP/2.0 200 OK\r\n",
        b"HTTP/1.1 20 OK\r\n",
        b"HTTP/1.1 2000 OK\r\n",
        b"HTTP/1.1 099 OK\r\n",
        b"HTTP/1.1200 OK\r\n",
        b"ICY 200 OK\r\n",
        b"\r\n",
    ],
)
def test_what_is_no_status_line_is_refused(first: bytes) -> None:
    with pytest.raises(ValueError, match="no response"):
        head(first=first)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(text: bytes) -> None:
    """A head is reusable only if it has one framing and no odd byte in its lines."""
    found = read_head(OK + text + b"\r\n\r\n")
    if found.reusable:
        assert b"\0" not in text
        assert text.count(b"\r") == text.count(b"\n") == (text + b"\r\n\r\n").count(b"\r\n") - 2
        assert (found.length is None) == found.chunked


@pytest.mark.parametrize(
    "piece",
    [b" ", b"\n ", b"\r", b":", b"a", b"a:\0", b"\r\n\t", b"a :b\r\n", b"a: b\r\n c\r\n", b"a,"],
)
@pytest.mark.parametrize("begin", [b"", b"a:", b"Content-Length: ", b"Transfer-Encoding: "])
def test_a_hostile_head_takes_linear_time(begin: bytes, piece: bytes) -> None:
    """The largest head that is read."""
    lines = piece.count(b"\n")
    count = min(MAX_HEAD // len(piece), MAX_LINES // lines if lines else MAX_HEAD)
    started = time.process_time()
    read_head(OK + begin + piece * count + b"\r\n\r\n")
    assert time.process_time() - started < 1
