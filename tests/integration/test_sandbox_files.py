"""The sandbox's faults in result files, as a client sees them on the wire. A flag or a request sets
them.
"""

import asyncio
import io
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image, UnidentifiedImageError

from tests.sandbox import WAYS, faulty

pytestmark = pytest.mark.slow


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


async def connected(link: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, dict[str, str]]:
    """A connection that has requested a file and read the head of the answer, and the header
    fields.
    """
    url = httpx.URL(link)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"GET {url.raw_path.decode()} HTTP/1.1\r\nhost: {url.host}\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[1:-1]
    return (
        reader,
        writer,
        {name: value for name, _, value in (line.partition(": ") for line in head)},
    )


async def on_the_wire(link: str) -> tuple[int, bytes]:
    """The announced length, and all bytes until the connection ends."""
    reader, writer, headers = await connected(link)
    content = await asyncio.wait_for(reader.read(-1), 30)
    writer.close()
    return int(headers["content-length"]), content


# --- contents
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
async def test_format_is_that_of_the_files(way: str, format: str) -> None:
    """The extension, the media type and the content agree."""
    async with faulty(way, format=format) as here:
        file = await here.file()
    assert (str(file.url)[-len(format) :], file.headers["content-type"]) == (
        format,
        f"image/{format}",
    )
    assert (opened(file.content).format, opened(file.content).size) == (format.upper(), (768, 768))


@pytest.mark.parametrize(
    ("content", "type", "begins"),
    [
        ("html", "text/html; charset=utf-8", b"<!DOCTYPE html>"),
        ("svg", "image/svg+xml", b"<svg "),
        ("empty", "image/png", b""),
    ],
)
async def test_a_file_can_be_no_picture_at_all(
    way: str, content: str, type: str, begins: bytes
) -> None:
    """The file is an HTML page or an SVG, both with a script, or it is empty. The status is 200."""
    async with faulty(way, file_content=content) as here:
        file = await here.file()
    assert (file.status_code, file.headers["content-type"], file.content[: len(begins)]) == (
        200,
        type,
        begins,
    )
    assert (b"<script>" in file.content) == (file.content != b"")


@pytest.mark.parametrize("content", ["noise", "truncated"])
async def test_a_file_can_be_a_broken_picture(way: str, content: str) -> None:
    """Status, media type and length are right, but the bytes are noise or end in the middle of the
    picture.
    """
    async with faulty(way, file_content=content) as here:
        file = await here.file()
    assert (
        file.status_code,
        file.headers["content-type"],
        int(file.headers["content-length"]),
    ) == (200, "image/png", len(file.content))
    with pytest.raises(UnidentifiedImageError if content == "noise" else OSError):
        opened(file.content)


def inflated(png: bytes) -> int:
    """The number of pixel bytes in a PNG with one IDAT chunk."""
    start = png.index(b"IDAT")
    rest, size = png[start + 4 : start + 4 + int.from_bytes(png[start - 4 : start])], 0
    opener = zlib.decompressobj()
    while not opener.eof:
        size += len(opener.decompress(rest, 1 << 20))
        rest = opener.unconsumed_tail
    return size


