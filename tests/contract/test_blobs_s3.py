"""S3: content types, conditional writes, and a server that fails."""

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
    """A plain HTTP client of the bucket."""
    address = f"{s3_server}/{s3_bucket}"
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=60) as client:
        yield client


def every(blobs: S3Blobs) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Each call that a caller can make of the store."""

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
    """A server of the bucket finds the image under the prefix and the blob's name, uploaded in one
    part or in several.
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
    )  # S3 marks an upload of three parts in this way


@pytest.mark.parametrize("size", [1, 12 << 20])
async def test_an_object_that_exists_is_not_written_again(blobs: S3Blobs, size: int) -> None:
    """A name contains the hash of its bytes, so an object of the right size stays as it is."""
    await put(blobs, NAME, b"x" * size)
    await put(blobs, NAME, b"y" * size)
    assert set(await read(blobs, NAME)) == set(b"x")


async def test_a_listing_leaves_out_objects_that_are_no_blobs(
    blobs: S3Blobs, bucket: httpx.AsyncClient
) -> None:
    """The bucket may hold objects outside the prefix, or under names that no blob has."""
    for path in (
        "/other/task_a/0.png",
        "/some/prefixes/0.png",
        "/some/prefix/.hidden",
        "/some/prefix/a b",
    ):
        assert (await bucket.put(path, content=b"x")).status_code == 200
    await put(blobs, NAME, b"x")
    assert [blob.name async for page in blobs.listed() for blob in page] == [NAME]


async def test_a_missing_bucket_is_unavailable(s3_bucket: str, tmp_path: Path) -> None:
    """The first call of the store reports it. The text contains neither the address nor the
    bucket's name.
    """
    blobs = await S3Blobs.open(f"s3://not-{s3_bucket}", tmp_path, plain_http=True)
    for name in ("put", "put large", "list", "check"):
        with pytest.raises(BlobUnavailable, match=r"^the object store answered 404 Not Found$"):
            await every(blobs)[name]()


async def test_plain_http_must_be_allowed_by_the_operator(s3_bucket: str, tmp_path: Path) -> None:
    """The store sends no credentials and no images in the clear unless the operator named such an
    address.
    """
    blobs = await S3Blobs.open(f"s3://{s3_bucket}", tmp_path)
    with pytest.raises(BlobUnavailable):
        await put(blobs, NAME, b"x")


@asynccontextmanager
async def answering(answer: bytes | None, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A server in place of S3 that gives each request this answer and closes the connection. With
    None, it never answers.
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
    ("answer", "reason"),
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
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes | None,
    reason: str,
) -> None:
    """Each call fails in bounded time with a short reason. The caller may retry, and never takes
    the error for a missing image.
    """
    monkeypatch.setattr(s3, "ANSWER_S", 0.5 if answer is None else 30)
    monkeypatch.setattr(s3, "SLOWEST", 1 << 40)
    async with answering(answer, monkeypatch):
        blobs = await S3Blobs.open(f"s3://{s3_bucket}", tmp_path, plain_http=True)
        for ask in every(blobs).values():
            with pytest.raises(BlobUnavailable, match=f"^the object store {reason}$") as caught:
                await ask()
            assert not isinstance(caught.value, BlobMissing)


async def test_a_response_that_breaks_off_is_an_error(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response has fewer bytes than it promised. The reader raises an error and returns no
    shorter image.
    """
    head = (
        b"HTTP/1.1 206 Partial Content\r\ncontent-range: bytes 0-99/100\r\ncontent-length:"
        b' 100\r\netag: "x"\r\n'
    )
    monkeypatch.setattr(s3, "ANSWER_S", 2)
    async with answering(
        head + b"last-modified: Wed, 21 Oct 2026 07:28:00 GMT\r\nconnection: close\r\n\r\nhalf",
        monkeypatch,
    ):
        blobs = await S3Blobs.open(f"s3://{s3_bucket}", tmp_path, plain_http=True)
        with pytest.raises(BlobUnavailable):
            await read(blobs, NAME)


async def test_opening_sends_no_request_and_removes_temporary_files(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service starts and takes callbacks while S3 is away."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    old, young = tmp_path / "old", tmp_path / "young"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    await S3Blobs.open(f"s3://{s3_bucket}", tmp_path, plain_http=True, spare=3600)
    assert (old.exists(), young.exists()) == (False, True)
    await S3Blobs.open(f"s3://{s3_bucket}", tmp_path, plain_http=True)
    assert not young.exists()


async def test_a_bad_aws_variable_is_reported_in_one_line(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore reads the AWS variables. The store turns its message into one line."""
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "perhaps")
    with pytest.raises(BlobUnavailable, match="perhaps") as caught:
        await S3Blobs.open(f"s3://{s3_bucket}", tmp_path)
    assert "\n" not in str(caught.value)
