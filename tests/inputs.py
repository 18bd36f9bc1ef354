"""Pictures that are inputs, and uploads of them."""

import io
from typing import Any

import httpx
from PIL import Image

from tests.api import got

JSON = dict[str, Any]


def photo(
    format: str = "PNG", size: tuple[int, int] = (400, 390), mode: str = "RGB", **options: Any
) -> bytes:
    content = io.BytesIO()
    with Image.new(mode, size, {"RGBA": (9, 90, 200, 128)}.get(mode, 90)) as image:
        image.save(content, format, **options)
    return content.getvalue()


def of_length(length: int) -> bytes:
    """A whole picture with bytes behind its end, as many as the length wants."""
    content = photo("JPEG")
    return content + bytes(length - len(content))


async def upload(
    client: httpx.AsyncClient, content: bytes, name: str = "photo.png", **query: str
) -> httpx.Response:
    return await client.post("/v1/files", files={"file": (name, content)}, params=query)


async def uploaded(client: httpx.AsyncClient, content: bytes | None = None) -> JSON:
    return got(await upload(client, photo() if content is None else content), 201)
