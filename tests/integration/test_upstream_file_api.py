"""The upstream's own file API, as the sandbox has it and as the service serves it: a client of the
upstream changes only its base URL.
"""

import base64
from typing import Any

import httpx
import pytest

from tests.api import SUBMIT, UNTIL_DONE, got
from tests.inputs import of_length, photo
from tests.world import World

UPLOAD = "/api/v1/files/upload"
FIELDS = {
    "file_id",
    "file_name",
    "file_size",
    "mime_type",
    "file_url",
    "download_url",
    "expires_at",
}
JSON = dict[str, Any]


@pytest.fixture(params=["service", "upstream"])
def client(here: World, request: pytest.FixtureRequest) -> httpx.AsyncClient:
    return here.client if request.param == "service" else here.sandbox


def data_of(answer: httpx.Response) -> JSON:
    document = answer.json()
    assert (answer.status_code, document["success"], document["code"]) == (200, True, 200), document
    data: JSON = document["data"]
    return data


def refused(answer: httpx.Response, status: int, code: int) -> str:
    document = answer.json()
    assert (answer.status_code, document["success"]) == (status, False), document
    assert (document["code"], document["data"]) == (code, None), document
    return str(document["msg"])


async def uploads(client: httpx.AsyncClient, content: bytes) -> list[JSON]:
    """The same picture in all three ways. The third takes the link of the second."""
    form = {"file": ("photo.png", content)}
    text = base64.b64encode(content).decode()
    return [
        data_of(await client.post(f"{UPLOAD}/stream", files=form, data={"fileName": "night.png"})),
        data_of(
            await client.post(f"{UPLOAD}/base64", json={"base64_data": text, "file_name": "a.png"})
        ),
        data_of(
            await client.post(
                f"{UPLOAD}/base64", json={"base64_data": f"data:image/png;base64,{text}"}
            )
        ),
    ]


async def test_the_three_ways_of_an_upload_answer_alike(client: httpx.AsyncClient) -> None:
    for data in await uploads(client, photo()):
        assert data.keys() >= FIELDS
        assert (data["file_size"], data["mime_type"]) == (len(photo()), "image/png")
        listed = data_of(await client.get("/api/v1/files/list", params={"page": 1, "pageSize": 50}))
        assert data["file_id"] in [each["file_id"] for each in listed["files"]]
        used = data_of(await client.get("/api/v1/files/quota"))["total_files"]
        assert used == listed["total"]
        path = f"/api/v1/files/{data['file_id']}"
        assert data_of(await client.delete(path))["file_id"] == data["file_id"]
        refused(await client.delete(path), 404, 404)


PART = 'content-disposition: form-data; name="{}"'


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ((), "a.png"),
        ((("fileName", "night.png"),), "night.png"),
        ((("uploadPath", "in"), ("fileName", "七.png")), "七.png"),
        ((("fileName", ""),), "a.png"),
    ],
)
async def test_the_name_of_an_upload_may_come_behind_the_file(
    here: World, fields: list[tuple[str, str]], name: str
) -> None:
    """As the clients of the upstream send it."""
    head = PART.format("file") + '; filename="a.png"\r\n\r\n'
    parts = [head.encode() + photo()]
    parts += [f"{PART.format(field)}\r\n\r\n{value}".encode() for field, value in fields]
    body = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
    form = {"content-type": "multipart/form-data; boundary=x"}
    answer = await here.client.post(f"{UPLOAD}/stream", content=body, headers=form)
    assert data_of(answer)["file_name"] == name


async def test_the_quota_has_numbers_to_compute_with(client: httpx.AsyncClient) -> None:
    """Clients of the upstream ask whether there is room for one more file."""
    data = data_of(await client.get("/api/v1/files/quota"))
    assert data["used_files"] + data["remain_files"] == data["max_files"]
    assert data["remain_files"] > 0
    assert isinstance(data["user_group"], str)


async def test_the_link_of_an_upload_works_in_image_urls(here: World) -> None:
    form = {"file": ("photo.png", photo())}
    link = data_of(await here.client.post(f"{UPLOAD}/stream", files=form))["file_url"]
    body = {"model": "wan2.5-image-to-image", "prompt": "x", "size": "768x768"}
    task = got(
        await here.client.post(SUBMIT, json={**body, "image_urls": [link]}, headers=UNTIL_DONE)
    )
    assert task["state"] == "completed"


async def test_a_picture_is_fetched_from_a_link(here: World) -> None:
    form = {"file": ("photo.png", photo())}
    link = data_of(await here.sandbox.post(f"{UPLOAD}/stream", files=form))["file_url"]
    for client in (here.client, here.sandbox):
        data = data_of(await client.post(f"{UPLOAD}/url", json={"file_url": link}))
        assert data["file_size"] == len(photo())


@pytest.mark.parametrize(
    "link", ["http://10.0.0.1/a.png", "https://169.254.169.254/a", "file:///etc/passwd", "nothing"]
)
async def test_a_link_that_is_not_public_is_not_fetched(here: World, link: str) -> None:
    refused(await here.client.post(f"{UPLOAD}/url", json={"file_url": link}), 400, 40004)


async def test_a_link_without_a_picture_is_refused(here: World) -> None:
    missing = {"file_url": f"{here.sandbox_url}/uploads/nothing"}
    refused(await here.client.post(f"{UPLOAD}/url", json=missing), 400, 40004)
    page = {"file_url": f"{here.url}/healthz"}
    refused(await here.client.post(f"{UPLOAD}/url", json=page), 400, 40002)


@pytest.mark.parametrize(
    ("content", "status", "code", "word"),
    [
        (b"no picture", 400, 40002, "no picture"),
        (photo("PNG", (383, 400)), 400, 40002, "383x400"),
        (photo("GIF", mode="P"), 400, 40002, "GIF"),
        (of_length((10 << 20) + 1), 413, 40001, str((10 << 20) + 1)),
    ],
)
async def test_the_limits_are_those_of_an_upload(
    here: World, content: bytes, status: int, code: int, word: str
) -> None:
    text = base64.b64encode(content).decode()
    for answer in (
        await here.client.post(f"{UPLOAD}/stream", files={"file": ("a", content)}),
        await here.client.post(f"{UPLOAD}/base64", json={"base64_data": text}),
    ):
        assert word in refused(answer, status, code)


async def test_the_sandbox_overwrites_a_file_of_the_same_name(here: World) -> None:
    ids = [
        data_of(await here.sandbox.post(f"{UPLOAD}/stream", files={"file": ("same.png", photo())}))
        for _ in range(2)
    ]
    listed = data_of(await here.sandbox.get("/api/v1/files/list", params={"pageSize": 100}))
    names = [each["file_id"] for each in listed["files"] if each["file_name"] == "same.png"]
    assert names == [ids[1]["file_id"]]


async def test_the_sandbox_keeps_a_hundred_files(here: World) -> None:
    listed = data_of(await here.sandbox.get("/api/v1/files/list"))
    for number in range(100 - listed["total"]):
        form = {"file": (f"full-{number}.png", photo())}
        data_of(await here.sandbox.post(f"{UPLOAD}/stream", files=form))
    form = {"file": ("one-too-many.png", photo())}
    refused(await here.sandbox.post(f"{UPLOAD}/stream", files=form), 403, 40003)
    for file in data_of(await here.sandbox.get("/api/v1/files/list", params={"pageSize": 100}))[
        "files"
    ]:
        await here.sandbox.delete(f"/api/v1/files/{file['file_id']}")
