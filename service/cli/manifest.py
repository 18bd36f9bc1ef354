"""The manifest of a backup, `manifest.json`."""

from pydantic import AwareDatetime, BaseModel, NonNegativeInt

FORMAT = 1


class Sum(BaseModel):
    bytes: NonNegativeInt
    sha256: str


class Images(BaseModel):
    """`lost` were not in the store's folder. `kept_at`: the bucket of images left out."""

    count: NonNegativeInt = 0
    bytes: NonNegativeInt = 0
    lost: list[str] = []
    kept_at: str | None = None


class Manifest(BaseModel):
    """`served`: a process served the store meanwhile. The database has the checksums of images."""

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
