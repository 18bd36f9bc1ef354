"""Input images of the caller: upload, list, show, content, erase."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from service.blobs.blob_store import check_size
from service.errors import ApiError, invalid_request
from service.net.multipart import FormPart, MultipartForm
from service.tasks.files import FileRow, file_document, file_list, stored_file
from service.upstreams.catalogue_fields import ImagesField, UnsupportedField
from service.upstreams.catalogue_images import COMMON, at_most
from service.web.auth import caller_of
from service.web.bodies import query_text, reader_of
from service.web.context import context_of, resources_of
from service.web.list_page import page
from service.web.routes.image_routes import HEADERS

UPLOAD_S = 120.0
AROUND = 2 << 20  # bytes of the body around the file
NAME_BYTES = 4096


async def upload(request: Request) -> Response:
    """Upload an input image."""
    flatten = query_text(request, "flatten", ("white",)) is not None
    row = await kept_part(request, model_rule(request), flatten=flatten)
    return JSONResponse(file_document(row), 201)


def model_rule(request: Request) -> ImagesField:
    """The limits of the model that the query names, or the common ones. Raises ApiError 400."""
    model, catalogue = query_text(request, "model"), context_of(request).intake.catalogue
    entry = catalogue.entry(model)
    if entry is not None and isinstance(entry.fields.get("image_urls"), UnsupportedField):
        raise invalid_request(f"model: {model} takes no input images", "model")
    return catalogue.image_rule(model)


async def kept_part(
    request: Request, rule: ImagesField = COMMON, *, flatten: bool = False
) -> FileRow:
    """The stored file of the part `file`. Raises ApiError 400, 408, 413, 415 and 503."""
    files, owner = context_of(request).files, caller_of(request).owner
    length, most = request.headers.get("content-length", ""), files.most(rule)
    if length.isdecimal() and int(length[:20]) > most + AROUND:
        raise too_large(most, f"of {length[:20]} bytes")
    try:
        async with (
            asyncio.timeout(UPLOAD_S) as timer,
            aclosing(bounded(request, timer, most)) as chunks,
        ):
            form = MultipartForm(request.headers.get("content-type", ""), chunks)
            async with aclosing(form.parts()) as parts:
                upload = UploadForm(parts)
                return await files.keep(owner, upload.name, upload.file(), rule, flatten=flatten)
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, "timeout", f"the body was not complete after {UPLOAD_S:g} s") from None
    except ValueError as error:
        media = "multipart/form-data" in str(error)
        status, code = (415, "unsupported_media_type") if media else (400, "invalid_request")
        raise ApiError(status, code, f"file: {error}", param="file") from None


@dataclass(slots=True)
class UploadForm:
    """A form with one part `file`. A part `fileName` of an upstream's client names the file."""

    parts: AsyncIterator[FormPart]
    filename: str | None = None
    renamed: str | None = None

    def name(self) -> str | None:
        return self.renamed or self.filename

    async def file(self) -> AsyncIterator[bytes]:
        """The content of the file. Raises ApiError 400 and ValueError, also at its end."""
        files = 0
        async for part in self.parts:
            if part.name == "fileName":
                self.renamed = (await beginning(part.content)).decode()
            elif part.name == "file":
                files, self.filename = files + 1, part.filename
                if files > 1:
                    raise ValueError("the form has two parts of that name, and each is one upload")
                async for chunk in part.content:
                    yield chunk
        if not files:
            message = "file is required: a part of the form"
            raise ApiError(400, "invalid_request", message, param="file")


async def beginning(content: AsyncIterator[bytes]) -> bytes:
    """A short text. ValueError: it is not short."""
    text = bytearray()
    async for piece in content:
        text += piece
        if len(text) > NAME_BYTES:
            raise ValueError(f"fileName has at most {NAME_BYTES} bytes")
    return bytes(text)


def too_large(most: int, size: str) -> ApiError:
    message = f"file: {at_most(most)}, and the body is one {size}"
    return ApiError(413, "file_too_large", message, param="file")


async def bounded(
    request: Request, timer: asyncio.Timeout, most: int
) -> AsyncGenerator[bytes, None]:
    """The body of a form with a file of at most so many bytes. Raises ApiError 413."""
    size, shedder, body = 0, context_of(request).shedder, request.state.body
    with shedder.idle(), shedder.bodies.arriving(body, *reader_of(request), timer):
        async for chunk in request.stream():
            size += len(chunk)
            if size > most + AROUND:
                raise too_large(most, f"of {size} bytes or more")
            yield chunk


async def files(request: Request) -> Response:
    """List input images, newest first."""
    rows = partial(file_list, now=resources_of(request).store.clock())
    return await page(request, rows, lambda row: (row.created_at, row.id), file_document)


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
    await check_size(blobs, row.blob, row.bytes, f"the file {row.id}")
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
