"""One service and one browser for all tests of a file."""

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser

from tests.browser.people import chromium
from tests.world import World, world


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("here")) as made:
        yield made


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as made:
        yield made
