"""The checks of an input image. They run in the validator's child process."""

import warnings
from collections.abc import Callable
from io import BytesIO

from PIL import Image

from service.images.validator import InvalidImage, ValidImage

MIN_SIDE, MAX_SIDE, MAX_BYTES = 384, 5000, 10 << 20
INPUT_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "BMP": "image/bmp", "WEBP": "image/webp"}
OTHERS = ("GIF", "AVIF", "TIFF", "ICO")  # which a refusal can name
WANTED = "must be JPEG, PNG without alpha, BMP or WEBP"
WHITE = (255, 255, 255, 255)


def check_input(
    data: bytes, *, flatten: bool, decode: Callable[[bytes], InvalidImage | None]
) -> tuple[ValidImage | InvalidImage, bytes]:
    """The image and its bytes, which differ from the given ones if `flatten` removed an alpha
    channel. `decode` says why the bytes do not decode whole.
    """
    if len(data) > MAX_BYTES:
        return InvalidImage(too_long(len(data)), final=True), data
    Image.MAX_IMAGE_PIXELS = None  # the sides have their own limit, which is checked first
    try:
        with warnings.catch_warnings(action="ignore"):
            opened = Image.open(BytesIO(data), formats=(*INPUT_TYPES, *OTHERS))
    except MemoryError:
        raise  # the machine's fault
    except Exception:  # noqa: BLE001 - Pillow's plugins raise all kinds of errors on hostile bytes
        return InvalidImage(f"the file is no picture that can be read: it {WANTED}"), data
    with opened as image:
        # A JPEG with further images behind it (a gain map) is one of Pillow's format MPO.
        format = "JPEG" if image.format == "MPO" else str(image.format)
        if format not in INPUT_TYPES:
            return InvalidImage(f"the file is {format}: it {WANTED}"), data
        width, height = image.size
        if not MIN_SIDE <= min(width, height) <= max(width, height) <= MAX_SIDE:
            limit = f"a side has {MIN_SIDE} to {MAX_SIDE} pixels"
            return InvalidImage(f"{limit}, and the image is {width}x{height}"), data
        alpha = image.has_transparency_data
        if alpha and format == "PNG" and not flatten:
            reason = f"the file is PNG with an alpha channel (mode {image.mode}): it {WANTED}"
            return InvalidImage(f"{reason}. ?flatten=white removes the channel"), data
        if invalid := decode(data):
            return invalid, data
        if alpha and flatten:
            data = flattened(image, format)
            if len(data) > MAX_BYTES:
                return InvalidImage(f"without alpha: {too_long(len(data))}", final=True), data
        return ValidImage(INPUT_TYPES[format], width, height), data


def too_long(size: int) -> str:
    return f"the file has at most {MAX_BYTES} bytes (10 MB), and this one has {size}"


def flattened(image: Image.Image, format: str) -> bytes:
    """The image on white, in the same format."""
    on_white = Image.new("RGBA", image.size, WHITE)
    on_white.alpha_composite(image.convert("RGBA"))
    content = BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    on_white.convert("RGB").save(content, format, **options)
    return content.getvalue()
