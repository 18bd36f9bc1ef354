"""Reads uploads to the sandbox's file API: a form, or JSON with base64 or with a link."""

import base64
import binascii
import json
from dataclasses import dataclass

from starlette.requests import Request

from service.errors import ApiError
from service.net.multipart import MultipartForm
from service.strict_json import JSON
from service.upstreams.sandbox.checks import invalid, read_body

MAX_FILE = 100 << 20
TOO_LARGE, WRONG_TYPE, NO_QUOTA, NOT_FETCHED = 40001, 40002, 40003, 40004
FORM_NAMES = ("fileName", "uploadPath", "sandbox")


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """`asked`: the faults that the upload asks for."""

    content: bytes
    name: str
    folder: str
    asked: object


class FileRefused(Exception):
    """A refusal of the file API, with its own code."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


async def read_form(request: Request) -> UploadRequest:
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
        raise invalid("file", "file is required")
    fields = {name: parts.get(name, b"").decode("utf-8", "replace") for name in FORM_NAMES}
    try:
        asked = json.loads(fields["sandbox"] or "null")
    except (ValueError, RecursionError):
        raise invalid("sandbox", "sandbox must be JSON") from None
    return UploadRequest(parts["file"], fields["fileName"] or filename, fields["uploadPath"], asked)


async def read_base64(request: Request) -> UploadRequest:
    body = read_body(await request.body())
    data = text(body, "base64_data")
    try:
        content = base64.b64decode(data.partition(",")[2] if "," in data else data, validate=True)
    except (binascii.Error, ValueError):
        raise FileRefused(400, WRONG_TYPE, "base64_data is not base64") from None
    return request_of(body, content)


def text(body: JSON, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise invalid(name, f"{name} is required")
    return value


def request_of(body: JSON, content: bytes) -> UploadRequest:
    name, folder = str(body.get("file_name") or ""), str(body.get("upload_path") or "")
    return UploadRequest(content, name, folder, body.get("sandbox"))
