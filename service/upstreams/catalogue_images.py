"""The limits of input images: a model's own, and the common limits of an image without a model."""

from typing import Protocol

from service.upstreams.catalogue_fields import ImagesField
from service.upstreams.field_values import span

# Every model that takes images accepts these. A model's own limits in the catalogue replace them.
COMMON = ImagesField(
    type="images",
    formats=["jpeg", "png", "bmp", "webp"],
    alpha=False,
    max_bytes=10 << 20,
    min_side=384,
    max_side=5000,
)


class ImageFigures(Protocol):
    """The figures of an input image. None: not known."""

    @property
    def media_type(self) -> str | None: ...
    @property
    def bytes(self) -> int | None: ...
    @property
    def width(self) -> int | None: ...
    @property
    def height(self) -> int | None: ...
    @property
    def alpha(self) -> bool | None: ...


def image_complaint(rule: ImagesField, image: ImageFigures) -> str | None:
    """The first limit that an image breaks, with its figure. An unknown figure breaks none."""
    format = (image.media_type or "").removeprefix("image/")
    if format and rule.formats is not None and format not in rule.formats:
        return f"the file is {format.upper()}: it must be {formats_of(rule)}"
    if format == "png" and image.alpha and not rule.alpha:
        reason = f"the file is PNG with an alpha channel: it must be {formats_of(rule)}"
        return f"{reason}. An upload with ?flatten=white removes the channel"
    if image.bytes is not None and image.bytes > (rule.max_bytes or image.bytes):
        return too_long(rule.max_bytes or 0, image.bytes)
    if image.width is None or image.height is None:
        return None
    low, high = sorted((image.width, image.height))
    sides, pixels = f"{image.width}x{image.height}", image.width * image.height
    if low < (rule.min_side or 0) or high > (rule.max_side or high):
        limit = span(rule.min_side, rule.max_side)
        return f"a side has {limit} pixels, and the image is {sides}"
    if rule.max_pixels is not None and pixels > rule.max_pixels:
        return f"an image has at most {rule.max_pixels} pixels, and {sides} has {pixels}"
    if rule.aspect is not None and high > rule.aspect * low:
        return f"the aspect is 1:{rule.aspect} to {rule.aspect}:1, and the image is {sides}"
    return None


def formats_of(rule: ImagesField) -> str:
    """The formats in words."""
    names = [name.upper() for name in rule.formats or ()]
    if not rule.alpha:
        names = [f"{name} without alpha" if name == "PNG" else name for name in names]
    return " or ".join([", ".join(names[:-1]), names[-1]]) if names[1:] else "".join(names)


def too_long(most: int, size: int) -> str:
    return f"{at_most(most)}, and this one has {size}"


def at_most(most: int) -> str:
    in_mb = f" ({most >> 20} MB)" if not most % (1 << 20) else ""
    return f"the file has at most {most} bytes{in_mb}"
