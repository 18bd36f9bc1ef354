"""The upstream's own file API on our files, in its shape: its clients change their base URL."""

import binascii
from collections.abc import AsyncIterator, Awaitable, Callable

from sqlalchemy import Connection, func, select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.db.file_tables import files
from service.errors import ApiError, EgressError
from service.ids import rfc3339
from service.links import data_of, is_data
from service.strict_json import JSON
from service.tasks.files import FileRow, file_rows, select_files
from service.upstreams.catalogue_images import COMMON
from service.web.auth import caller_of
from service.web.bodies import parsed, read_body, read_model, validated
from service.web.context import context_of, resources_of
from service.web.file_schemas import EncodedUpload, LinkedUpload
from service.web.list_page import query_limit
from service.web.parameters import MAX_PAGE, MAX_PAGE_SIZE, PAGE_SIZE
from service.web.routes.file_routes import kept_part

MAX_JSON = 16 << 20  # bytes: a file of 10 MB in base64
MAX_FILES = 1_000_000  # shown only: clients compute with the numbers of a quota
FETCH_S = 30.0
TOO_LARGE, WRONG_FILE, NOT_FETCHED = 40001, 40002, 40004
CODES = {"file_too_large": TOO_LARGE, "body_too_large": TOO_LARGE, "not_fetched": NOT_FETCHED}


async def stream(request: Request) -> Response:
    """Upload an input image, as the upstream's clients do."""
    return await _answered(request, kept_part)


async def base64(request: Request) -> Response:
    """Upload an input image in base64, as the upstream's clients do."""

    async def keep(request: Request) -> FileRow:
        body = validated(EncodedUpload, await parsed(await read_body(request, MAX_JSON)))

        async def chunks() -> AsyncIterator[bytes]:
            data, body.base64_data = body.base64_data.strip(), ""
            try:
                yield data_of(data if is_data(data) else f"data:;base64,{data}")
            except (ValueError, binascii.Error):
                message = "base64_data is not base64"
                raise ApiError(400, "invalid_parameter", message) from None
            # The file is on disk. Nothing of the body is in memory while it waits for a decoder.
            del data
            context_of(request).shedder.bodies.forget(request.state.body)

        owner, keep = caller_of(request).owner, context_of(request).files.keep
        return await keep(owner, lambda: body.file_name, chunks(), COMMON, param="base64_data")

    return await _answered(request, keep)


async def url(request: Request) -> Response:
    """Upload an input image from a public link, as the upstream's clients do."""
    return await _answered(request, _keep_fetched)


async def _keep_fetched(request: Request) -> FileRow:
    body = await read_model(request, LinkedUpload)
    link = body.file_url
    name = body.file_name or link.partition("?")[0]
    egress, owner = resources_of(request).inputs, caller_of(request).owner
    try:
        async with egress.stream("GET", link, timeout=FETCH_S) as answer:
            if answer.status != 200:
                raise not_fetched(f"it answered {answer.status}")
            keep = context_of(request).files.keep
            return await keep(owner, lambda: name, answer.chunks(), COMMON, param="file_url")
    except EgressError as error:
        raise not_fetched(str(error)) from None


def not_fetched(reason: str) -> ApiError:
    return ApiError(400, "not_fetched", f"file_url cannot be fetched: {reason}", param="file_url")


async def _answered(request: Request, keep: Callable[[Request], Awaitable[FileRow]]) -> Response:
    try:
        return success(shown(request, await keep(request)))
    except ApiError as error:
        if error.status >= 500 or error.status == 408:
            raise
        code = CODES.get(error.code, WRONG_FILE if error.param else error.status)
        document = {"success": False, "code": code, "msg": error.message, "data": None}
        return JSONResponse(document, error.status)


async def listed(request: Request) -> Response:
    """List input images, as the upstream's clients do."""
    number = query_limit(request, "page", 1, MAX_PAGE)
    size = query_limit(request, "pageSize", PAGE_SIZE, MAX_PAGE_SIZE)
    owner, now = caller_of(request).owner, resources_of(request).store.clock()

    def read(connection: Connection) -> tuple[int, list[FileRow]]:
        mine = select_files(now).where(files.c.owner == owner)
        total = connection.scalar(select(func.count()).select_from(mine.subquery())) or 0
        mine = mine.order_by(files.c.created_at.desc(), files.c.id.desc())
        return total, file_rows(connection, mine.limit(size).offset((number - 1) * size))

    total, rows = await resources_of(request).store.read(read)
    data = {"files": [shown(request, row) for row in rows], "total": total}
    return success({**data, "page": number, "pageSize": size})


async def quota(request: Request) -> Response:
    """Show the number of input images, as the upstream's clients do. There is no limit."""
    owner, now = caller_of(request).owner, resources_of(request).store.clock()

    def read(connection: Connection) -> int:
        mine = select_files(now).where(files.c.owner == owner).subquery()
        return connection.scalar(select(func.count()).select_from(mine)) or 0

    used = await resources_of(request).store.read(read)
    left = {"max_files": MAX_FILES, "remain_files": max(0, MAX_FILES - used)}
    data = {"user_group": "default", "total_files": used, "used_files": used, **left}
    return success({**data, "max_file_size": COMMON.max_bytes})


async def delete(request: Request) -> Response:
    """Erase an input image, as the upstream's clients do."""
    file_id = request.path_params["file_id"]
    if await context_of(request).files.erase(file_id, caller_of(request).sees):
        return success({"file_id": file_id})
    document = {"success": False, "code": 404, "msg": "no file of yours has that id", "data": None}
    return JSONResponse(document, 404)


def shown(request: Request, row: FileRow) -> JSON:
    link = f"{resources_of(request).links.base_url}/v1/files/{row.id}/content"
    return {
        "file_id": row.id,
        "file_name": row.filename,
        "original_name": row.filename,
        "file_size": row.bytes,
        "mime_type": row.media_type,
        "upload_path": "",
        "file_url": link,
        "download_url": link,
        "upload_time": rfc3339(row.created_at),
        "expires_at": rfc3339(row.expires_at),
    }


def success(data: JSON) -> Response:
    return JSONResponse({"success": True, "code": 200, "msg": "success", "data": data})
