"""The sandbox's files: the upstream's file API with its limits, in memory."""

import base64
import binascii
import io
import json
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import ApiError, EgressError
from service.net import Egress
from service.net.multipart import MultipartForm
from service.strict_json import JSON
from service.upstreams.sandbox.answers import Answer, json_answer
from service.upstreams.sandbox.faults import Faults
from service.upstreams.sandbox.wire import AnswerResponse

MAX_FILE, MAX_FILES = 100 << 20, 100
FETCH_S = 30.0
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
}
TOO_LARGE, WRONG_TYPE, NO_QUOTA, NOT_FETCHED = 40001, 40002, 40003, 40004
OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]")

Upload = tuple[bytes, str, str]  # content, name, folder


@dataclass(frozen=True, slots=True)
class SandboxFile:
    """`uploaded` and `expires` are Unix seconds."""

    id: str
    name: str
    folder: str
    content: bytes
    media_type: str
    uploaded: float
    expires: float


class FileRefused(Exception):
    """A refusal of the file API, with its own code."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(slots=True)
class SandboxFiles:
    """The routes of the file API, and the files of the account by folder and name.

    `authorise` raises ApiError for a wrong key. `clock` gives Unix seconds. `faults` are the
    sandbox's defaults: an upload names no faults of its own.
    """

    authorise: Callable[[Request], None]
    egress: Egress
    clock: Callable[[], float]
    faults: Faults
    life_s: float
    stored: dict[tuple[str, str], SandboxFile] = field(default_factory=dict)
    uploads: int = 0

    async def stream(self, request: Request) -> Response:
        """`POST /api/v1/files/upload/stream`: multipart with `file`, `uploadPath`, `fileName`."""
        return await self._upload(request, read_form)

    async def base64(self, request: Request) -> Response:
        """`POST …/base64`: JSON with `base64_data`, `upload_path`, `file_name`."""
        return await self._upload(request, read_base64)

    async def url(self, request: Request) -> Response:
        """`POST …/url`: JSON with `file_url`, `upload_path`, `file_name`."""
        return await self._upload(request, self._fetched)

    async def listed(self, request: Request) -> Response:
        self.authorise(request)
        number = int(request.query_params.get("page", 1))
        size = int(request.query_params.get("pageSize", 20))
        files = self.all()[::-1]
        shown = [document(file, request) for file in files[(number - 1) * size :][:size]]
        return success({"files": shown, "total": len(files), "page": number, "pageSize": size})

    async def quota(self, request: Request) -> Response:
        self.authorise(request)
        used = len(self.all())
        left = {"max_files": MAX_FILES, "remaining_files": MAX_FILES - used}
        return success({"total_files": used, "used_files": used, **left})

    async def delete(self, request: Request) -> Response:
        self.authorise(request)
        file = self.find(request.path_params["file_id"])
        if file is None:
            return failure(404, 404, "the file does not exist or has expired")
        del self.stored[file.folder, file.name]
        return success({"file_id": file.id})

    async def content(self, request: Request) -> Response:
        """The public link of a file."""
        file = self.find(request.path_params["file_id"])
        if file is None:
            raise ApiError(404, "not_found", "the file does not exist or has expired")
        return AnswerResponse(Answer(200, file.content, {"content-type": file.media_type}))

    def all(self) -> list[SandboxFile]:
        now = self.clock()
        self.stored = {key: file for key, file in self.stored.items() if file.expires > now}
        return list(self.stored.values())

    def find(self, file_id: str) -> SandboxFile | None:
        return next((file for file in self.all() if file.id == file_id), None)

    def lost(self, url: str) -> bool:
        """Whether a link names a file of this account that is not there any more."""
        match = re.search(r"/uploads/(file_[a-z0-9]{20})$", url)
        return match is not None and self.find(match[1]) is None

    async def _upload(
        self, request: Request, read: Callable[[Request], Awaitable[Upload]]
    ) -> Response:
        self.authorise(request)
        self.uploads += 1
        error = self.faults.get("upload_status")
        if error is not None and (page := error.answer(self.uploads - 1)) is not None:
            await read(request)
            return AnswerResponse(page)
        try:
            answer = success_answer(document(self._put(*await read(request)), request))
        except FileRefused as refusal:
            return failure(refusal.status, refusal.code, refusal.message)
        wait, lost = self.faults.get("upload_delay", 0), self.faults.get("lose_upload", False)
        return AnswerResponse(replace(answer, wait=wait, lost=lost))

    async def _fetched(self, request: Request) -> Upload:
        body = await read_object(request)
        try:
            answer = await self.egress.request(
                "GET", text(body, "file_url"), timeout=FETCH_S, max_bytes=MAX_FILE + 1
            )
        except EgressError as error:
            raise FileRefused(400, NOT_FETCHED, f"file_url cannot be fetched: {error}") from None
        if answer.status != 200:
            raise FileRefused(400, NOT_FETCHED, f"file_url answered {answer.status}")
        return answer.body, *names(body)

    def _put(self, content: bytes, name: str, folder: str) -> SandboxFile:
        """Stores a file. One of the same name is overwritten."""
        if len(content) > MAX_FILE:
            raise FileRefused(413, TOO_LARGE, f"a file has at most {MAX_FILE} bytes")
        media_type, now = type_of_image(content), self.clock()
        file_id = "file_" + "".join(random.choices(LETTERS, k=20))
        key = (folder.strip("/"), OTHER_CHARACTERS.sub("_", name)[-128:] or file_id)
        if key not in {(file.folder, file.name) for file in self.all()} and (
            len(self.stored) >= MAX_FILES
        ):
            raise FileRefused(403, NO_QUOTA, f"the account has {MAX_FILES} files already")
        life_s = self.faults.get("upload_ttl", self.life_s)
        file = SandboxFile(file_id, key[1], key[0], content, media_type, now, now + life_s)
        self.stored[key] = file
        return file


def type_of_image(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content), formats=tuple(TYPES)) as image:
            return TYPES["JPEG" if image.format == "MPO" else str(image.format)]
    except Exception:  # noqa: BLE001 - Pillow's plugins raise all kinds of errors
        message = f"the file is none of {', '.join(TYPES)}"
        raise FileRefused(400, WRONG_TYPE, message) from None


async def read_form(request: Request) -> Upload:
    parts: dict[str, bytes] = {}
    filename = ""
    try:
        form = MultipartForm(request.headers.get("content-type", ""), request.stream())
        async for part in form.parts():
            content = bytearray()
            async for chunk in part.content:
                content += chunk
                if len(content) > MAX_FILE:
                    raise FileRefused(413, TOO_LARGE, f"a file has at most {MAX_FILE} bytes")
            parts[part.name] = bytes(content)
            filename = part.filename or "" if part.name == "file" else filename
    except ValueError as error:
        raise ApiError(400, "invalid_request", str(error)) from None
    if "file" not in parts:
        raise ApiError(400, "invalid_parameter", "file is required", param="file")
    given = {name: parts.get(name, b"").decode("utf-8", "replace") for name in FORM_NAMES}
    return parts["file"], given["fileName"] or filename, given["uploadPath"]


FORM_NAMES = ("fileName", "uploadPath")


async def read_base64(request: Request) -> Upload:
    body = await read_object(request)
    data = text(body, "base64_data")
    try:
        content = base64.b64decode(data.partition(",")[2] if "," in data else data, validate=True)
    except (binascii.Error, ValueError):
        raise FileRefused(400, WRONG_TYPE, "base64_data is not base64") from None
    return content, *names(body)


async def read_object(request: Request) -> JSON:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    return body


def text(body: JSON, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ApiError(400, "invalid_parameter", f"{name} is required", param=name)
    return value


def names(body: JSON) -> tuple[str, str]:
    return str(body.get("file_name") or ""), str(body.get("upload_path") or "")


def document(file: SandboxFile, request: Request) -> JSON:
    link = f"{str(request.base_url).rstrip('/')}/uploads/{file.id}"
    return {
        "file_id": file.id,
        "file_name": file.name,
        "original_name": file.name,
        "file_size": len(file.content),
        "mime_type": file.media_type,
        "upload_path": file.folder,
        "file_url": link,
        "download_url": f"{link}?download=1",
        "upload_time": stamp(file.uploaded),
        "expires_at": stamp(file.expires),
    }


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def success_answer(data: JSON) -> Answer:
    return json_answer(200, {"success": True, "code": 200, "msg": "success", "data": data})


def success(data: JSON) -> Response:
    return AnswerResponse(success_answer(data))


def failure(status: int, code: int, message: str) -> Response:
    document = {"success": False, "code": code, "msg": message, "data": None}
    return AnswerResponse(json_answer(status, document))


def file_routes(files: SandboxFiles) -> list[Route]:
    api = "/api/v1/files"
    return [
        Route(f"{api}/upload/stream", files.stream, methods=["POST"]),
        Route(f"{api}/upload/base64", files.base64, methods=["POST"]),
        Route(f"{api}/upload/url", files.url, methods=["POST"]),
        Route(f"{api}/list", files.listed),
        Route(f"{api}/quota", files.quota),
        Route(api + "/{file_id}", files.delete, methods=["DELETE"]),
        Route("/uploads/{file_id}", files.content),
    ]
