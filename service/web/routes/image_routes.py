"""Stored images. Their names are unguessable and need no key. A browser runs nothing in them."""

import re

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.blobs.blob_store import check_size
from service.errors import ApiError
from service.images.downloads import shown_image
from service.signing import LinkSigner
from service.web.context import resources_of
from service.web.error_responses import error_response
from service.web.published import has_tag

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)
# A link may end like a file's name. The content type is that of the stored image.
EXTENSION = re.compile(
    r"\.(apng|avif|bmp|gif|hei[cf]|ico|jfif|jpe?g?|jxl|png|svg|tiff?|webp)", re.IGNORECASE
)
HEADERS = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "public, max-age=31536000, immutable",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


def byte_range(text: str | None, size: int) -> tuple[int, int] | None:
    """Start and end of a range (RFC 9110, 14.1.2). Empty: outside. None: the whole image."""
    match = RANGE.fullmatch(text) if text else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        return max(0, size - int(match[2])), size
    if match[2] and int(match[2]) < int(match[1]):
        return None
    return min(size, int(match[1])), min(size, int(match[2]) + 1) if match[2] else size


def link_left_s(query: QueryParams, signer: LinkSigner, image_id: str) -> int:
    """How long a link still lives. Raises ApiError 403."""
    left_s = signer.left_s(image_id, query.get("expires", ""), query.get("signature", ""))
    if left_s is None:
        raise ApiError(403, "link_not_signed", "no key of this service signed the link")
    if left_s <= 0:
        message = f"the link expired {-left_s} s ago; read the task again for a new one"
        raise ApiError(403, "link_expired", message, param="expires")
    return left_s


async def image(request: Request) -> Response:
    """Show a stored image."""
    resources, lives = resources_of(request), HEADERS["Cache-Control"]
    id, dot, extension = request.path_params["image_id"].partition(".")
    if signer := resources.link_signer:
        lives = f"public, max-age={link_left_s(request.query_params, signer, id)}, immutable"
    valid = EXTENSION.fullmatch(dot + extension) if dot else True
    row = await resources.store.look_up(shown_image, id) if valid else None
    if row is None:
        raise ApiError(404, "image_not_found", "no image has that id")
    if row.state == "erased" or row.blob is None or row.bytes is None:
        raise ApiError(410, "gone", "the image was erased, or its days are over")
    size, media_type, etag = row.bytes, row.media_type, f'"{row.sha256}"'
    headers = {**HEADERS, "Cache-Control": lives, "ETag": etag}
    if has_tag(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    await check_size(resources.blobs, row.blob, size, f"the image {row.id}")
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(size)}, media_type=media_type)
    same = request.headers.get("if-range", etag) == etag
    asked = byte_range(request.headers.get("range"), size) if same else None
    start, end = asked or (0, size)
    if start >= end:
        unfit, message = {"Content-Range": f"bytes */{size}"}, f"the image has {size} bytes"
        return error_response(request, 416, "range_not_satisfiable", message, unfit, param="Range")
    headers["Content-Length"] = str(end - start)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    chunks = resources.blobs.read(row.blob, start, end)
    return StreamingResponse(chunks, 206 if asked else 200, headers, media_type=media_type)
