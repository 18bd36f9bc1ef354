"""Contents that replace a result file. Each is made from the bytes and media type of the file."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from random import Random

from PIL import Image, ImageOps

Forgery = Callable[[bytes, str], tuple[bytes, str]]

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
BOMB_SIDE = 30_000  # 900 million pixels in all, 2.7 GB as RGB


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def bomb(rows: int) -> bytes:
    """A PNG that announces 30,000 × 30,000 pixels of one bit and has this many black rows.

    With all rows it decodes, from some 100 kB.
    """
    packer = zlib.compressobj(9)
    row = bytes(1 + BOMB_SIDE // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(rows)), packer.flush()])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animated(format: str) -> Forgery:
    """The image, its negative and its mirror image, a second each."""

    def forge(content: bytes, _: str) -> tuple[bytes, str]:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        file = io.BytesIO()
        frames = [ImageOps.invert(image), ImageOps.mirror(image)]
        image.save(file, format, save_all=True, append_images=frames, duration=1000, loop=0)
        return file.getvalue(), f"image/{format}"

    return forge


FORGERIES: Mapping[str, Forgery] = {
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
