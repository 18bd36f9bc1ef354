"""Whether bytes are a picture that counts: type by content, pixels by header before a frame is decoded, then every frame decoded."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "AVIF": "avif", "BMP": "bmp", "TIFF": "tif"}
NAMES = {"MPO": "JPEG"}  # a JPEG with further pictures behind it, such as a gain map: Pillow makes it a format of its own


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
    """Judges a file; decoding takes 4 bytes a pixel and blocks, so it is run in a thread. The limit is for all frames together."""
    Image.MAX_IMAGE_PIXELS = None  # the limit is ours, checked below before decoding
    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            (width, height), pixels = image.size, 0
            for frame in range(getattr(image, "n_frames", 1)):
                image.seek(frame)
                pixels += image.width * image.height
                if pixels > max_pixels:
                    return NoPicture(f"{width}x{height}, up to frame {frame + 1}, is over {max_pixels} pixels", final=True)
                image.load()
            name = NAMES.get(image.format or "", image.format or "")
            return Picture(Image.MIME[name], FORMATS[name], width, height)
    except UnidentifiedImageError:
        return NoPicture("the bytes are no picture")
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise what they like on hostile bytes (struct, Syntax, Overflow …)
        return NoPicture(f"the picture does not decode: {type(error).__name__}")
