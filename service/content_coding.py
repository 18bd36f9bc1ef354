"""Content codings that a server applies although `identity` was asked for."""

import zlib

COMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})
CODINGS = 3  # of one body
MEMBERS = 100  # of one gzip body, behind the first
MEMBER = b"\x1f\x8b\x08"  # the first bytes of a gzip member


def is_compressed(header: str) -> bool:
    """Whether a Content-Encoding names a coding that `decompress` knows."""
    return not COMPRESSED.isdisjoint(coding.strip() for coding in header.lower().split(","))


def decoded(body: bytes, header: str, limit: int) -> bytes:
    """The body without its Content-Encoding, at most one byte over the limit. A body that is not
    coded as the header says stays as it is, unless it is gzip all the same.
    """
    for coding in reversed(header.split(",")[-CODINGS:]):
        plain = decompress(body, limit) if is_compressed(coding) else None
        body = body if plain is None else plain
    for _ in range(CODINGS):  # a gateway left the name out, or named it in a way of its own
        if body[: len(MEMBER)] == MEMBER:
            body = decompress(body, limit) or body
    return body


def decompress(data: bytes, limit: int) -> bytes | None:
    """At most one byte over the limit. None: the data is neither gzip, zlib nor raw deflate.

    A gzip file may have several members (RFC 1952, 2.2). Further bytes are no part of it.
    """
    for wbits in (47, -15):  # 47: gzip or zlib
        decoder = zlib.decompressobj(wbits)
        try:
            plain = decoder.decompress(data, limit + 1)
        except zlib.error:
            continue
        for _ in range(MEMBERS):
            if not decoder.unused_data.startswith(MEMBER) or len(plain) > limit:
                break
            decoder, member = zlib.decompressobj(wbits), decoder.unused_data
            try:
                plain += decoder.decompress(member, limit + 1 - len(plain))
            except zlib.error:
                break
        # Raw deflate has no signature, so only a whole stream counts.
        if wbits > 0 or decoder.eof or len(plain) > limit:
            return plain
    return None
