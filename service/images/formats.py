"""What a picture's file is made of, walked piece by piece before a decoder sees it.

A file counts only from its first byte to its format's own end; what stands behind that is kept, and
means nothing. Metadata is left out of what is decoded: a decoder's memory and time then depend on
pixels and on the limits below, not on what a text, profile or Exif swells to.
"""

import re
import zlib
from collections.abc import Callable

PIECES = 2048  # chunks, segments, blocks or boxes, but for those below
SCANS = 100  # of a JPEG: each goes over all of its pixels; encoders write about ten
# pieces that carry pixels, or GIF's sub-blocks: over twice what MAX_IMAGE_BYTES of a GIF needs by
# its default
BULK = 500_000
INDEX = 1 << 18  # bytes of an AVIF's index, which its decoder searches again and again

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL"})
PNG_BULK = frozenset({b"IDAT", b"fdAT"})
WEBP_KEPT = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"})
AVIF_BOXES = frozenset({b"ftyp", b"meta", b"moov", b"mdat", b"free", b"skip", b"uuid"})
AVIF_BRANDS = frozenset({b"avif", b"avis", b"mif1", b"msf1"})
MARKER = re.compile(
    rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL
)  # in a JPEG's pixels a 0xff is followed by 0 or a restart


class NotWhole(Exception):
    """The picture breaks off, or its pieces do not fit together."""


class TooMuch(Exception):
    """Over a limit: other bytes would not help."""


class Counted:
    """Counts pieces against a limit."""

    def __init__(self, limit: int, what: str) -> None:
        self._left, self._said = limit, f"over {limit} {what}"

    def one(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise TooMuch(self._said)


def png(data: bytes) -> bytes:
    kept, at, pieces, bulk = (
        [SIGNATURE],
        len(SIGNATURE),
        Counted(PIECES, "chunks"),
        Counted(BULK, "chunks of pixels"),
    )
    while True:
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        (bulk if name in PNG_BULK else pieces).one()
        end = at + 12 + length
        if end > len(data) or len(name) < 4:
            raise NotWhole("it breaks off")
        if name in PNG_KEPT or name in PNG_BULK or name == b"IEND":
            if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise NotWhole("a checksum is wrong")
            kept.append(data[at:end])
        if name == b"IEND":
            return b"".join(kept)
        at = end


def jpeg(data: bytes) -> bytes:
    """The first picture; those behind it (gain maps, previews) are not decoded, but must be whole
    too.
    """
    pieces, scans = Counted(PIECES, "segments"), Counted(SCANS, "scans")
    first, end = one_jpeg(data, 0, pieces, scans)
    while data.startswith(b"\xff\xd8\xff", end):
        _, end = one_jpeg(data, end, pieces, scans)
    return first


def one_jpeg(data: bytes, start: int, pieces: Counted, scans: Counted) -> tuple[bytes, int]:
    """A picture without its metadata, and where it ends."""
    kept, run, at = (
        [b"\xff\xd8"],
        0,
        start + 2,
    )  # `run`: from where on pixels are kept, 0 before the first scan
    while found := MARKER.search(data, at):
        pieces.one()
        marker, begin, end = found[1][0], found.start(), found.end()
        if marker == 0xD9 and run:  # end of image
            return b"".join([*kept, data[run:end]]), end
        if marker in (0x01, 0xD8, 0xD9):
            raise NotWhole("a marker is out of place")
        at = end + int.from_bytes(data[end : end + 2], "big")
        if marker == 0xDA:
            scans.one()
            run = run or begin
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:  # an application's segment, a comment
            if run:
                kept.append(data[run:begin])
                run = at
        elif not run:
            kept.append(data[begin:at])
    raise NotWhole("it breaks off")


def gif(data: bytes) -> bytes:
    try:
        return whole_gif(data)
    except IndexError:
        raise NotWhole("it breaks off") from None


def whole_gif(data: bytes) -> bytes:
    """IndexError when it breaks off."""
    pieces, bulk = Counted(PIECES, "blocks"), Counted(BULK, "sub-blocks")
    at = 13 + palette(data[10])
    kept = [data[:at]]
    while (kind := data[at]) != 0x3B:
        start = at
        pieces.one()
        if kind == 0x2C:  # an image: its place, its palette, the size of its codes
            at += 11 + palette(data[at + 9])
        elif kind == 0x21:  # an extension and its label
            at += 2
        else:
            raise NotWhole("a block is out of place")
        while size := data[at]:
            bulk.one()
            at += size + 1
        at += 1
        if (
            kind == 0x2C or data[start + 1] == 0xF9
        ):  # how long the next image is shown, and how it is taken away
            kept.append(data[start:at])
    return b"".join([*kept, b";"])


def palette(flags: int) -> int:
    """Its length in bytes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def webp(data: bytes) -> bytes:
    end, at, kept, pieces = (
        8 + int.from_bytes(data[4:8], "little"),
        12,
        [b"WEBP"],
        Counted(PIECES, "chunks"),
    )
    if end > len(data):
        raise NotWhole("it breaks off")
    while at + 8 <= end:
        pieces.one()
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + size > end:
            raise NotWhole("it breaks off")
        if name in WEBP_KEPT:
            kept.append(data[at : at + 8 + size] + bytes(size & 1))
        at += 8 + size + (size & 1)
    body = b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def avif(data: bytes) -> bytes:
    """All of it, as its index counts from the file's beginning; Exif goes under a name that no
    decoder knows.
    """
    kept, at, seen, pieces = [], 0, set(), Counted(PIECES, "boxes")
    while at < len(data):
        pieces.one()
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if name not in AVIF_BOXES and b"mdat" in seen:
            break
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        elif size == 0:
            size = len(data) - at
        if size < 8 or at + size > len(data):
            raise NotWhole("it breaks off")
        box = data[at : at + size]
        if name in (b"meta", b"moov"):
            if size > INDEX:
                raise TooMuch(f"over {INDEX} bytes of index")
            box = box.replace(b"Exif", b"none")
        kept.append(box)
        seen.add(name)
        at += size
    return b"".join(kept)


def known(data: bytes) -> tuple[str, Callable[[bytes], bytes]] | None:
    """The format that the first bytes name, and what makes it bare: `bare(data)` raises NotWhole
    and TooMuch.
    """
    if data.startswith(SIGNATURE):
        return "PNG", png
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", jpeg
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF", gif
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP", webp
    if data[4:8] == b"ftyp" and data[8:12] in AVIF_BRANDS:
        return "AVIF", avif
    return None
