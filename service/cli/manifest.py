"""What a backup says of itself, in `manifest.json`."""

from typing import Self

from pydantic import AwareDatetime, BaseModel, NonNegativeInt

FORMAT = 1


class Sum(BaseModel):
    bytes: NonNegativeInt
    sha256: str

    @classmethod
    def of(cls, size: int, sha256: str) -> Self:
        return cls(bytes=size, sha256=sha256)


class Images(BaseModel):
    """`kept_at`: they stay in that bucket; `lost`: the store named them, and its folder had not got
    them.
    """

    count: NonNegativeInt = 0
    bytes: NonNegativeInt = 0
    lost: list[str] = []
    kept_at: str | None = None


class Manifest(BaseModel):
    """What a backup says of itself. The sums of images are in the database. `served`: while it was
    made.
    """

    format: int
    darkroom: str
    made_at: AwareDatetime
    served: bool
    schema_version: str | None
    tasks: int
    events: int
    sequence: str
    files: dict[str, Sum]
    images: Images
