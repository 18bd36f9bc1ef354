"""The sandbox's files: the upstream's file API with its limits, in memory."""

import io
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import ApiError, ConnectionLost, EgressError
from service.net.egress_client import Egress
from service.strict_json import JSON
from service.upstreams.sandbox.answers import (
    Answer,
    AnswerResponse,
    ErrorPage,
    encoded,
    json_answer,
)
from service.upstreams.sandbox.checks import invalid, read_body
from service.upstreams.sandbox.faults import Faults
from service.upstreams.sandbox.upload_requests import (
    MAX_FILE,
    NO_QUOTA,
    NOT_FETCHED,
    TOO_LARGE,
    WRONG_TYPE,
    FileRefused,
    UploadRequest,
    read_base64,
    read_form,
    request_of,
    text,
)

MAX_FILES = 100
FETCH_S = 30.0
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]")


Content = bytes  # inside SandboxFile, `bytes` is a figure


@dataclass(frozen=True, slots=True)
class SandboxFile:
    """`uploaded` and `expires` are Unix seconds. `width` and `height` are pixels."""

    id: str
    name: str
    folder: str
    content: Content
    media_type: str
    width: int
    height: int
    alpha: bool
    uploaded: float
    expires: float

    @property
    def bytes(self) -> int:
        return len(self.content)


