"""The sandbox is strict about input images, as the upstream is, and says how a service is set."""

import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tests.api import UNTIL_DONE
from tests.processes import ADMIN_KEY, darkroom, sandbox, started
from tests.sandbox import QUICK
from tests.sandbox import sandbox as emulator
from tests.world import answering, world

SUBMIT, STRICT = "/v1/images/generations", replace(QUICK, fetch_inputs=True)


def picture(side: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side), "teal").save(file, "PNG")
    return file.getvalue()


async def file(request: Request) -> Response:
    match request.path_params["name"]:
        case "good.png":
            return Response(picture(512), media_type="image/png")
        case "moved.png":
            return RedirectResponse("/good.png")
        case "small.png":
            return Response(picture(100))
        case "alpha.png":
            return Response(picture(512, "RGBA"))
        case "page.png":
            return Response("<html>sign in</html>", media_type="text/html")
    return Response(status_code=404)


@pytest.fixture(scope="module")
async def host() -> AsyncIterator[str]:
    async with answering(Starlette(routes=[Route("/{name}", file)])) as url:
        yield url


def order(*urls: str, **more: object) -> dict[str, object]:
    return {"model": "wan2.5-image-to-image", "prompt": "p", "image_urls": list(urls), **more}


@pytest.mark.parametrize("name", ["good.png", "moved.png"])
async def test_an_input_image_that_is_there_is_taken(host: str, name: str) -> None:
    async with emulator(STRICT) as client:
        answer = await client.post(SUBMIT, json=order(f"{host}/{name}"))
    assert answer.status_code == 200, answer.text


REFUSED = {
    "{host}/gone.png": "404",
    "{host}/page.png": "none of",
    "{host}/small.png": "384",
    "{host}/alpha.png": "alpha",
    "http://127.0.0.1:9/closed.png": "cannot be fetched",
    "https://name.invalid/a.png": "name.invalid",
    "http://10.0.0.1/private.png": "10.0.0.1",
}


@pytest.mark.parametrize("url", list(REFUSED))
async def test_an_unreachable_or_wrong_input_image_is_refused_with_the_upstreams_error(
    host: str, url: str
) -> None:
    """Also as the second of two images. Nothing is created or charged."""
    async with emulator(STRICT) as client:
        urls = (f"{host}/good.png", url.format(host=host))
        answer = await client.post(SUBMIT, json=order(*urls))
        assert (await client.get("/sandbox/tasks")).json()["data"] == []
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "invalid_parameter",
        "image_urls",
    )
    assert REFUSED[url] in error["message"]


async def test_without_fetching_every_link_passes() -> None:
    """For a machine without the internet."""
    async with emulator(QUICK) as client:
        answer = await client.post(SUBMIT, json=order("https://name.invalid/a.png"))
    assert answer.status_code == 200, answer.text


async def test_the_client_of_the_service_gets_the_upstreams_refusal(tmp_path: Path) -> None:
    """The service does not fetch public links itself. Its task fails at once."""
    async with world(tmp_path, sandbox=STRICT) as here:
        body = order("https://name.invalid/a.png")
        answer = await here.client.post(SUBMIT, json=body, headers=UNTIL_DONE)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "image_urls"), answer.text
        assert "name.invalid" in error["message"]
        assert (await here.task(error["task_id"]))["state"] == "failed"


def test_serve_works_under_the_settings_that_the_sandbox_prints(tmp_path: Path) -> None:
    with sandbox("--delay", "0", folder=tmp_path) as upstream:
        settings = {
            str(name): str(value) for name, value in upstream.announcement["settings"].items()
        }
        assert settings["DARKROOM_CALLBACK_URL"] == "http://127.0.0.1:8080"
        own = {
            "DARKROOM_ADMIN_KEY": ADMIN_KEY,
            "DARKROOM_PORT": "0",
            "DARKROOM_MIN_FREE_BYTES": "0",
        }
        own["DARKROOM_CALLBACK_URL"] = "http://127.0.0.1:{port}"
        with started("serve", folder=tmp_path, **(settings | own)) as service:
            body = {"model": "wan2.5-text-to-image", "prompt": "p", "size": "768x768"}
            headers = {"authorization": f"Bearer {ADMIN_KEY}", "prefer": "wait=60"}
            url = f"{service.address}{SUBMIT}"
            task = httpx.post(url, json=body, headers=headers, timeout=90).json()
            assert task["state"] == "completed", task
            assert (tmp_path / "data" / "sandbox" / "darkroom.db").exists()


def test_an_erased_task_says_what_is_left(tmp_path: Path) -> None:
    """The task and its events show when, and the command line says what stays."""
    with started("serve", "--sandbox", "--json", "--port", "0", folder=tmp_path) as service:
        client = {
            "DARKROOM_URL": service.address,
            "DARKROOM_API_KEY": str(service.announcement["key"]),
        }

        def run(*arguments: str) -> str:
            done = darkroom(*arguments, folder=tmp_path, **client)
            assert done.returncode == 0, done.stderr
            return done.stdout

        header = {"authorization": f"Bearer {client['DARKROOM_API_KEY']}", "prefer": "wait=60"}
        body = {"model": "wan2.5-text-to-image", "prompt": "a secret", "size": "768x768"}
        url = f"{service.address}{SUBMIT}"
        id = httpx.post(url, json=body, headers=header, timeout=90).json()["id"]
        assert "are left" in run("erase", id)
        shown = run("task", id)
        assert "erased" in shown
        assert "are left" in shown
        assert "a secret" not in shown
        with httpx.Client(base_url=service.address, headers=header, timeout=30) as reader:
            task = reader.get(f"/v1/tasks/{id}").json()
            events = reader.get(f"/v1/events?task={id}").json()["data"]
        assert {event["data"]["erased_at"] for event in events} == {task["erased_at"]}
