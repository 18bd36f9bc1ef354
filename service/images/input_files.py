"""Keeps input images: checks a file, stores it under its owner, and erases it.

The row is inserted before the blob is put, so a crash leaves no blob that the sweep does not know.
Only a stored file has a blob in its row.
"""

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog

from service.blobs.blob_store import CHUNK, Incoming
from service.db.paging import Owned
from service.errors import ApiError, BlobUnavailable
from service.ids import blob_name
from service.images.validated_image import InvalidImage, MeasuredImage, Validation
from service.images.validator import ImageValidator
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks.files import FileRow, erase_files, insert_files, store_files
from service.tasks.upstream_copies import forget_copy
from service.upstreams.catalogue_fields import ImagesField
from service.upstreams.catalogue_images import formats_of, image_complaint, too_long

log = structlog.get_logger()

DAY_MS = 86_400_000
NAME_CHARS = 255
COUNTED = 1 << 20  # bytes over the limit that are still counted
# Control characters, marks that turn the direction of text, and lone surrogates.
UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class InputFiles:
    """`days`: how long a file is kept. `max_bytes` holds where a model's limits name none."""

    resources: Resources
    validator: ImageValidator
    days: float
    min_free_bytes: int
    max_bytes: int

    def most(self, rule: ImagesField) -> int:
        return self.max_bytes if rule.max_bytes is None else rule.max_bytes

    async def keep(
        self,
        owner: str,
        name: Callable[[], str | None],
        chunks: AsyncIterator[bytes],
        rule: ImagesField,
        *,
        param: str = "file",
        flatten: bool = False,
    ) -> FileRow:
        """The stored file. `name` is called after the last chunk. Raises ApiError 400 or 413 with
        `param` for an image that breaks the rule, 503 without space. BlobUnavailable.
        """
        await self.resources.check_room(self.min_free_bytes, "files")
        async with self.resources.blobs.incoming() as file:
            await receive(file, chunks, param, self.most(rule))
            validation = await self.validator.validate(file.path, flatten=flatten)
            image = check_found(validation, rule, param)
            return await self._store(owner, name(), file, validation.sha256, image)

    async def check(self, file: Incoming, rule: ImagesField, param: str) -> None:
        """Checks an image that is stored already. Raises ApiError 400 or 413."""
        check_found(await self.validator.validate(file.path, flatten=False), rule, param)

    async def _store(
        self, owner: str, filename: str | None, file: Incoming, sha256: str, image: MeasuredImage
    ) -> FileRow:
        now = self.resources.store.clock()
        file_id = self.resources.id("file")
        blob = blob_name(file_id, 0, sha256, image.media_type)
        row = FileRow(
            id=file_id,
            owner=owner,
            created_at=now,
            expires_at=now + round(self.days * DAY_MS),
            filename=plain_name(filename) or f"{file_id}.{blob.rpartition('.')[2]}",
            media_type=image.media_type,
            bytes=image.bytes,
            sha256=sha256,
            width=image.width,
            height=image.height,
            alpha=image.alpha,
            blob=blob,
        )
        await self.resources.store.write(insert_files, row)
        checkpoint("file.begun")
        await self.resources.blobs.put(file, blob, image.media_type)
        checkpoint("file.saved")
        await self.resources.store.write(store_files, row)
        checkpoint("file.stored")
        fields = {"file_id": file_id, "owner": owner, "bytes": row.bytes}
        log.info("file.stored", **fields, media_type=row.media_type, sha256=row.sha256)
        return row

    async def erase(self, file_id: str, owner: str | None) -> bool:
        """Erases a file for good. False: there is none. A task that waits with it fails."""
        erased = await self.resources.store.write(erase_files, Owned(file_id, owner))
        checkpoint("file.erased")
        if erased is None:
            return False
        log.info("file.erased", file_id=file_id)
        try:
            await self.resources.blobs.delete(erased.blob)
        except BlobUnavailable as error:  # the sweep will find the blob
            log.error("blobs.failed", message=str(error), exception=repr(error))  # noqa: TRY400
        if erased.copy is not None:
            await forget_copy(self.resources, erased.copy)
        return True


def check_found(found: Validation, rule: ImagesField, param: str) -> MeasuredImage:
    """The figures of a valid image. Raises ApiError 400, or 413 for too many bytes. A limit of the
    rule comes before a fault of the bytes.
    """
    image = found.measured
    reason = image and image_complaint(rule, image)
    if reason is None and isinstance(found.result, InvalidImage):
        reason = found.result.reason
        if image is None and found.sha256 and rule.formats:
            reason += f": it must be {formats_of(rule)}"
    if reason is None and image is not None:
        return image
    long = image is not None and image.bytes > (rule.max_bytes or image.bytes)
    status, code = (413, "file_too_large") if long else (400, "invalid_parameter")
    raise ApiError(status, code, f"{param}: {reason}", param=param)


async def receive(file: Incoming, chunks: AsyncIterator[bytes], param: str, most: int) -> None:
    """Writes a body into a file. Raises ApiError 413 over so many bytes, and 400 for none."""
    buffer, size = bytearray(), 0
    async for chunk in chunks:
        size += len(chunk)
        if size > most + COUNTED:
            reason = f"{param}: {too_long(most, size)} or more"
            raise ApiError(413, "file_too_large", reason, param=param)
        if size <= most:
            buffer += chunk
        if len(buffer) >= CHUNK:
            await file.write(bytes(buffer))
            buffer.clear()
    if size > most:
        raise ApiError(413, "file_too_large", f"{param}: {too_long(most, size)}", param=param)
    if not size:
        raise ApiError(400, "invalid_parameter", f"{param}: the file has 0 bytes", param=param)
    await file.write(bytes(buffer))


def plain_name(filename: str | None) -> str:
    """The last part of a client's file name, without characters that no terminal prints. Empty: it
    has none.
    """
    name = UNPRINTED.sub("", (filename or "").replace("\\", "/").rpartition("/")[2]).strip()
    return name[:NAME_CHARS] if name.strip(".") else ""
