"""Stored images under names that cannot be guessed: no key, no cookies, and nothing in them can run."""

import re

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.errors import ApiError, BlobMissing
from service.store import queries
from service.web.context import context_of

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
HEADERS = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "public, max-age=31536000, immutable",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


def byte_range(text: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last of a single range; None: the whole is to be sent. ApiError 416: outside of it."""
    match = RANGE.fullmatch(text.strip()) if text else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    if match[2] and match[1] and int(match[2]) < int(match[1]):
        return None
    if start >= size:
        raise ApiError(416, "range_not_satisfiable", f"the image has {size} bytes", param="Range")
    return start, end


async def image(request: Request) -> Response:
    resources = context_of(request).resources
    row = await resources.store.read(queries.image_row, request.path_params["image_id"])
    if row is None:
        raise ApiError(404, "image_not_found", "no image has that id")
    etag = f'"{row["sha256"]}"'
    headers = {**HEADERS, "ETag": etag}
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    size = row["bytes"]
    whole = request.headers.get("if-range", etag) != etag
    asked = None if whole else byte_range(request.headers.get("range"), size)
    start, end = asked or (0, size)
    headers["Content-Length"] = str(end - start)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    status = 206 if asked else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=row["media_type"])
    if await resources.blobs.size(row["blob"]) != size:
        raise BlobMissing(f"the image {row['id']} is not in the blob store")
    return StreamingResponse(resources.blobs.read(row["blob"], start, end), status, headers, media_type=row["media_type"])
