"""What result files may be instead of the asked picture. Each is made of the true file: its bytes,
and its media type.
"""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from random import Random

from PIL import Image, ImageOps

SCRIPT = b"<script>document.title = 'forged'</script>"
HTML = (
    b"<!DOCTYPE html>\n<html><head><title>Not an image</title></head><body>"
    + SCRIPT
    + b"</body></html>\n"
)
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="768" height="768">'
    + SCRIPT
    + b'<rect width="768" height="768"/></svg>\n'
)
BOMB_SIDE = 30_000  # pixels: 900 million in all, 2.7 GB once they are colours


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def bomb(rows: int) -> bytes:
    """A PNG that claims 30,000 × 30,000 pixels of one bit, with so many black rows of them: all,
    and it decodes, from some 100 kB.
    """
    packer = zlib.compressobj(9)
    row = bytes(1 + BOMB_SIDE // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(rows)), packer.flush()])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animated(format: str) -> Callable[[bytes, str], tuple[bytes, str]]:
    """The picture, its negative and its mirror image, a second each."""

    def made(content: bytes, _: str) -> tuple[bytes, str]:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        file = io.BytesIO()
        frames = [ImageOps.invert(picture), ImageOps.mirror(picture)]
        picture.save(file, format, save_all=True, append_images=frames, duration=1000, loop=0)
        return file.getvalue(), f"image/{format}"

    return made


FORGERIES: Mapping[str, Callable[[bytes, str], tuple[bytes, str]]] = {
    "html": lambda _content, _media_type: (HTML, "text/html; charset=utf-8"),
    "svg": lambda _content, _media_type: (SVG, "image/svg+xml"),
    "claimed_bomb": lambda _content, _media_type: (bomb(1), "image/png"),
    "bomb": lambda _content, _media_type: (bomb(BOMB_SIDE), "image/png"),
    "animated_gif": animated("gif"),
    "animated_png": animated("png"),
    "animated_webp": animated("webp"),
    "polyglot": lambda content, media_type: (content + HTML, media_type),
    "truncated": lambda content, media_type: (content[: len(content) // 2], media_type),
    "empty": lambda _content, media_type: (b"", media_type),
    "noise": lambda _content, media_type: (Random(0).randbytes(4096), media_type),
}
