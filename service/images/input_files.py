"""Keeps input images: checks a file, stores it under its owner, and erases it.

The row is inserted before the blob is put, so a crash leaves no blob that the sweep does not know.
Only a stored file has a blob in its row.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import structlog

from service.blobs.blob_store import CHUNK, Incoming
from service.errors import ApiError, BlobUnavailable
from service.ids import blob_name
from service.images.input_check import MAX_BYTES, too_long
from service.images.validator import ImageValidator, InvalidImage, Validation
from service.queue.checkpoints import checkpoint
from service.resources import Resources
from service.tasks.files import (
    ErasedFile,
    FileErasure,
    FileRow,
    erase_files,
    insert_files,
    store_files,
)

log = structlog.get_logger()

DAY_MS = 86_400_000
NAME_CHARS = 255
FORGET_S = 5.0  # how long an erasure waits for the upstream
COUNTED = 1 << 20  # bytes over the limit that are still counted
UNPRINTED = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class InputFiles:
    """`days`: how long a file is kept."""

    resources: Resources
    validator: ImageValidator
    days: float
    min_free_bytes: int

    async def check_room(self) -> None:
        """Raises ApiError 503 if the blob store has too little space left."""
        await self.resources.check_room(self.min_free_bytes, "files")

    async def keep(
        self,
        owner: str,
        filename: str | None,
        chunks: AsyncIterator[bytes],
        *,
        param: str = "file",
        flatten: bool = False,
    ) -> FileRow:
        """The stored file. Raises ApiError 400 or 413 with `param` for an image that no upstream
        accepts, 503 without space. BlobUnavailable.
        """
        await self.check_room()
        async with self.resources.blobs.incoming() as file:
            await receive(file, chunks, param)
            found = await self.check(file, param, flatten=flatten)
            return await self._store(owner, filename, file, found)

    async def check(self, file: Incoming, param: str, *, flatten: bool = False) -> Validation:
        """What the checks found. Raises ApiError 400 or 413."""
        found = await self.validator.validate(file.path, flatten=flatten)
        if isinstance(found.result, InvalidImage):
            status = 413 if found.result.final else 400
            code = "file_too_large" if found.result.final else "invalid_parameter"
            raise ApiError(status, code, f"{param}: {found.result.reason}", param=param)
        return found

    async def _store(
        self, owner: str, filename: str | None, file: Incoming, found: Validation
    ) -> FileRow:
        image, now = found.result, self.resources.store.clock()
        assert not isinstance(image, InvalidImage)
        file_id = self.resources.id("file")
        blob = blob_name(file_id, 0, found.sha256, image.media_type)
        row = FileRow(
            id=file_id,
            owner=owner,
            created_at=now,
            expires_at=now + round(self.days * DAY_MS),
            filename=plain_name(filename) or f"{file_id}.{blob.rpartition('.')[2]}",
            media_type=image.media_type,
            bytes=found.bytes,
            sha256=found.sha256,
            width=image.width,
            height=image.height,
            blob=blob,
        )
        await self.resources.store.write(insert_files, row)
        checkpoint("file.begun")
        await self.resources.blobs.put(file, blob, image.media_type)
        checkpoint("file.saved")
        await self.resources.store.write(store_files, row)
        known = {"file_id": file_id, "owner": owner, "bytes": row.bytes}
        log.info("file.stored", **known, media_type=row.media_type, sha256=row.sha256)
        return row

    async def erase(self, file_id: str, owner: str | None) -> bool:
        """Erases a file for good. False: there is none. A task that waits with it fails."""
        erased = await self.resources.store.write(erase_files, FileErasure(file_id, owner))
        checkpoint("file.erased")
        if erased is None:
            return False
        log.info("file.erased", file_id=file_id)
        await self._forget(erased)
        return True

    async def _forget(self, erased: ErasedFile) -> None:
        try:
            await self.resources.blobs.delete(erased.blob)
        except BlobUnavailable as error:  # the sweep will find the blob
            log.error("blobs.failed", message=str(error), exception=repr(error))  # noqa: TRY400
        if erased.copy is not None and erased.copy.file_id is not None:
            with suppress(TimeoutError):  # the copy expires there by itself
                async with asyncio.timeout(FORGET_S):
                    await self.resources.file_api.delete(erased.copy.file_id)


async def receive(file: Incoming, chunks: AsyncIterator[bytes], param: str) -> None:
    """Writes a body into a file. Raises ApiError 413 over 10 MB, and 400 for an empty one."""
    buffer, size = bytearray(), 0
    async for chunk in chunks:
        size += len(chunk)
        if size > MAX_BYTES + COUNTED:
            raise ApiError(413, "file_too_large", f"{param}: {too_long(size)} or more", param=param)
        if size <= MAX_BYTES:
            buffer += chunk
        if len(buffer) >= CHUNK:
            await file.write(bytes(buffer))
            buffer.clear()
    if size > MAX_BYTES:
        raise ApiError(413, "file_too_large", f"{param}: {too_long(size)}", param=param)
    if not size:
        raise ApiError(400, "invalid_parameter", f"{param}: the file has 0 bytes", param=param)
    await file.write(bytes(buffer))


def plain_name(filename: str | None) -> str:
    """The last part of a client's file name, without characters that no terminal prints."""
    name = UNPRINTED.sub("", (filename or "").replace("\\", "/").rpartition("/")[2])
    return name.strip()[:NAME_CHARS]
