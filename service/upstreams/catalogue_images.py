"""The limits of a model on its input images, which are known once the images are stored."""

from typing import Protocol

from service.upstreams.catalogue_fields import ImagesField, span


class StoredImage(Protocol):
    """The figures of an input image. None: not known."""

    @property
    def media_type(self) -> str | None: ...
    @property
    def bytes(self) -> int | None: ...
    @property
    def width(self) -> int | None: ...
    @property
    def height(self) -> int | None: ...


def image_complaint(rule: ImagesField, image: StoredImage) -> str | None:
    """The first limit that an image breaks, with its figure. Unknown figures break none."""
    if image.width is None or image.height is None or image.bytes is None:
        return None
    format = (image.media_type or "").removeprefix("image/")
    low, high = sorted((image.width, image.height))
    sides, pixels = f"{image.width}x{image.height}", image.width * image.height
    if rule.formats is not None and format not in rule.formats:
        return f"the image is {format}, and must be {', '.join(rule.formats)}"
    if rule.max_bytes is not None and image.bytes > rule.max_bytes:
        return f"an image has at most {rule.max_bytes} bytes, and this one has {image.bytes}"
    if low < (rule.min_side or 0) or high > (rule.max_side or high):
        limit = span(rule.min_side, rule.max_side)
        return f"a side has {limit} pixels, and the image is {sides}"
    if rule.max_pixels is not None and pixels > rule.max_pixels:
        return f"an image has at most {rule.max_pixels} pixels, and {sides} has {pixels}"
    if rule.aspect is not None and high > rule.aspect * low:
        return f"the aspect is 1:{rule.aspect} to {rule.aspect}:1, and the image is {sides}"
    return None
