"""Resolves the entries of `image_urls`: which stored image each names, or that it is a link which
the upstream fetches itself.
"""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from sqlalchemy import Connection, select

from service.db.tables import images
from service.errors import ApiError
from service.images.downloads import shown_image
from service.images.input_check import MAX_BYTES
from service.images.input_files import InputFiles
from service.links import data_of, is_data, trimmed
from service.tasks.files import FileRow, InputImage, NamedInput, stored_file
from service.tasks.rows import ImageRow

FILE_ID, IMAGE_ID = r"file_[a-z2-7]{26}", r"img_[a-z2-7]{26}"
LINK = re.compile(r"https?://[^/\s]", re.IGNORECASE)
PARAM = "image_urls"
LINK_CHARS = 2048
ACCEPTED = "a public https link, file_…, img_…, a link of this service, or a data: URL of an image"


@dataclass(frozen=True, slots=True)
class InputResolver:
    files: InputFiles

    async def resolve(self, owner: str, entries: list[str]) -> list[NamedInput]:
        """The inputs in their order. Raises ApiError 400 with the place of the entry."""
        return [
            await self._one(owner, entry, f"{PARAM}[{place}]")
            for place, entry in enumerate(entries)
        ]

    async def _one(self, owner: str, entry: str, place: str) -> NamedInput:
        text = trimmed(entry)
        if is_data(text):
            return await self._data(owner, text, place)
        name = await self._own_name(text)
        if re.fullmatch(FILE_ID, name):
            return await self._file(owner, name, entry, place)
        if re.fullmatch(IMAGE_ID, name):
            return await self._result(owner, name, entry, place)
        if LINK.match(text) and len(text) <= LINK_CHARS:
            return NamedInput(InputImage(url=text), entry, entry)
        shown = entry[:100]
        limit = f"or has over {LINK_CHARS} characters" if LINK.match(text) else ""
        raise refusal(f"{place}: {shown!r} is not {ACCEPTED} {limit}".rstrip())

    async def _own_name(self, text: str) -> str:
        """The id in a link of this service. Any other text stays as it is."""
        links, bare = self.files.resources.links, re.split("[?#]", text, maxsplit=1)[0]
        base = re.escape(links.base_url)
        own = rf"{base}/images/({IMAGE_ID})(?:\.[a-z]+)?|{base}/v1/files/({FILE_ID})/content"
        if match := re.fullmatch(own, bare):
            return match[1] or match[2]
        if links.image_base_url and bare.startswith(f"{links.image_base_url}/"):
            blob = bare.removeprefix(f"{links.image_base_url}/")
            return await self.files.resources.store.read(image_of_blob, blob) or text
        return text

    async def _data(self, owner: str, url: str, place: str) -> NamedInput:
        try:
            content = data_of(url)
        except ValueError as error:
            raise refusal(f"{place}: {error}") from None
        try:
            row = await self.files.keep(owner, None, once(content), param=place)
        except ApiError as error:
            raise as_refusal(error) from None
        return NamedInput(of_file(row), row.id, row.id)

    async def _file(self, owner: str, file_id: str, entry: str, place: str) -> NamedInput:
        store = self.files.resources.store
        row = await store.read(stored_file, file_id, owner, store.clock())
        if row is None:
            raise refusal(f"{place}: {file_id} is no file of yours, or it was erased")
        return NamedInput(of_file(row), file_id, entry)

    async def _result(self, owner: str, image_id: str, entry: str, place: str) -> NamedInput:
        resources = self.files.resources
        row = await resources.store.read(shown_image, image_id)
        if row is None or row.owner != owner or row.state != "stored" or row.blob is None:
            raise refusal(f"{place}: {image_id} is no stored image of yours, or it was erased")
        if row.bytes is not None and row.bytes > MAX_BYTES:
            limit = f"an input image has at most {MAX_BYTES} bytes (10 MB)"
            raise refusal(f"{place}: {limit}, and {image_id} has {row.bytes}")
        async with resources.blobs.incoming() as file:
            async for chunk in resources.blobs.read(row.blob):
                await file.write(chunk)
            try:
                await self.files.check(file, place)
            except ApiError as error:
                raise as_refusal(error) from None
        return NamedInput(of_result(row), image_id, entry)


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def of_file(row: FileRow) -> InputImage:
    return InputImage(
        id=row.id,
        sha256=row.sha256,
        width=row.width,
        height=row.height,
        media_type=row.media_type,
        bytes=row.bytes,
    )


def of_result(row: ImageRow) -> InputImage:
    return InputImage(
        id=row.id,
        sha256=row.sha256,
        width=row.width,
        height=row.height,
        media_type=row.media_type,
        bytes=row.bytes,
    )


def image_of_blob(connection: Connection, blob: str) -> str | None:
    statement = select(images.c.id).where(images.c.blob == blob, images.c.task_id == blob[:31])
    return connection.execute(statement).scalar()


def refusal(message: str) -> ApiError:
    return ApiError(400, "invalid_parameter", message, param=PARAM)


def as_refusal(error: ApiError) -> ApiError:
    """The refusal of a file as that of a submission. A lack of space stays what it is."""
    return error if error.status >= 500 else refusal(error.message)