async def test_a_bomb_decodes_to_enormous_pixels(way: str) -> None:
    """A file of under 200 kB really holds 900 million pixels of one bit."""
    async with faulty(way, file_content="bomb") as here:
        file = await here.file()
    assert (file.headers["content-type"], len(file.content) < 200_000) == ("image/png", True)
    assert inflated(file.content) == 30_000 * (1 + 30_000 // 8)
    with pytest.raises(Image.DecompressionBombError, match="900000000 pixels"):
        opened(file.content)


async def test_a_claimed_bomb_has_next_to_nothing_in_it(way: str) -> None:
    """The header claims 900 million pixels, but the file holds one row."""
    async with faulty(way, file_content="claimed_bomb") as here:
        file = await here.file()
    assert (len(file.content) < 1000, inflated(file.content)) == (True, 1 + 30_000 // 8)
    with pytest.raises(Image.DecompressionBombError):
        opened(file.content)


@pytest.mark.parametrize("format", ["gif", "png", "webp"])
async def test_a_file_can_be_animated(way: str, format: str) -> None:
    """Each of the three formats has three frames and its own media type."""
    async with faulty(way, file_content=f"animated_{format}") as here:
        file = await here.file()
    picture: Any = opened(file.content)
    assert (file.headers["content-type"], picture.format, picture.n_frames) == (
        f"image/{format}",
        format.upper(),
        3,
    )


async def test_a_polyglot_is_a_picture_and_a_page(way: str) -> None:
    """A whole picture is followed by HTML."""
    async with faulty(way, file_content="polyglot") as here:
        file = await here.file()
    assert (opened(file.content).format, file.headers["content-type"]) == ("PNG", "image/png")
    assert file.content.endswith(b"</html>\n")


@pytest.mark.parametrize("type", ["text/html", "image/jpeg", "text/plain; charset=utf-8", "absent"])
async def test_file_type_lies_about_the_type(way: str, type: str) -> None:
    """The given media type replaces the true one for every content. `absent` removes the header."""
    async with faulty(way, file_type=type) as here:
        file = await here.file()
        forged = await here.file(sandbox={"file_content": "svg"})
    assert [answer.headers.get("content-type", "absent") for answer in (file, forged)] == [type] * 2
    assert (opened(file.content).format, forged.content[:4]) == ("PNG", b"<svg")


# --- the wire
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [1, 5000, -1, -5000, -(1 << 30)])
async def test_file_length_lies_about_the_length(way: str, excess: int) -> None:
    """The announced length differs from the real one. All bytes of the file come, and then the
    connection ends.
    """
    async with faulty(way, file_length=excess) as here:
        (link,) = (await here.finished())["results"]
        announced, content = await on_the_wire(link)
    assert opened(content).size == (768, 768)
    assert announced == max(0, len(content) + excess)


@pytest.mark.parametrize("cut", [0, 1, 1000])
async def test_file_cut_breaks_files_off(way: str, cut: int) -> None:
    """The header announces the whole file, but the connection ends after the given number of bytes.
    A shorter file comes whole.
    """
    async with faulty(way, file_cut=cut) as here:
        (link,) = (await here.finished())["results"]
        announced, content = await on_the_wire(link)
        (whole,) = (await here.finished(sandbox={"file_cut": 1 << 30}))["results"]
        assert opened((await here.client.get(whole)).content).size == (768, 768)
    assert (len(content), announced > 1000) == (cut, True)


async def test_file_stall_stops_in_the_middle(way: str) -> None:
    """Half of the file comes, and then the open connection is silent. A client that leaves does not
    keep the sandbox from stopping.
    """
    async with asyncio.timeout(60), faulty(way, file_stall=3600) as here:
        (link,) = (await here.finished())["results"]
        reader, writer, headers = await connected(link)
        half = await reader.readexactly(int(headers["content-length"]) // 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        writer.close()
        file = await here.file(sandbox={"file_stall": 0.01})
    assert (half[:4], opened(file.content).size) == (b"\x89PNG", (768, 768))


async def test_file_status_fails_each_file_for_a_while(way: str) -> None:
    """The sandbox counts requests per file and answers with the given code."""
    async with faulty(
        way, file_status={"status": 403, "code": "access_denied", "times": 1}
    ) as here:
        for link in (await here.finished(n=2))["results"]:
            answers = [await here.client.get(link) for _ in range(2)]
            assert [answer.status_code for answer in answers] == [403, 200]
            assert answers[0].json()["error"]["code"] == "access_denied"


async def test_file_times_ends_the_faults_of_a_file(way: str) -> None:
    """Only the first `file_times` requests for each file meet the faults."""
    async with faulty(way, file_content="html", file_type="image/png", file_times=2) as here:
        for link in (await here.finished(n=2))["results"]:
            files = [(await here.client.get(link)).content for _ in range(3)]
            assert [file[:4] for file in files] == [b"<!DO", b"<!DO", b"\x89PNG"]


async def test_link_ttl_lets_links_die_early(way: str) -> None:
    """An expired link answers 404. Links of other tasks still work."""
    async with faulty(way, link_ttl=0) as here:
        assert (await here.file()).status_code == 404
        assert (await here.file(sandbox={"link_ttl": None})).status_code == 200


# --- redirects
# --------------------------------------------------------------------------------------------------


async def test_a_link_can_redirect_to_another_path_of_the_file(way: str) -> None:
    """The other path serves the file with the remaining faults of the task."""
    async with faulty(way, file_redirect="path", file_type="image/gif") as here:
        first = await here.file()
        file = await here.client.get(first.headers["location"])
    assert (first.status_code, file.status_code, file.headers["content-type"]) == (
        302,
        200,
        "image/gif",
    )
    assert file.url.path == first.url.path.replace("/files/", "/moved/")
    assert opened(file.content).size == (768, 768)


async def test_a_link_can_redirect_to_itself_for_ever(way: str) -> None:
    """Only a client that counts redirects leaves the loop."""
    async with faulty(way, file_redirect="loop") as here:
        (link,) = (await here.finished())["results"]
        with pytest.raises(httpx.TooManyRedirects):
            await here.client.get(link, follow_redirects=True)
        assert (await here.client.get(link)).headers["location"] == httpx.URL(link).path


@pytest.mark.parametrize(
    ("aim", "scheme", "host"),
    [
        ("host", "https", "results.example"),
        ("private", "http", "10.0.0.1"),
        ("http://169.254.169.254/latest", "http", "169.254.169.254"),
        ("file:///etc/passwd", "file", ""),
    ],
)
async def test_a_link_can_redirect_anywhere(way: str, aim: str, scheme: str, host: str) -> None:
    """The target is a foreign host, a private address or a given URL."""
    async with faulty(way, file_redirect=aim) as here:
        answer = await here.file()
    location = httpx.URL(answer.headers["location"])
    assert (answer.status_code, location.scheme, location.host) == (302, scheme, host)
