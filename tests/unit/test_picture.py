"""What counts as a picture: by its content alone, and whole."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from service.pipeline.picture import NoPicture, Picture, inspect

SIZE = (64, 48)
LIMIT = 64 * 48
KINDS = {
    "PNG": ("image/png", "png"),
    "JPEG": ("image/jpeg", "jpg"),
    "WEBP": ("image/webp", "webp"),
    "GIF": ("image/gif", "gif"),
    "BMP": ("image/bmp", "bmp"),
    "TIFF": ("image/tiff", "tif"),
    "AVIF": ("image/avif", "avif"),
}
Judged = Callable[[bytes], Picture | NoPicture]


@pytest.fixture
def judged(tmp_path: Path) -> Judged:
    """Judges bytes under a name that says nothing of them."""

    def judge(data: bytes) -> Picture | NoPicture:
        path = tmp_path / "incoming"
        path.write_bytes(data)
        return inspect(path, LIMIT)

    return judge


def drawn(format: str, frames: int = 1, size: tuple[int, int] = SIZE) -> bytes:
    """Noise, which no format makes small: what is cut off is missed."""
    pictures = [Image.effect_noise(size, 60 + 40 * frame).convert("RGB") for frame in range(frames)]
    made = io.BytesIO()
    several = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(made, format, **several)
    return made.getvalue()


@pytest.mark.parametrize("format", KINDS)
def test_a_whole_picture_is_known_by_its_content(format: str, judged: Judged) -> None:
    """Type, extension and size come from the bytes: the upstream's name and content type can be wrong."""
    assert judged(drawn(format)) == Picture(*KINDS[format], *SIZE)


@pytest.mark.parametrize("format", KINDS)
def test_a_picture_cut_short_is_none(format: str, judged: Judged) -> None:
    """A picture that does not decode to its end is worth another try: the rest may come."""
    whole = drawn(format)
    verdict = judged(whole[: len(whole) * 7 // 10])
    assert isinstance(verdict, NoPicture)
    assert not verdict.final


@pytest.mark.parametrize(
    "data", [b"", b"<!DOCTYPE html><h1>200 OK</h1>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"P6 1 1 255 abc"]
)
def test_other_bytes_are_no_picture(data: bytes, judged: Judged) -> None:
    """HTML with 200, SVG, documents and formats nobody asked for: tried again, as the same link may bring the picture."""
    assert judged(data) == NoPicture("the bytes are no picture")


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_too_many_pixels_are_refused_by_the_header(format: str, judged: Judged) -> None:
    """Over the limit is final, and known before decoding: half of the file is enough."""
    whole = drawn(format, size=(65, 48))
    for data in (whole, whole[: len(whole) // 2] if format == "PNG" else whole):
        verdict = judged(data)
        assert isinstance(verdict, NoPicture)
        assert verdict.final
        assert "over 3072 pixels" in verdict.reason


def test_a_header_that_promises_a_bomb_costs_nothing(judged: Judged) -> None:
    """50,000 × 50,000 pixels in a few bytes are refused, without Pillow's own warning or limit."""
    made = bytearray(drawn("PNG"))
    made[16:24] = (50_000).to_bytes(4, "big") * 2
    made[29:33] = zlib.crc32(made[12:29]).to_bytes(4, "big")
    assert judged(bytes(made)) == NoPicture("50000x50000, up to frame 1, is over 3072 pixels", final=True)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "AVIF", "TIFF"])
def test_every_frame_counts_and_must_decode(format: str, judged: Judged) -> None:
    """An animated picture is whole when its last frame is, and its frames together keep to the limit."""
    small = drawn(format, frames=3, size=(32, 24))
    assert judged(small) == Picture(*KINDS[format], 32, 24)
    verdict = judged(small[: len(small) * 7 // 10])
    assert isinstance(verdict, NoPicture)
    assert not verdict.final
    many = judged(drawn(format, frames=2, size=(64, 40)))
    assert isinstance(many, NoPicture)
    assert many.final


def test_a_jpeg_with_a_second_picture_behind_it_is_a_jpeg(judged: Judged) -> None:
    """Gain maps and previews ride behind some JPEGs (MPO): what is served is the file as it is, as a JPEG."""
    assert judged(drawn("MPO", frames=2, size=(32, 24))) == Picture("image/jpeg", "jpg", 32, 24)
