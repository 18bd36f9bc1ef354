"""Bodies that were compressed although nothing asked for it."""

import gzip
import time
import zlib

import pytest

from service.content_coding import decoded, is_compressed

PLAIN = b'{"id": "task-unified-1"}' * 9


def raw(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("gzip", gzip.compress(PLAIN, mtime=0)),
        ("X-GZip", gzip.compress(PLAIN, mtime=0)),
        ("deflate", zlib.compress(PLAIN)),
        ("deflate", raw(PLAIN)),
        ("deflate, gzip", gzip.compress(zlib.compress(PLAIN), mtime=0)),
        ("gzip, gzip", gzip.compress(gzip.compress(PLAIN, mtime=0), mtime=0)),
        (" gzip , identity", gzip.compress(PLAIN, mtime=0)),
        ("gzip", gzip.compress(PLAIN, mtime=0) + b"behind"),
        ("gzip", gzip.compress(PLAIN[:9], mtime=0) + gzip.compress(PLAIN[9:], mtime=0)),
        ("", gzip.compress(PLAIN, mtime=0)),
        ('"gzip"', gzip.compress(PLAIN, mtime=0)),
        ("gzip", gzip.compress(gzip.compress(PLAIN, mtime=0), mtime=0)),
        ("gzip", PLAIN),
        ("deflate", PLAIN),
        ("br", PLAIN),
        ("", PLAIN),
    ],
)
def test_a_body_is_unpacked_if_it_is_packed(header: str, body: bytes) -> None:
    """A header that is wrong changes nothing."""
    assert decoded(body, header, 1 << 20) == PLAIN


def test_an_unknown_coding_is_left_alone() -> None:
    assert decoded(b"\x0b\x02\x80", "br", 99) == b"\x0b\x02\x80"
    assert not is_compressed("br")
    assert is_compressed("br, gzip")


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_bomb_ends_at_the_limit(layers: int) -> None:
    """One byte over the limit tells that it was reached."""
    bomb = bytes(20 << 20)
    for _ in range(layers):
        bomb = gzip.compress(bomb, 1)
    started = time.process_time()
    assert len(decoded(bomb, ", ".join(["gzip"] * layers), 1 << 20)) == (1 << 20) + 1
    assert time.process_time() - started < 1
