"""What S3 does besides: types for a public bucket, conditions, and a server that fails."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.blobs import s3
from service.blobs.s3 import S3Blobs
from service.errors import BlobMissing, BlobUnavailable
from tests.blobs import NAME, put, read


@pytest.fixture
async def blobs(s3_bucket: str, tmp_path: Path) -> S3Blobs:
    return await S3Blobs.open(
        f"s3://{s3_bucket}/some/prefix", tmp_path / "incoming", plain_http=True
    )


@pytest.fixture
async def bucket(s3_server: str, s3_bucket: str) -> AsyncIterator[httpx.AsyncClient]:
    """The bucket as anybody's HTTP client sees it."""
    async with httpx.AsyncClient(base_url=f"{s3_server}/{s3_bucket}", trust_env=False) as client:
        yield client


def every(blobs: S3Blobs) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Each thing that can be asked of the store."""

    async def listed() -> None:
        async for _ in blobs.listed():
            pass

    return {
        "put": lambda: put(blobs, NAME, b"x"),
        "put large": lambda: put(blobs, NAME, bytes(6 << 20)),
        "read": lambda: read(blobs, NAME),
        "size": lambda: blobs.size(NAME),
        "delete": lambda: blobs.delete(NAME),
        "list": listed,
        "check": blobs.check,
    }


@pytest.mark.parametrize("size", [1, 12 << 20])
async def test_an_object_has_its_type_and_its_name(
    blobs: S3Blobs, bucket: httpx.AsyncClient, size: int
) -> None:
    """What serves the bucket serves an image under the prefix and the blob's name, in one part or
    in several.
    """
    data = os.urandom(size)
    await put(blobs, NAME, data)
    answer = await bucket.get(f"/some/prefix/{NAME}")
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (
        200,
        "image/png",
        data,
    )
    assert answer.headers["etag"].endswith('-3"') is (
        size > s3.PART
    )  # as S3 marks an upload of three parts


@pytest.mark.parametrize("size", [1, 12 << 20])
async def test_an_object_that_is_there_is_not_written_again(blobs: S3Blobs, size: int) -> None:
    """A name says what its bytes are, so whatever has the right size stays as it is."""
    await put(blobs, NAME, b"x" * size)
    await put(blobs, NAME, b"y" * size)
    assert set(await read(blobs, NAME)) == set(b"x")


async def test_objects_of_others_are_left_out(blobs: S3Blobs, bucket: httpx.AsyncClient) -> None:
    """The bucket may hold more: outside of the prefix, and under names that are no blobs'."""
    for path in (
        "/other/task_a/0.png",
        "/some/prefixes/0.png",
        "/some/prefix/.hidden",
        "/some/prefix/a b",
    ):
        assert (await bucket.put(path, content=b"x")).status_code == 200
    await put(blobs, NAME, b"x")
    assert [blob.name async for page in blobs.listed() for blob in page] == [NAME]


async def test_a_bucket_that_is_not_there_is_unavailable(s3_bucket: str, tmp_path: Path) -> None:
    """It is known when it is asked for something; the text has neither address nor name."""
    blobs = await S3Blobs.open(f"s3://not-{s3_bucket}", tmp_path, plain_http=True)
    for name in ("put", "put large", "list", "check"):
        with pytest.raises(BlobUnavailable, match=r"^the object store answered 404 Not Found$"):
            await every(blobs)[name]()


async def test_plain_http_must_be_wanted(s3_bucket: str, tmp_path: Path) -> None:
    """Credentials and images don't leave in the clear unless the operator named such an address."""
    blobs = await S3Blobs.open(f"s3://{s3_bucket}", tmp_path)
    with pytest.raises(BlobUnavailable):
        await put(blobs, NAME, b"x")


@asynccontextmanager
async def saying(answer: bytes | None, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A server in place of S3 that gives each request this answer and hangs up; None: never a
    word.
    """
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is None:
            await over.wait()
        else:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            yield
        finally:
            over.set()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "did not answer in time"),
        (b"", "did not answer"),
        (
            b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            "answered 403 Forbidden",
        ),
        (
            b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            "answered 503 Service Unavailable",
        ),
    ],
)
async def test_a_server_that_fails_is_unavailable(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, said: str
) -> None:
    """Whatever is asked of it, in bounded time, with a short reason; it is worth another try and
    never taken for a missing image.
    """
    monkeypatch.setattr(s3, "ANSWER_S", 0.5 if answer is None else 30)
    monkeypatch.setattr(s3, "SLOWEST", 1 << 40)
    async with saying(answer, monkeypatch):
        blobs = await S3Blobs.open(f"s3://{s3_bucket}", tmp_path, plain_http=True)
        for ask in every(blobs).values():
            with pytest.raises(BlobUnavailable, match=f"^the object store {said}$") as caught:
                await ask()
            assert not isinstance(caught.value, BlobMissing)


async def test_an_answer_that_breaks_off_is_no_end(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer bytes than were promised are an error, not a shorter image."""
    head = (
        b"HTTP/1.1 206 Partial Content\r\ncontent-range: bytes 0-99/100\r\ncontent-length:"
        b' 100\r\netag: "x"\r\n'
    )
    monkeypatch.setattr(s3, "ANSWER_S", 2)
    async with saying(
        head + b"last-modified: Wed, 21 Oct 2026 07:28:00 GMT\r\nconnection: close\r\n\r\nhalf",
        monkeypatch,
    ):
        blobs = await S3Blobs.open(f"s3://{s3_bucket}", tmp_path, plain_http=True)
        with pytest.raises(BlobUnavailable):
            await read(blobs, NAME)


async def test_opening_asks_nothing_and_removes_what_a_dead_process_left(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service starts, and takes callbacks, while S3 is away; leftovers of uploads go."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    old, young = tmp_path / "old", tmp_path / "young"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    await S3Blobs.open(f"s3://{s3_bucket}", tmp_path, plain_http=True, spare=3600)
    assert (old.exists(), young.exists()) == (False, True)
    await S3Blobs.open(f"s3://{s3_bucket}", tmp_path, plain_http=True)
    assert not young.exists()


async def test_a_variable_that_is_unfit_is_told(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore reads the variables; what it says against one fits a line."""
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "perhaps")
    with pytest.raises(BlobUnavailable, match="perhaps") as caught:
        await S3Blobs.open(f"s3://{s3_bucket}", tmp_path)
    assert "\n" not in str(caught.value)
