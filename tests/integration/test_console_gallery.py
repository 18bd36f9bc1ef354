"""The gallery of the console, over HTTP: filters, the large view, and pictures as one file."""

import hashlib
import io
import re
import zipfile
from collections.abc import AsyncIterator

import httpx
import pytest

from service.web.sessions import COOKIE
from tests.api import UNTIL_DONE, submitted
from tests.browser.people import cookie
from tests.world import World

HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
async def painter(here: World) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """An owner's API client, and the browser in which the owner has signed in."""
    async with here.owner("submit", "read", name="painter") as client:
        key = client.headers["authorization"].removeprefix("Bearer ")
        cookies = {COOKIE: cookie(here, key)}
        async with httpx.AsyncClient(base_url=here.url, cookies=cookies) as browser:
            yield client, browser


def pictures(page: str) -> list[str]:
    return re.findall(r'name="picture" value="([^"]+)"', page)


async def test_the_gallery_has_ones_own_pictures_by_filter(
    here: World, painter: tuple[httpx.AsyncClient, httpx.AsyncClient]
) -> None:
    """Others' pictures are never among them. Prompts are text, whatever they contain."""
    client, browser = painter
    one = await submitted(
        client, UNTIL_DONE, n=2, prompt=f"a red boat {HOSTILE}", metadata={"of": "7"}
    )
    two = await submitted(client, UNTIL_DONE, prompt="a blue lamp")
    other = await submitted(here.client, UNTIL_DONE, prompt="a red boat of another")
    ones, twos = [f"{one['id']}/0", f"{one['id']}/1"], [f"{two['id']}/0"]
    for query, wanted in (
        ({}, twos + ones),
        ({"prompt": "RED boat"}, ones),
        ({"metadata": "of=7"}, ones),
        ({"metadata": "of=8"}, []),
        ({"model": two["model"]}, twos + ones),
        ({"since": "2001-01-01", "until": "2001-01-02"}, []),
        ({"since": "2001-01-01"}, twos + ones),
    ):
        page = (await browser.get("/console/gallery", params=query)).text
        assert [name for name in pictures(page) if name in twos + ones] == wanted, query
        assert other["id"] not in page
        assert "<script>alert" not in page
    for query in ({"metadata": "seven"}, {"since": "yesterday"}):
        answer = await browser.get("/console/gallery", params=query)
        assert (answer.status_code, 'role="alert"' in answer.text) == (400, True)


async def test_a_large_view_tells_what_is_known_of_a_picture(
    here: World, painter: tuple[httpx.AsyncClient, httpx.AsyncClient]
) -> None:
    client, browser = painter
    task = await submitted(client, UNTIL_DONE, n=2, prompt="a tall ship")
    page = (await browser.get(f"/console/gallery/{task['id']}/0")).text
    first = task["images"][0]
    for text in (
        f"{first['width']} × {first['height']} pixels",
        first["sha256"],
        f"{task['usage']['credits_used']:g} credits for 2 pictures",
        "a tall ship",
        f"reference={first['id']}",
        f'rel="next" href="/console/gallery/{task["id"]}/1"',
    ):
        assert text in page
    assert 'rel="prev"' not in page
    others = await submitted(here.client, UNTIL_DONE)
    for path in (f"{task['id']}/2", f"{others['id']}/0", "task_unknown/0"):
        assert (await browser.get(f"/console/gallery/{path}")).status_code == 404


async def test_selected_pictures_arrive_as_one_file(
    here: World, painter: tuple[httpx.AsyncClient, httpx.AsyncClient]
) -> None:
    """The ZIP file has their exact bytes. None, too many or another's are refused."""
    client, browser = painter
    task = await submitted(client, UNTIL_DONE, n=3)
    page = (await browser.get("/console/gallery")).text
    token = re.search(r'name="csrf" value="([^"]+)"', page)
    assert token is not None

    async def sent(names: list[str]) -> httpx.Response:
        fields = {"csrf": token[1], "picture": names}
        headers = {"origin": here.url}
        return await browser.post("/console/gallery/pictures.zip", data=fields, headers=headers)

    names = [f"{task['id']}/{index}" for index in (2, 0, 2)]
    answer = await sent(names)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{task['id']}-2.png", f"{task['id']}-0.png"]
        for name, index in zip(archive.namelist(), (2, 0), strict=True):
            digest = hashlib.sha256(archive.read(name)).hexdigest()
            assert digest == task["images"][index]["sha256"]
    others = await submitted(here.client, UNTIL_DONE)
    assert (await sent([f"{others['id']}/0"])).status_code == 404
    assert (await sent([])).status_code == 400
    assert (await sent([f"{task['id']}/{index}" for index in range(101)])).status_code == 400
    next(here.settings.image_dir.rglob(f"0-{task['images'][0]['sha256']}.png")).unlink()
    refusal = await sent(names)
    assert (refusal.status_code, f"{task['id']}/0 is not as" in refusal.text) == (503, True)
    assert (await client.delete(f"/v1/tasks/{task['id']}")).status_code == 204
    assert (await sent(names)).status_code == 404