@dataclass(slots=True)
class SandboxFiles:
    """The routes of the file API, and the files of the account by folder and name.

    `authorise` raises ApiError for a wrong key. `clock` gives Unix seconds. `faults` gives those of
    an upload by what it asks for and its number, or raises ValueError.
    """

    authorise: Callable[[Request], None]
    egress: Egress
    inputs: Egress | None  # fetches the images of public links
    clock: Callable[[], float]
    faults: Callable[[object, int], Faults]
    life_s: float
    stored: dict[tuple[str, str], SandboxFile] = field(default_factory=dict)
    uploads: int = 0
    met: Counter[ErrorPage] = field(default_factory=Counter)

    async def stream(self, request: Request) -> Response:
        """`POST /api/v1/files/upload/stream`: multipart with `file`, `uploadPath`, `fileName`, and
        `sandbox` as JSON.
        """
        return await self._upload(request, read_form)

    async def base64(self, request: Request) -> Response:
        """`POST …/base64`: JSON with `base64_data`, `upload_path`, `file_name`, `sandbox`."""
        return await self._upload(request, read_base64)

    async def url(self, request: Request) -> Response:
        """`POST …/url`: JSON with `file_url`, `upload_path`, `file_name`, `sandbox`."""
        return await self._upload(request, self._fetched)

    async def listed(self, request: Request) -> Response:
        self.authorise(request)
        number = int(request.query_params.get("page", 1))
        size = int(request.query_params.get("pageSize", 20))
        files = self.all()[::-1]
        shown = [document(file, request) for file in files[(number - 1) * size :][:size]]
        return AnswerResponse(
            success({"files": shown, "total": len(files), "page": number, "pageSize": size})
        )

    async def quota(self, request: Request) -> Response:
        self.authorise(request)
        used = len(self.all())
        left = {"max_files": MAX_FILES, "remain_files": MAX_FILES - used}
        shown = {"user_group": "default", "total_files": used, "used_files": used}
        return AnswerResponse(success({**shown, **left}))

    async def delete(self, request: Request) -> Response:
        self.authorise(request)
        file = self.find(request.path_params["file_id"])
        if file is None:
            return failure(404, 404, "the file does not exist or has expired")
        del self.stored[file.folder, file.name]
        return AnswerResponse(success({"file_id": file.id}))

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

    def linked(self, url: str) -> SandboxFile | None:
        """The file of this account that a link names. Raises ApiError 400 if it is gone."""
        match = re.search(r"/uploads/(file_[a-z0-9]{20})$", url)
        file = None if match is None else self.find(match[1])
        if match is not None and file is None:
            raise invalid("image_urls", "a file of image_urls does not exist or has expired")
        return file

    async def named(self, url: str, param: str) -> SandboxFile | None:
        """The image that a submission names by a link of this API or by a public one. None: public
        links are not fetched. Raises ApiError 400 if there is no image.
        """
        if (file := self.linked(url)) is not None or self.inputs is None:
            return file
        try:
            answer = await self.inputs.request("GET", url, timeout=FETCH_S, max_bytes=MAX_FILE + 1)
            if answer.status != 200 or answer.failure is not None:
                raise ConnectionLost(f"it answered {answer.status}")
            (media_type, size, alpha), now = measured(answer.body), self.clock()
        except (EgressError, FileRefused) as error:
            raise invalid(param, f"{param}: {url[:200]} cannot be fetched: {error}") from None
        return SandboxFile("", "", "", answer.body, media_type, *size, alpha, now, now)

    async def _upload(
        self, request: Request, read: Callable[[Request], Awaitable[UploadRequest]]
    ) -> Response:
        self.authorise(request)
        self.uploads += 1
        try:
            upload = await read(request)
            faults = self.faults(upload.asked, self.uploads)
            answer = self._page(faults.get("upload_status"))
            if answer is None:
                file = self._put(upload, faults.get("upload_ttl", self.life_s))
                answer = success(document(file, request))
                answer = replace(answer, lost=faults.get("lose_upload", False))
        except FileRefused as refusal:
            return failure(refusal.status, refusal.code, refusal.message)
        except ValueError as wrong:
            raise invalid("sandbox", str(wrong)) from None
        wait, cut = faults.get("upload_delay", 0), faults.get("upload_cut")
        return AnswerResponse(replace(answer, wait=wait, cut=cut))

    def _page(self, page: ErrorPage | None) -> Answer | None:
        """The error that an upload gets. A code in digits is one of the file API's own."""
        if page is None:
            return None
        self.met[page] += 1
        answer = page.answer(self.met[page] - 1)
        if answer is None or not (page.code or "").isdecimal():
            return answer
        return replace(answer, body=encoded(refused_document(int(page.code or 0), "by a fault")))

    async def _fetched(self, request: Request) -> UploadRequest:
        body = read_body(await request.body())
        try:
            answer = await self.egress.request(
                "GET", text(body, "file_url"), timeout=FETCH_S, max_bytes=MAX_FILE + 1
            )
        except EgressError as error:
            raise FileRefused(400, NOT_FETCHED, f"file_url cannot be fetched: {error}") from None
        if answer.status != 200:
            raise FileRefused(400, NOT_FETCHED, f"file_url answered {answer.status}")
        return request_of(body, answer.body)

    def _put(self, upload: UploadRequest, life_s: float) -> SandboxFile:
        """Stores a file. One of the same name is overwritten."""
        content = upload.content
        if len(content) > MAX_FILE:
            raise FileRefused(413, TOO_LARGE, f"a file has at most {MAX_FILE} bytes")
        (media_type, size, alpha), now = measured(content), self.clock()
        expires = now + life_s
        file_id = "file_" + "".join(random.choices(LETTERS, k=20))
        name = OTHER_CHARACTERS.sub("_", upload.name)[-128:] or file_id
        key = (upload.folder.strip("/"), name)
        if key not in {(file.folder, file.name) for file in self.all()} and (
            len(self.stored) >= MAX_FILES
        ):
            raise FileRefused(403, NO_QUOTA, f"the account has {MAX_FILES} files already")
        file = SandboxFile(file_id, name, key[0], content, media_type, *size, alpha, now, expires)
        self.stored[key] = file
        return file


def measured(content: bytes) -> tuple[str, tuple[int, int], bool]:
    """The media type, width and height, and whether there is an alpha channel."""
    try:
        with Image.open(io.BytesIO(content), formats=tuple(TYPES)) as image:
            media_type = TYPES["JPEG" if image.format == "MPO" else str(image.format)]
            return media_type, image.size, bool(image.has_transparency_data)
    except Exception:  # noqa: BLE001 - Pillow's plugins raise all kinds of errors
        message = f"the file is none of {', '.join(TYPES)}"
        raise FileRefused(400, WRONG_TYPE, message) from None


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


def success(data: JSON) -> Answer:
    return json_answer(200, {"success": True, "code": 200, "msg": "success", "data": data})


def refused_document(code: int, message: str) -> JSON:
    return {"success": False, "code": code, "msg": message, "data": None}


def failure(status: int, code: int, message: str) -> Response:
    return AnswerResponse(json_answer(status, refused_document(code, message)))


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
