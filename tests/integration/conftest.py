"""Worlds that the tests of a module share: each test has an owner, tasks or endpoints of its own in
them.
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from service.app import Role
from service.events import replays
from service.queue import worker
from tests.partial import Said
from tests.servers import postgres_database
from tests.untidy import scripted
from tests.upstream import Upstream, Watched, picture
from tests.world import Subscriber, World, subscriber, world


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module with `STORES` has each test of its world `here` on these stores."""
    stores = getattr(metafunc.module, "STORES", None)
    if stores and "store_settings" in metafunc.fixturenames:
        metafunc.parametrize("store_settings", stores, indirect=True, scope="module")


@pytest.fixture(scope="module")
def store_settings(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The settings of the store of `here`. Without a parameter it is SQLite."""
    if getattr(request, "param", "sqlite") == "sqlite":
        yield {}
        return
    with postgres_database(request.getfixturevalue("postgres_server")) as url:
        yield {"database_url": url, "secret_key": "k" * 32}


@pytest.fixture(scope="module")
async def here(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    store_settings: dict[str, Any],
) -> AsyncIterator[World]:
    """A world in which everything goes its way, with the `SETTINGS` of the module. A module with
    `WORLD` has that one, around its `upstream`.
    """
    settings: dict[str, Any] = getattr(request.module, "SETTINGS", {})
    folder, special = tmp_path_factory.mktemp("here"), getattr(request.module, "WORLD", None)
    if special is None:
        made = world(folder, **settings, **store_settings)
    else:
        made = special(folder, request.getfixturevalue("upstream"))
    async with made as here:
        yield here


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    """An upstream whose answers the tests write."""
    return Upstream()


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[Said]:
    """An upstream whose answers the tests write as bytes."""
    async with scripted(Said(picture())) as made:
        yield made


@pytest.fixture(scope="module")
async def still(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world without workers: what is submitted stays as it is."""
    async with world(tmp_path_factory.mktemp("still"), role=Role(workers=False)) as made:
        yield made


@pytest.fixture(scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    upstream = Upstream()
    async with world(tmp_path_factory.mktemp("watched"), upstream=upstream.app) as made:
        yield Watched(made, upstream)


@pytest.fixture(scope="module")
def quick_workers() -> Iterator[None]:
    """Workers look for due work sooner than in production."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        yield


@pytest.fixture(scope="module")
def quick_replays() -> Iterator[None]:
    """Workers look often, and a replay makes its next page soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.05)
        patch.setattr(replays, "EVERY_MS", 20)
        yield


@pytest.fixture
async def shop() -> AsyncIterator[Subscriber]:
    """A subscriber of one test."""
    async with subscriber() as made:
        yield made
