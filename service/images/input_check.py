"""Measures an input image, in the validator's child process. The parent knows the limits."""

import warnings
from collections.abc import Callable
from io import BytesIO

from PIL import Image

from service.images.validated_image import InvalidImage, MeasuredImage, ValidImage

INPUT_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "BMP": "image/bmp",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
}
WHITE = (255, 255, 255, 255)


def check_input(
    data: bytes, max_pixels: int, *, flatten: bool, decode: Callable[[bytes], InvalidImage | None]
) -> tuple[MeasuredImage | None, ValidImage | InvalidImage, bytes]:
    """The figures of the header, what decoding found, and the bytes, which differ from the given
    ones if `flatten` removed an alpha channel. `decode` says why the bytes do not decode whole.
    """
    Image.MAX_IMAGE_PIXELS = None  # the header's pixels are checked before anything is decoded
    try:
        with warnings.catch_warnings(action="ignore"):
            opened = Image.open(BytesIO(data), formats=tuple(INPUT_TYPES))
    except MemoryError:
        raise  # the machine's fault
    except Exception:  # noqa: BLE001 - Pillow's plugins raise all kinds of errors on hostile bytes
        return None, InvalidImage("the file is no picture that can be read"), data
    with opened as image:
        # A JPEG with further images behind it (a gain map) is one of Pillow's format MPO.
        format = "JPEG" if image.format == "MPO" else str(image.format)
        (width, height), alpha = image.size, bool(image.has_transparency_data)
        media_type = INPUT_TYPES[format]
        measured = MeasuredImage(media_type, len(data), width, height, alpha)
        if width * height > max_pixels:
            reason = f"{width}x{height} has {width * height} pixels, and at most {max_pixels} are"
            return measured, InvalidImage(f"{reason} decoded"), data
        if invalid := decode(data):
            return measured, invalid, data
        if alpha and flatten:
            data = flattened(image, format)
            measured = MeasuredImage(media_type, len(data), width, height, False)
        return measured, ValidImage(media_type, width, height), data


def flattened(image: Image.Image, format: str) -> bytes:
    """The image on white, in the same format. Its orientation and its colours stay."""
    on_white = Image.new("RGBA", image.size, WHITE)
    on_white.alpha_composite(image.convert("RGBA"))
    content = BytesIO()
    kept = {name: image.info[name] for name in ("exif", "icc_profile") if image.info.get(name)}
    if format == "WEBP":
        kept["lossless"] = True
    on_white.convert("RGB").save(content, format, **kept)
    return content.getvalue()
