"""The sandbox's images."""

import io

import pytest
from PIL import Image

from service.upstreams.sandbox.renderer import FORMATS, draw, fitted, font, wrapped


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_has_the_requested_format_and_size(format: str) -> None:
    """The file decodes."""
    picture = opened(draw("task/0", "a cat", 384, 1536, format))
    assert (picture.format, picture.size) == (format.upper(), (384, 1536))


def test_an_image_depends_only_on_its_name_and_the_prompt() -> None:
    """The same name gives the same bytes. Another index of the task gives another image."""
    first = draw("task/0", "a cat", 768, 768, "png")
    assert draw("task/0", "a cat", 768, 768, "png") == first
    assert draw("task/1", "a cat", 768, 768, "png") != first
    assert draw("task/0", "a dog", 768, 768, "png") != first


@pytest.mark.parametrize("prompt", ["a cat", "一只戴着红围巾的橘猫，麒麟与鹦鹉。"])
def test_the_prompt_is_visible(prompt: str) -> None:
    """The light panel has dark pixels, for Latin and Chinese text."""
    dark = (
        opened(draw("task/0", prompt, 768, 768, "png"))
        .convert("L")
        .crop((80, 80, 688, 688))
        .histogram()
    )
    assert sum(dark[:40]) > 500


@pytest.mark.slow
def test_every_character_of_gb_2312_and_ascii_has_a_glyph() -> None:
    """Chinese prompts are not rows of empty boxes."""
    face = font(24)
    missing = bytes(face.getmask("\U0010ffff"))
    rows = [bytes([high, low]) for high in range(0xB0, 0xF8) for low in range(0xA1, 0xFF)]
    characters = "".join(row.decode("gb2312", "ignore") for row in rows)
    assert len(characters) == 6763
    assert [
        character
        for character in characters + "".join(map(chr, range(33, 127)))
        if bytes(face.getmask(character)) == missing
    ] == []


@pytest.mark.parametrize(
    "prompt", ["字" * 2000, "word " * 400, "x" * 2000, "😀\x00\ud800\t\n\n end", " "]
)
def test_any_prompt_fits_into_the_image(prompt: str) -> None:
    """The lines stay inside the width and the height for a text of any length."""
    size, lines = fitted(prompt, 600, 600)
    face = font(size)
    assert all(face.getlength(line) <= 601 for line in lines)
    assert len(lines) * size * 4 // 3 <= 600 or lines == [""]


def test_text_that_cannot_fit_is_cut_with_an_ellipsis() -> None:
    """This happens at the smallest font size."""
    _, lines = fitted("字" * 2000, 300, 100)
    assert lines[-1].endswith("…")


def test_lines_break_at_spaces_and_between_ideographs_but_not_before_a_full_stop() -> None:
    """Latin words stay whole, and Chinese punctuation never starts a line."""
    widths = dict.fromkeys("ab 猫狗。", 1.0)
    assert wrapped("ab ab ab", widths, 5) == ["ab ab", "ab"]
    assert wrapped("猫狗猫狗。", widths, 4) == ["猫狗猫", "狗。"]
    assert wrapped("ababab", widths, 4) == ["abab", "ab"]
