"""What a validation of an image says. The validator's child imports it without asyncio, which would
take half of the child's start.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ValidImage:
    media_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class InvalidImage:
    """`final`: the image exceeds a limit, so another download would not help."""

    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class MeasuredImage:
    """The figures of an input image. An image that does not decode has them too."""

    media_type: str
    bytes: int
    width: int
    height: int
    alpha: bool


@dataclass(frozen=True, slots=True)
class Validation:
    """`sha256` is in hex, or "" if the file was not read to its end. `measured` is that of an input
    image. None: its header is not readable.
    """

    sha256: str
    bytes: int
    result: ValidImage | InvalidImage
    measured: MeasuredImage | None = None
