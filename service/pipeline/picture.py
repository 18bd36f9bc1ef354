"""Whether bytes are a picture that counts: type by content, pixels by header before anything is decoded, then decoded whole."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "AVIF": "avif", "BMP": "bmp", "TIFF": "tif"}


@dataclass(frozen=True, slots=True)
class Picture:
    media_type: str
    extension: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class NoPicture:
    """`final`: over a limit, other bytes would not help; else worth another try."""

    reason: str
    final: bool = False


def inspect(path: Path, max_pixels: int) -> Picture | NoPicture:
    """Judges a file; decoding takes 4 bytes a pixel and blocks, so it is run in a thread."""
    Image.MAX_IMAGE_PIXELS = None  # the limit is ours, checked below before decoding
    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            width, height = image.size
            if width * height > max_pixels:
                return NoPicture(f"{width}x{height} is over {max_pixels} pixels", final=True)
            image.load()
            return Picture(Image.MIME[image.format or ""], FORMATS[image.format or ""], width, height)
    except UnidentifiedImageError:
        return NoPicture("the bytes are no picture")
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise what they like on hostile bytes (struct, Syntax, Overflow …)
        return NoPicture(f"the picture does not decode: {type(error).__name__}")
