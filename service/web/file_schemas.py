"""The schemas of input images."""

from typing import Literal

from pydantic import ConfigDict, Field

from service.web.field_schemas import Shape, Text, list_of


class FormBody(Shape):
    """A body in multipart/form-data."""


class Upload(FormBody):
    file: bytes = Field(
        description="JPEG, PNG without alpha, BMP or WEBP, 384 to 5000 pixels a side, at most"
        " 10 MB. With ?model= the limits of that model in the catalogue hold instead"
    )


class File(Shape):
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


# --- the upstream's own file API


class EncodedUpload(Shape):
    model_config = ConfigDict(strict=True)

    base64_data: Text = Field(min_length=1, description="base64, or a `data:` URL of an image")
    file_name: Text | None = None


class LinkedUpload(Shape):
    model_config = ConfigDict(strict=True)

    file_url: Text = Field(min_length=1, description="a public link of an image")
    file_name: Text | None = None


class UpstreamFile(Shape):
    file_id: str
    file_name: str
    original_name: str
    file_size: int
    mime_type: str
    upload_path: str
    file_url: str
    download_url: str
    upload_time: str
    expires_at: str


class FileAnswer(Shape):
    success: Literal[True]
    code: Literal[200]
    msg: str


class UploadedFile(FileAnswer):
    data: UpstreamFile


class UpstreamFiles(Shape):
    files: list[UpstreamFile]
    total: int
    page: int
    pageSize: int  # noqa: N815 - the upstream's name


class ListedFiles(FileAnswer):
    data: UpstreamFiles


class FileQuota(Shape):
    user_group: str
    total_files: int
    used_files: int
    max_files: int
    remain_files: int
    max_file_size: int | None


class QuotaAnswer(FileAnswer):
    data: FileQuota


class ErasedUpload(Shape):
    file_id: str


class ErasedAnswer(FileAnswer):
    data: ErasedUpload


class FileFailure(Shape):
    success: Literal[False]
    code: int
    msg: str
    data: None
