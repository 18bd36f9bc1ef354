"""The schemas of input images."""

from typing import Literal

from pydantic import BaseModel, Field

from service.web.schemas import list_of


class FormBody(BaseModel):
    """A body in multipart/form-data."""


class Upload(FormBody):
    file: bytes = Field(
        description="JPEG, PNG without alpha, BMP or WEBP, 384 to 5000 pixels a side, at most"
        " 10 MB. With ?model= the limits of that model in the catalogue hold instead"
    )


class File(BaseModel):
    id: str
    object: Literal["file"]
    created: int
    filename: str
    media_type: str
    bytes: int
    width: int
    height: int
    sha256: str
    expires_at: str


FileList = list_of(File)
