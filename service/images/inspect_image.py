"""Whether bytes are a picture that counts: type by content, pixels by header before a frame is
decoded, then every frame decoded.

A picture is kept as it came, with its metadata and with whatever stands behind its end: what is
served is named by its content, may not be guessed anew (`nosniff`) and can run nothing
(`Content-Security-Policy: sandbox`).
"""

import warnings
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from service.images.formats import NotWhole, TooMuch, known

KINDS = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "AVIF": "image/avif",
}
FRAMES = 1000  # of an animation: each costs time however small it is
warnings.simplefilter(
    "error", Image.DecompressionBombWarning
)  # else an error comes only over twice as many pixels as allowed


@dataclass(frozen=True, slots=True)
class Picture:
    media_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class NoPicture:
    """`final`: over a limit, other bytes would not help; else worth another try."""

    reason: str
    final: bool = False


def inspect(data: bytes, max_pixels: int) -> Picture | NoPicture:
    """Judges a file's bytes; blocks, so it is run in a thread. The limit is for all frames
    together.
    """
    if (found := known(data)) is None:
        return NoPicture("the bytes are no picture")
    format, bare = found
    Image.MAX_IMAGE_PIXELS = (
        max_pixels  # some decoders need memory for them before a header can be looked at
    )
    try:
        with Image.open(BytesIO(bare(data)), formats=(format,)) as image:
            (width, height), frames, pixels = image.size, getattr(image, "n_frames", 1), 0
            if frames > FRAMES:
                return NoPicture(f"over {FRAMES} frames", final=True)
            for frame in range(frames):
                image.seek(frame)
                pixels += image.width * image.height
                if pixels > max_pixels:
                    return NoPicture(
                        f"{width}x{height}, up to frame {frame + 1}, is over {max_pixels} pixels",
                        final=True,
                    )
                image.load()
            return Picture(KINDS[format], width, height)
    except TooMuch as error:
        return NoPicture(str(error), final=True)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return NoPicture(f"over {max_pixels} pixels", final=True)
    except NotWhole as error:
        return NoPicture(f"the picture is not whole: {error}")
    except (
        MemoryError
    ):  # the machine's want, not these bytes' fault: the child goes, and the file is tried again
        raise
    # Pillow's decoders raise what they like on hostile bytes (struct, Syntax, Overflow …)
    except Exception as error:  # noqa: BLE001
        return NoPicture(f"the picture does not decode: {type(error).__name__}")
