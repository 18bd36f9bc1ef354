"""The file API of an upstream: uploads an input image and gives its link."""

import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_hex

from service.errors import EgressError
from service.net.egress_client import Egress
from service.net.multipart import form_edges
from service.net.responses import Response, retry_after
from service.net.transport import Content
from service.upstreams.base import UpstreamCall
from service.upstreams.lenient import USUAL_BYTES, document_of, readable, section_of, text_of
from service.upstreams.verdicts import why

LIFE_S = 72 * 3600  # how long the upstream keeps a file
MAX_LINK_CHARS = 2048
FOLDER = "darkroom"
# The upstream's own codes of a file that it will never take: too large, wrong type.
FINAL_CODES, NO_ROOM = ("40001", "40002"), "40003"


@dataclass(frozen=True, slots=True)
class Uploaded:
    """`expires_at` is in Unix seconds."""

    url: str
    file_id: str | None
    expires_at: float


@dataclass(frozen=True, slots=True)
class NotUploaded:
    """`final`: the upstream takes no such file. Otherwise another upload may succeed, after
    `retry_after` seconds.
    """

    reason: str
    final: bool = False
    retry_after: float | None = None
    throttled: bool = False
    full: bool = False  # the account has no room for another file


class FileApi:
    """Its calls are told to `on_call`. `timeout` is in seconds."""

    def __init__(
        self,
        egress: Egress,
        base_url: str,
        api_key: str,
        timeout: float,
        on_call: Callable[[UpstreamCall], None],
    ) -> None:
        self._egress, self._base_url = egress, base_url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}", "accept": "application/json"}
        self._timeout, self._on_call = timeout, on_call

    async def upload(
        self, content: AsyncIterator[bytes], size: int, name: str, media_type: str
    ) -> Uploaded | NotUploaded:
        """Uploads in pieces, under a name that must be unique: the upstream overwrites a file of
        that name. `size` is the length of the content.
        """
        boundary = token_hex(16)
        fields = {"uploadPath": FOLDER, "fileName": name}
        before, after = form_edges(boundary, name, media_type, **fields)
        headers = {
            "content-type": f"multipart/form-data; boundary={boundary}",
            "content-length": str(len(before) + size + len(after)),
        }

        async def body() -> AsyncIterator[bytes]:
            yield before
            async for piece in content:
                yield piece
            yield after

        path = "/api/v1/files/upload/stream"
        answer = await self._call("upload", "POST", path, headers, body())
        if isinstance(answer, EgressError):
            return NotUploaded(why(answer))
        return classify_upload(answer.status, answer.headers, answer.body, time.time())

    async def delete(self, file_id: str) -> bool:
        """Deletes the upstream's copy. False: it may still be there."""
        if not re.fullmatch("[A-Za-z0-9._-]{1,200}", file_id):
            return False
        answer = await self._call("delete_file", "DELETE", f"/api/v1/files/{file_id}", {}, None)
        return not isinstance(answer, EgressError) and answer.status in (200, 204, 404)

    async def _call(
        self, kind: str, method: str, path: str, headers: Mapping[str, str], body: Content | None
    ) -> Response | EgressError:
        started, answer = time.perf_counter(), None
        url, sent = self._base_url + path, {**headers, **self._headers}
        try:
            answer = await self._egress.request(
                method, url, headers=sent, content=body, timeout=self._timeout
            )
        except EgressError as error:
            return error
        finally:
            status = None if answer is None else answer.status
            word = "no_answer" if answer is None else "answered"
            self._on_call(UpstreamCall(kind, status, word, time.perf_counter() - started))
        return answer.failure or readable(answer, USUAL_BYTES)


def classify_upload(
    status: int, headers: Mapping[str, str], body: bytes, now: float
) -> Uploaded | NotUploaded:
    document = document_of(body) or {}
    data, code = section_of(document, "data"), document.get("code")
    url = text_of(data.get("file_url"), MAX_LINK_CHARS + 1)
    stored = 200 <= status < 300 and document.get("success") is not False
    if stored and url and len(url) <= MAX_LINK_CHARS and re.match(r"https?://[^/\s]", url):
        life = expiry_of(data.get("expires_at"), now)
        return Uploaded(url, text_of(data.get("file_id")), life)
    error = section_of(document, "error")
    message = text_of(document.get("msg"), 500) or text_of(error.get("message"), 500)
    final = 400 <= status < 500 and str(code) in FINAL_CODES
    reason = f"{status} {code if code is not None else ''} {message or ''}".strip()
    wait = retry_after(headers.get("retry-after"), now)
    full = str(code) == NO_ROOM
    return NotUploaded(reason, final, wait, throttled=status == 429, full=full)


def expiry_of(value: object, now: float) -> float:
    """When the upstream forgets a file. A time that cannot be read is 72 hours from now."""
    try:
        time = datetime.fromisoformat(str(value))
    except ValueError:
        return now + LIFE_S
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return min(time.timestamp(), now + LIFE_S)
