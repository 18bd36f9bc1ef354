"""Input images of the caller: upload, list, show, content, erase."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from sqlalchemy import Connection
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from service.db.paging import Selection
from service.errors import ApiError, BlobMissing
from service.net.multipart import MultipartForm
from service.tasks.files import FileRow, file_document, file_list, stored_file
from service.web.auth import caller_of
from service.web.bodies import Position, page, query_text, reader_of
from service.web.context import context_of, resources_of
from service.web.key_shares import holder_of
from service.web.routes.image_routes import HEADERS

UPLOAD_S = 120.0
MAX_UPLOAD = 12 << 20  # bytes of the whole body: a file of 10 MB, and what is around it


async def upload(request: Request) -> Response:
    """Upload an input image."""
    flatten = query_text(request, "flatten", ("white",)) is not None
    row = await kept_part(request, flatten=flatten)
    return JSONResponse(file_document(row), 201)


async def kept_part(request: Request, *, flatten: bool = False) -> FileRow:
    """The stored file of the part `file`. Raises ApiError 400, 408, 413, 415 and 503."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_UPLOAD:
        message = f"file: the body has at most {MAX_UPLOAD} bytes, and this one has {int(length)}"
        raise ApiError(413, "file_too_large", message, param="file")
    files, owner = context_of(request).files, caller_of(request).owner
    try:
        async with asyncio.timeout(UPLOAD_S) as timer, aclosing(bounded(request, timer)) as chunks:
            form = MultipartForm(request.headers.get("content-type", ""), chunks)
            async with aclosing(form.parts()) as parts:
                name = None
                async for part in parts:
                    if part.name == "file":
                        name, body = name or part.filename, part.content
                        return await files.keep(owner, name, body, flatten=flatten)
                    if part.name == "fileName":  # as the upstream's clients send it
                        name = b"".join([piece async for piece in part.content]).decode()
    except (TimeoutError, ClientDisconnect):
        message = f"the body was not complete after {UPLOAD_S:g} s"
        raise ApiError(408, "timeout", message) from None
    except ValueError as error:
        media = "multipart/form-data" in str(error)
        status, code = (415, "unsupported_media_type") if media else (400, "invalid_request")
        raise ApiError(status, code, f"file: {error}", param="file") from None
    raise ApiError(400, "invalid_request", "file is required: a part of the form", param="file")


async def bounded(request: Request, timer: asyncio.Timeout) -> AsyncGenerator[bytes, None]:
    size, shedder, body = 0, context_of(request).shedder, request.state.body
    reading = shedder.bodies.arriving(body, *reader_of(request), timer)
    with shedder.idle(holder_of(request)), reading:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_UPLOAD:
                message = f"file: the body has at most {MAX_UPLOAD} bytes, and this one has more"
                raise ApiError(413, "file_too_large", message, param="file")
            yield chunk


async def files(request: Request) -> Response:
    """List input images, newest first."""
    now = resources_of(request).store.clock()

    def rows(connection: Connection, wanted: Selection) -> list[FileRow]:
        return file_list(connection, wanted, now)

    def position(row: FileRow) -> Position:
        return row.created_at, row.id

    return await page(request, rows, position, file_document)


async def known_file(request: Request) -> FileRow:
    store, owner = resources_of(request).store, caller_of(request).sees
    row = await store.read(stored_file, request.path_params["file_id"], owner, store.clock())
    if row is None:
        raise unknown_file()
    return row


def unknown_file() -> ApiError:
    return ApiError(404, "file_not_found", "no file of yours has that id")


async def file(request: Request) -> Response:
    """Show an input image."""
    return JSONResponse(file_document(await known_file(request)))


async def content(request: Request) -> Response:
    """Show the content of an input image."""
    row, blobs = await known_file(request), resources_of(request).blobs
    assert row.blob is not None
    if await blobs.size(row.blob) != row.bytes:
        raise BlobMissing(f"the file {row.id} is not as it was stored")
    headers = {
        "Content-Length": str(row.bytes),
        "Content-Security-Policy": HEADERS["Content-Security-Policy"],
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, max-age=3600",
        "ETag": f'"{row.sha256}"',
    }
    if request.method == "HEAD":
        return Response(headers=headers, media_type=row.media_type)
    return StreamingResponse(blobs.read(row.blob), headers=headers, media_type=row.media_type)


async def delete(request: Request) -> Response:
    """Erase an input image."""
    files, sees = context_of(request).files, caller_of(request).sees
    if not await files.erase(request.path_params["file_id"], sees):
        raise unknown_file()
    return Response(status_code=204)
