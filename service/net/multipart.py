"""multipart/form-data (RFC 7578), read in pieces and written around a file. No part is ever whole
in memory.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser

HEAD_BYTES = 8192
BOUNDARY_CHARS = 70


@dataclass(frozen=True, slots=True)
class FormPart:
    """A part's head. Its `content` is read before the next part."""

    name: str
    filename: str | None
    content: AsyncIterator[bytes]


class MultipartForm:
    """The parts of a body. ValueError: the body is not as its boundary says."""

    def __init__(self, content_type: str, chunks: AsyncIterator[bytes]) -> None:
        head = Message()
        head["content-type"] = content_type
        boundary = head.get_boundary()
        if head.get_content_type() != "multipart/form-data" or not boundary:
            raise ValueError("the body must be multipart/form-data with a boundary")
        if len(boundary) > BOUNDARY_CHARS or not boundary.isascii():
            raise ValueError(f"the boundary has at most {BOUNDARY_CHARS} ASCII characters")
        self._mark = b"\r\n--" + boundary.encode("ascii")
        self._chunks = chunks
        self._buffer = bytearray(b"\r\n")  # the first boundary may come without a line end

    async def parts(self) -> AsyncGenerator[FormPart, None]:
        content = self._until(self._mark)  # the preamble
        while True:
            async for _ in content:
                pass  # what the caller did not read
            while len(self._buffer) < len(b"--"):
                await self._more()
            if self._buffer.startswith(b"--"):
                return
            head = await self._head()
            name = head.get_param("name", header="content-disposition")
            if head.get_content_disposition() != "form-data" or not isinstance(name, str):
                raise ValueError("a part has no form-data name")
            content = self._until(self._mark)
            yield FormPart(name, head.get_filename(), content)

    async def _head(self) -> Message:
        """The header fields of a part. They begin with the line end of the boundary."""
        head = bytearray()
        async for piece in self._until(b"\r\n\r\n"):
            head += piece
            if len(head) > HEAD_BYTES:
                raise ValueError(f"a part's head has more than {HEAD_BYTES} bytes")
        line, _, text = head.partition(b"\r\n")
        if line.strip(b" \t"):
            raise ValueError("a boundary has no line end behind it")
        return HeaderParser().parsestr(text.decode("utf-8", "replace"))

    async def _until(self, mark: bytes) -> AsyncIterator[bytes]:
        """The bytes before the mark, which is removed too."""
        while (at := self._buffer.find(mark)) < 0:
            ready = len(self._buffer) - len(mark) + 1
            if ready > 0:
                piece = bytes(self._buffer[:ready])
                del self._buffer[:ready]
                yield piece
            await self._more()
        piece = bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
        yield piece

    async def _more(self) -> None:
        try:
            self._buffer += await anext(self._chunks)
        except StopAsyncIteration:
            raise ValueError("the body ends before its last boundary") from None


def form_edges(boundary: str, filename: str, media_type: str, **fields: str) -> tuple[bytes, bytes]:
    """A form with these fields and a file, before and after the content of the file. The file's
    name is written as in WHATWG HTML, 4.10.22.
    """
    name = filename.replace("\n", "%0A").replace("\r", "%0D").replace('"', "%22")
    parts = [f'name="{field}"\r\n\r\n{value}\r\n' for field, value in fields.items()]
    parts.append(f'name="file"; filename="{name}"\r\ncontent-type: {media_type}\r\n\r\n')
    head = f"--{boundary}\r\ncontent-disposition: form-data; "
    before = "".join(head + part for part in parts)
    return before.encode("utf-8", "replace"), f"\r\n--{boundary}--\r\n".encode()
