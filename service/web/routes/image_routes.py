"""Stored images under names that cannot be guessed: no key, no cookies, and nothing in them can
run.
"""

import re

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.errors import ApiError, BlobMissing
from service.images import image_queries
from service.web.context import context_of
from service.web.error_responses import answer

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)
HEADERS = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "public, max-age=31536000, immutable",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


def byte_range(text: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last of a single range (RFC 9110, 14.1.2); empty: outside of
    the image. None: the whole.
    """
    match = RANGE.fullmatch(text) if text else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        return max(0, size - int(match[2])), size
    if match[2] and int(match[2]) < int(match[1]):
        return None
    return min(size, int(match[1])), min(size, int(match[2]) + 1) if match[2] else size


def names(tags: str, etag: str) -> bool:
    """Whether `If-None-Match` has this entity tag; a weak one counts as well."""
    return tags.strip() == "*" or etag in [
        tag.strip().removeprefix("W/") for tag in tags.split(",")
    ]


async def image(request: Request) -> Response:
    resources = context_of(request).resources
    row = await resources.store.read(image_queries.image_row, request.path_params["image_id"])
    if row is None:
        raise ApiError(404, "image_not_found", "no image has that id")
    if row["state"] == "erased":
        raise ApiError(410, "gone", "the image was erased, or its days are over")
    size, etag = row["bytes"], f'"{row["sha256"]}"'
    headers = {**HEADERS, "ETag": etag}
    if names(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    if await resources.blobs.size(row["blob"]) != size:
        raise BlobMissing(f"the image {row['id']} is not as it was stored")
    if request.method == "HEAD":
        return Response(
            headers={**headers, "Content-Length": str(size)}, media_type=row["media_type"]
        )
    asked = (
        byte_range(request.headers.get("range"), size)
        if request.headers.get("if-range", etag) == etag
        else None
    )
    start, end = asked or (0, size)
    if start >= end:
        unfit = {"Content-Range": f"bytes */{size}"}
        return answer(
            request,
            416,
            "range_not_satisfiable",
            f"the image has {size} bytes",
            unfit,
            param="Range",
        )
    headers["Content-Length"] = str(end - start)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return StreamingResponse(
        resources.blobs.read(row["blob"], start, end),
        206 if asked else 200,
        headers,
        media_type=row["media_type"],
    )
