"""Errors that name the setting, the limit and the value (docs/api.md)."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.app import Role
from tests.api import ASYNC, SUBMIT, order, refused
from tests.logs import logged
from tests.world import World, world

LIMIT = 2**62


@pytest.fixture(scope="module")
async def public(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A service whose endpoints must be public."""
    async with world(
        tmp_path_factory.mktemp("public"),
        role=Role(workers=False),
        endpoint_networks="",
        task_callback_networks="",
    ) as here:
        yield here


@pytest.mark.parametrize(
    "url",
    [
        "http://shop.example.com/hook",
        "http://127.0.0.1:9000/hook",
        "https://10.0.0.1/hook",
        "https://192.168.1.7/hook",
        "https://[fd00::1]/hook",
        "https://localhost/hook",
    ],
)
@pytest.mark.parametrize("kind", ["endpoint", "task_callback"])
async def test_a_refused_address_names_the_setting_that_allows_it(
    public: World, kind: str, url: str
) -> None:
    if kind == "endpoint":
        path, param, body = "/v1/endpoints", "url", {"url": url}
    else:
        path, param, body = SUBMIT, "callback_url", order(callback_url=url)
    error = refused(await public.client.post(path, json=body), 400, param=param)
    assert f"DARKROOM_{kind.upper()}_NETWORKS does not list it" in error["message"]


async def test_a_full_disk_names_its_limit_and_its_space_and_logs_one_line(tmp_path: Path) -> None:
    with logged("info") as stream:
        async with world(tmp_path, role=Role(workers=False), min_free_bytes=LIMIT) as here:
            answer = await here.client.post(SUBMIT, json=order(), headers=ASYNC)
        parsed: list[dict[str, Any]] = [json.loads(line) for line in stream.getvalue().splitlines()]
    error = refused(answer, 503, "no_space")
    (line,) = [line for line in parsed if line["event"] == "blobs.full"]
    assert (line["purpose"], line["limit_bytes"]) == ("images", LIMIT)
    for part in (f"{line['free_bytes']} bytes are free", str(LIMIT), "DARKROOM_MIN_FREE_BYTES"):
        assert part in error["message"]
