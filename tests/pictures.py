"""Hostile pictures: bombs made by hand, and thousands of broken pictures. Always the same bytes."""

import io
import random
import struct
import zlib
from collections.abc import Iterator, Sequence

from PIL import Image

SIZE = (24, 16)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def drawn(
    format: str, mode: str = "RGB", size: tuple[int, int] = SIZE, frames: int = 1, **how: object
) -> bytes:
    """A picture of noise, which no format compresses. A decoder misses every byte that
    is cut off.
    """
    rnd, bands = random.Random(1), len(Image.new(mode, (1, 1)).getbands())
    pictures = [
        Image.frombytes(mode, size, rnd.randbytes(size[0] * size[1] * bands)) for _ in range(frames)
    ]
    for each in pictures:
        if mode == "P":
            each.putpalette(rnd.randbytes(768))
    made = io.BytesIO()
    several = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(made, format, **several, **how)
    return made.getvalue()


def samples() -> dict[str, bytes]:
    """Whole pictures of every kind that the service accepts or must recognize."""
    return {
        "png": drawn("PNG"),
        "png with palette": drawn("PNG", "P"),
        "png with alpha": drawn("PNG", "RGBA"),
        "apng": drawn("PNG", frames=3),
        "jpeg": drawn("JPEG"),
        "jpeg progressive": drawn("JPEG", progressive=True),
        "jpeg cmyk": drawn("JPEG", "CMYK"),
        "webp": drawn("WEBP"),
        "webp lossless": drawn("WEBP", "RGBA", lossless=True),
        "webp animated": drawn("WEBP", frames=3),
        "gif": drawn("GIF", "P"),
        "gif animated": drawn("GIF", "P", frames=3),
        "avif": drawn("AVIF"),
        "avif animated": drawn("AVIF", frames=3),
    }


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header(width: int, height: int, depth: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    """The signature and the first chunk of a PNG."""
    return SIGNATURE + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    )


def png(*before: bytes, size: tuple[int, int] = (1, 1), pixels: bytes = b"\0\0") -> bytes:
    """A grey PNG with the given chunks before its pixels."""
    return (
        header(*size)
        + b"".join(before)
        + chunk(b"IDAT", zlib.compress(pixels, 9))
        + chunk(b"IEND", b"")
    )


def segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_segments(*segments: bytes) -> bytes:
    whole = drawn("JPEG")
    return (
        whole[:2] + b"".join(segments) + whole[20:]
    )  # without the first segment, which has the density


def exif_bomb() -> bytes:
    """A JPEG of 60 kB whose Exif entries all point to the same 60,000 bytes. A decoder that copies
    each entry needs 300 MB.
    """
    entries = 5000
    listed = b"".join(struct.pack("<HHII", 1 + number, 7, 60_000, 8) for number in range(entries))
    return with_segments(
        segment(0xE1, b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, entries) + listed + bytes(4))
    )


def scans(count: int) -> bytes:
    """A progressive JPEG that repeats its last scan `count` times."""
    whole = drawn("JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + whole[-2:]


def gif(*blocks: bytes) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0)
        + bytes((0, 0, 0, 255, 255, 255))
        + b"".join(blocks)
        + b";"
    )


def frame(size: tuple[int, int] = (1, 1), at: tuple[int, int] = (0, 0)) -> bytes:
    """A GIF frame with the data of one pixel and a header of any size."""
    return b"," + struct.pack("<HHHHB", *at, *size, 0) + b"\x02\x02\x44\x01\x00"


def bombs() -> dict[str, bytes]:
    """Small files that cost a trusting decoder much time or memory."""
    swelling = zlib.compress(bytes(1 << 20), 9)
    webp = drawn("WEBP", "RGBA", lossless=True, exif=b"Exif\0\0II*\0")
    disposed = b"!\xf9\x04\x08\0\0\0\0"
    return {
        "png of 50,000 x 50,000": png(size=(50_000, 50_000)),
        "png whose pixels swell": png(pixels=bytes(50 << 20)),
        "png with text that swells": png(
            *(chunk(b"zTXt", b"key%d\0\0" % n + swelling) for n in range(1000))
        ),
        "png with foreign text that swells": png(
            *(chunk(b"iTXt", b"key%d\0\1\0\0\0" % n + swelling) for n in range(1000))
        ),
        "png with profiles that swell": png(
            *(chunk(b"iCCP", b"x\0\0" + swelling) for _ in range(1000))
        ),
        "png of empty chunks": png(chunk(b"teST", b"") * 100_000),
        "png of empty pixels": header(1, 1) + chunk(b"IDAT", b"") * 100_000 + chunk(b"IEND", b""),
        "apng of a billion frames": png(chunk(b"acTL", struct.pack(">II", 10**9, 0))),
        "jpeg with exif that swells": exif_bomb(),
        "jpeg of segments": with_segments(segment(0xE0, b"") * 100_000),
        "jpeg of comments": with_segments(segment(0xFE, bytes(60_000)) * 300),
        "jpeg of scans": scans(5000),
        "jpeg of 0xff": drawn("JPEG")[:-2] + b"\xff" * 2_000_000,
        "jpeg of pictures": drawn("JPEG") * 5000,
        "webp of 16,384 x 16,384": webp[:24] + (16_383).to_bytes(3, "little") * 2 + webp[30:],
        "webp of chunks": riff(webp[12:] + b"EXIF\0\0\0\0" * 100_000),
        "gif of frames": gif(frame() * 30_000),
        "gif of comments": gif(b"!\xfe" + b"\x01x" * 2_000_000 + b"\0", frame()),
        "gif that disposes of much": gif(disposed, frame(size=(60_000, 60_000)), frame()),
        "gif that grows": gif(frame(), frame(at=(60_000, 60_000))),
        "avif of boxes": drawn("AVIF")[:32] + b"\0\0\0\x08free" * 500_000,
        "avif with a long index": struct.pack(">I4s4sI4s", 20, b"ftyp", b"avif", 0, b"avif")
        + struct.pack(">I4s", 1 << 20, b"meta")
        + bytes(1 << 20),
    }


def riff(body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def broken(kinds: Sequence[bytes], count: int, seed: int = 1) -> Iterator[bytes]:
    """`count` broken copies of each kind, with bytes flipped, removed, inserted, repeated or taken
    from another kind.
    """
    rnd = random.Random(seed)
    for whole in kinds:
        for _ in range(count):
            data = bytearray(whole)
            for _ in range(rnd.choice((1, 1, 2, 8))):
                at, length = rnd.randrange(len(data)), rnd.choice((1, 1, 2, 4, 64))
                match rnd.randrange(6):
                    case 0 | 1:
                        data[at] ^= 1 << rnd.randrange(8)
                    case 2:
                        data[at : at + length] = (
                            rnd.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
                        )
                    case 3:
                        del data[at : at + length]
                    case 4:
                        data[at:at] = data[at : at + length * 8]
                    case _:
                        other = rnd.choice(kinds)
                        start = rnd.randrange(len(other))
                        data[at : at + length] = other[start : start + length]
                data = data or bytearray(b"\0")
            yield mended(bytes(data)) if rnd.randrange(2) else bytes(data)


def mended(data: bytes) -> bytes:
    """A PNG with correct checksums, so that the decoder meets the damage further inside. Other
    formats stay unchanged.
    """
    if not data.startswith(SIGNATURE):
        return data
    at, made = len(SIGNATURE), [SIGNATURE]
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        made.append(chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(made)
