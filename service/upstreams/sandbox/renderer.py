"""The sandbox's images, with the prompt drawn in. The same arguments give the same bytes."""

import hashlib
import io
from functools import cache
from importlib.resources import files

from PIL import Image, ImageDraw, ImageFont, ImageOps

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
# Fast rather than small: every request draws the image.
SAVE: dict[str, dict[str, int]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 85},
    "webp": {"quality": 80, "method": 0},
}
SMALLEST = 10
PAPER = (250, 250, 246)
NO_LINE_START = set("，。、；：？！）》」』】〉…,.;:?!)]}%")


def draw(name: str, prompt: str, width: int, height: int, format: str) -> bytes:
    """An image file. `name` decides the colours, `format` is a key of `FORMATS`.

    1440 × 1440 pixels take some tens of milliseconds, so call it in a thread.
    """
    shades = hashlib.sha256(name.encode()).digest()
    image = background(shades, width, height)
    margin = max(16, min(width, height) // 20)
    size, lines = fitted(prompt, width - 4 * margin, height - 5 * margin)
    face = font(size)
    step = line_height(size)
    top = (height - step * len(lines)) // 2
    pen = ImageDraw.Draw(image)
    bottom = min(height - margin, top + step * len(lines) + margin)
    panel = (margin, max(margin, top - margin), width - margin, bottom)
    pen.rounded_rectangle(panel, margin, PAPER)
    for row, line in enumerate(lines):
        pen.text((2 * margin, top + row * step), line, (24, 24, 28), face)
    small = font(max(12, margin // 2))
    pen.text((margin, height - margin), name, PAPER, small, anchor="ls")
    file = io.BytesIO()
    image.save(file, format.upper(), **SAVE[format])
    return file.getvalue()


def background(shades: bytes, width: int, height: int) -> Image.Image:
    """A gradient from one dark colour to another with three discs on it."""
    dark, light = ((shades[at] // 3, shades[at + 1] // 3, shades[at + 2] // 3) for at in (0, 3))
    light = (light[0] + 90, light[1] + 90, light[2] + 90)
    column = ImageOps.colorize(Image.linear_gradient("L").resize((1, height)), dark, light)
    gradient = column.resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(gradient)
    for at in (6, 12, 18):
        radius = min(width, height) * (64 + shades[at]) // 1200
        colour = (64 + shades[at + 1] // 2, 64 + shades[at + 2] // 2, 64 + shades[at + 3] // 2)
        pen.circle((width * shades[at + 4] // 255, height * shades[at + 5] // 255), radius, colour)
    return gradient


@cache
def font_file() -> bytes:
    return (files(__package__) / "font.ttf").read_bytes()


def font(size: int) -> ImageFont.FreeTypeFont:
    """A new face for each drawing: FreeType's faces are not safe in several threads."""
    return ImageFont.truetype(io.BytesIO(font_file()), size, layout_engine=ImageFont.Layout.BASIC)


def line_height(size: int) -> int:
    return size * 4 // 3


def fitted(text: str, width: int, height: int) -> tuple[int, list[str]]:
    """The largest type size at which the text fits, and its lines. At the smallest size the text is
    cut off.
    """
    shown = "".join(
        character if character.isprintable() or character == "\n" else " " for character in text
    ).strip()
    face = font(100)
    widths = {character: face.getlength(character) for character in set(shown)}
    size = max(SMALLEST, min(width, height) // 8)
    while True:
        lines = wrapped(shown, widths, width * 100 / size)
        room = max(1, height // line_height(size))
        if len(lines) <= room:
            return size, lines
        if size == SMALLEST:
            return size, [*lines[: room - 1], lines[room - 1][:-1] + "…"]
        size = max(SMALLEST, size * 9 // 10)


def wrapped(text: str, widths: dict[str, float], width: float) -> list[str]:
    """Lines of at most `width`. They break at spaces and between ideographs, and inside a word that
    is longer than a line.
    """
    lines: list[str] = []
    for paragraph in text.splitlines():
        line, used = "", 0.0
        for word in words(paragraph):
            if word.isspace():
                line, used = line + word, used + widths[word]
                continue
            if line and used + sum(widths[character] for character in word) > width:
                lines.append(line.rstrip())
                line, used = "", 0.0
            for character in word:
                if line and used + widths[character] > width:
                    lines.append(line)
                    line, used = "", 0.0
                line, used = line + character, used + widths[character]
        lines.append(line.rstrip())
    return lines


def words(text: str) -> list[str]:
    """Pieces without a break: a Latin word, a space, one ideograph and its punctuation."""
    pieces: list[str] = []
    for character in text:
        joins = pieces and not character.isspace() and not pieces[-1].isspace()
        if joins and (
            character in NO_LINE_START or (ord(character) < 0x2E80 and ord(pieces[-1][-1]) < 0x2E80)
        ):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces
