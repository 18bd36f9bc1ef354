"""The check of an image in the child process. Its content alone decides, and it must be whole."""

import io
import re
import struct
import warnings
import zlib
from random import Random

import pytest
from PIL import Image

from service.images.validated_image import InvalidImage, ValidImage
from service.images.validator_child import FORMATS, FRAMES, check_image, media_type
from tests.pictures import (
    SIZE,
    chunk,
    drawn,
    frame,
    gif,
    header,
    png,
    samples,
    segment,
    with_segments,
)

LIMIT = SIZE[0] * SIZE[1] * 3
SAMPLES = samples()
FORMAT = {"png": "PNG", "apng": "PNG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF", "avif": "AVIF"}


def worth_a_retry(verdict: ValidImage | InvalidImage) -> bool:
    """Whether another download may bring a valid image."""
    return isinstance(verdict, InvalidImage) and not verdict.final


@pytest.mark.parametrize("name", SAMPLES)
def test_the_content_of_a_whole_image_decides_its_type_and_size(name: str) -> None:
    """All frames count."""
    assert check_image(SAMPLES[name], LIMIT) == ValidImage(
        media_type(FORMAT[name.split(maxsplit=1)[0]]), *SIZE
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_an_image_cut_at_any_byte_is_worth_a_retry(name: str) -> None:
    """This holds even if all its pixels are there. Only a JPEG may lack its end marker."""
    whole = SAMPLES[name]
    end = len(whole) - 2 if FORMAT[name.split(maxsplit=1)[0]] == "JPEG" else len(whole)
    assert [
        length for length in range(end) if not worth_a_retry(check_image(whole[:length], LIMIT))
    ] == []


@pytest.mark.parametrize(
    "tail", [b"<html><script>alert(1)</script>", b"PK\x03\x04", b"\0" * 5000, b"\xff\xd9", b";"]
)
@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_after_the_end_of_an_image_are_ignored(name: str, tail: bytes) -> None:
    """The image is stored as it came."""
    assert check_image(SAMPLES[name] + tail, LIMIT) == check_image(SAMPLES[name], LIMIT)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html><h1>200 OK</h1>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"P6 1 1 255 abc",
        b" " + SAMPLES["png"],
        b"RIFF\0\0\0\0WAVE",
        b"\0\0\0\x1cftypisom",
        *(drawn(format) for format in ("BMP", "TIFF", "ICO", "JPEG2000")),
    ],
)
def test_other_content_is_no_image(data: bytes) -> None:
    """HTML with status 200, SVG, documents, and formats that not every reader shows. A retry may
    bring the image.
    """
    assert check_image(data, LIMIT) == InvalidImage("the bytes are no picture")


@pytest.mark.parametrize(
    "data",
    [
        SAMPLES["png"][:16] + b"\xff" + SAMPLES["png"][17:],  # a size with a wrong checksum
        png(pixels=b""),
        png(b"\0\0\0\1\0\0\0\0"),
        header(1, 1) + chunk(b"IEND", b""),
        b"\xff\xd8\xff\xd9",
        SAMPLES["jpeg"][:2] + b"\xff\x01" + SAMPLES["jpeg"][2:],
        SAMPLES["jpeg"] + SAMPLES["jpeg"][:-2],
        SAMPLES["gif"][:13] + b"?" + SAMPLES["gif"][13:],
        gif(),
        b"RIFF\x04\0\0\0WEBP",
        SAMPLES["webp"][:12] + b"JUNK\xff\0\0\0" + SAMPLES["webp"][12:],
        SAMPLES["avif"][:4] + b"ftypavif",
        b"\0\0\0\x07ftypavif",
        b"\0\0\0\x14ftypavif" + bytes(8) + b"\0\0\0\1mdat" + (1 << 40).to_bytes(8, "big"),
    ],
)
def test_data_that_only_begins_like_an_image_is_worth_a_retry(data: bytes) -> None:
    """Its pieces do not fit together."""
    assert worth_a_retry(check_image(data, LIMIT))


@pytest.mark.parametrize(
    ("format", "frames"),
    [
        (format, frames)
        for format in FORMATS
        for frames in (1, 4)
        if (format, frames) != ("JPEG", 4)
    ],
)
def test_too_many_pixels_are_final(format: str, frames: int) -> None:
    """All frames count together. The frame that exceeds the limit is not decoded."""
    verdict = check_image(
        drawn(format, size=SIZE if frames > 1 else (SIZE[0], SIZE[1] * 3 + 1), frames=frames), LIMIT
    )
    assert isinstance(verdict, InvalidImage)
    assert verdict.final
    assert f"over {LIMIT} pixels" in verdict.reason


@pytest.mark.parametrize("size", [(40, 40), (50_000, 50_000)])
def test_a_header_over_the_limit_is_final(size: tuple[int, int]) -> None:
    """Nothing is decoded."""
    assert check_image(png(size=size), LIMIT) == InvalidImage(f"over {LIMIT} pixels", final=True)


@pytest.mark.parametrize(("frames", "whole"), [(FRAMES, True), (FRAMES + 1, False)])
def test_the_number_of_frames_is_limited(frames: int, whole: bool) -> None:
    """Each frame costs time, however small it is."""
    verdict = check_image(gif(*[b"!\xf9\x04\0\0\0\0\0" + frame()] * frames), LIMIT)
    assert verdict == (
        ValidImage("image/gif", 1, 1)
        if whole
        else InvalidImage(f"over {FRAMES} frames", final=True)
    )


def encoded(mode: str, format: str, **how: object) -> bytes:
    made = io.BytesIO()
    Image.new(mode, SIZE, 1).save(made, format, **how)
    return made.getvalue()


def interlaced() -> bytes:
    """A grey PNG of two by two pixels in the passes of Adam7."""
    passes = b"\0\1" + b"\0\2" + b"\0\3\4"
    return header(2, 2, interlace=1) + chunk(b"IDAT", zlib.compress(passes)) + chunk(b"IEND", b"")


def deep() -> bytes:
    """A PNG of one pixel with three channels of 16 bits."""
    return (
        header(1, 1, 16, 2)
        + chunk(b"IDAT", zlib.compress(b"\0" + b"\1\2" * 3))
        + chunk(b"IEND", b"")
    )


def lossless() -> bytes:
    """A grey JPEG of one colour. Its only code, of one bit, says that a pixel is like the last."""
    frame, codes = struct.pack(">BHHBBBB", 8, 16, 16, 1, 1, 0x11, 0), bytes((0, 1, *[0] * 15, 0))
    scan = segment(0xDA, bytes((1, 1, 0, 1, 0, 0))) + bytes(16 * 16 // 8)
    return b"\xff\xd8" + segment(0xC3, frame) + segment(0xC4, codes) + scan + b"\xff\xd9"


ODD = {
    "one bit": encoded("1", "PNG"),
    "16 bit grey": encoded("I;16", "PNG"),
    "16 bit colours": deep(),
    "interlaced": interlaced(),
    "grey jpeg": encoded("L", "JPEG"),
    "cmyk progressive": encoded("CMYK", "JPEG", progressive=True),
    "lossless jpeg": lossless(),
    "jpeg with a broken exif": with_segments(segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "jpeg with a broken profile": with_segments(segment(0xE2, b"ICC_PROFILE\0\2\1x")),
    "jpeg with junk in its header": SAMPLES["jpeg"][:20] + b"junk" + SAMPLES["jpeg"][20:],
    "jpeg with a comment between its scans": SAMPLES["jpeg progressive"].replace(
        b"\xff\xda", segment(0xFE, b"\xff\xda") + b"\xff\xda"
    ),
    "png with a broken profile": png(chunk(b"iCCP", b"x\0\0no profile")),
    "png with broken text": png(chunk(b"zTXt", b"key\0\0no text")),
    "gif with a comment": gif(b"!\xfe\x02hi\0", frame()),
    "webp with metadata": encoded(
        "RGB", "WEBP", exif=b"Exif\0\0II*\0", xmp=b"<x/>", icc_profile=b"none"
    ),
    "avif with exif": encoded("RGB", "AVIF", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    "avif whose data ends with the file": re.sub(
        rb"....mdat", b"\0\0\0\0mdat", SAMPLES["avif"], flags=re.DOTALL
    ),
    "jpeg with further images": drawn("MPO", frames=3),
}


@pytest.mark.parametrize("name", ODD)
def test_an_unusual_image_is_valid(name: str) -> None:
    """It has an unusual depth, colour space or order, or unreadable metadata. The pixels must
    decode.
    """
    assert isinstance(check_image(ODD[name], LIMIT), ValidImage)


def test_a_jpeg_with_further_images_counts_as_its_first() -> None:
    """Gain maps and previews follow the first image of some JPEGs (MPO). The first image must be
    whole, and the pixels of the last must not be cut.
    """
    whole = ODD["jpeg with further images"]
    assert check_image(whole, LIMIT) == ValidImage("image/jpeg", *SIZE)
    first, last = whole.index(b"\xff\xd9\xff\xd8") + 2, whole.rindex(b"\xff\xda") + 2
    cut = [*range(first - 2), *range(last, len(whole))]
    assert [n for n in cut if not worth_a_retry(check_image(whole[:n], LIMIT))] == []


JPEGS: dict[str, dict[str, object]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "no subsampling": {"subsampling": 0},
}


def decodes(data: bytes) -> bool:
    """Whether Pillow makes every pixel of a JPEG."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.load()
    except Exception:  # noqa: BLE001 - Pillow's decoders raise all kinds of errors
        return False
    return True


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_damaged_jpeg_gets_the_verdict_of_all_its_pixels(mode: str, kind: str) -> None:
    """The child decodes an eighth of each side. It must find the same errors."""
    random = Random(mode + kind)
    made = io.BytesIO()
    Image.effect_noise((97, 61), 60).convert(mode).save(made, "JPEG", **JPEGS[kind])
    scan, verdicts = made.getvalue().index(b"\xff\xda") + 14, set()
    for _ in range(150):
        data = bytearray(made.getvalue())
        for _ in range(random.choice((1, 2, 5))):
            at, length = random.randrange(scan, len(data)), random.randrange(30)
            data[at : at + length] = random.randbytes(random.choice((0, length, length + 3)))
        data += b"\xff\xd9"
        expected = decodes(bytes(data))
        with warnings.catch_warnings(action="ignore"):
            found = check_image(bytes(data), 97 * 61)
        assert isinstance(found, ValidImage) == expected, bytes(data).hex()
        verdicts.add(expected)
    assert verdicts == {True, False}


def test_a_lack_of_memory_is_no_verdict_about_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes may decode at another time."""

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        check_image(next(iter(SAMPLES.values())), LIMIT)
