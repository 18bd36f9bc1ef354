"""Writes and reads whole blobs."""

from service.blobs.blob_store import Blobs

NAME = "task_abc/0-" + "0f" * 32 + ".png"


async def put(blobs: Blobs, name: str, data: bytes) -> None:
    async with blobs.incoming() as incoming:
        await incoming.write(data)
        await blobs.put(incoming, name, "image/png")


async def read(blobs: Blobs, name: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(name, start, end)])
