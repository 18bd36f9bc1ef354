"""Worlds that the tests of a module share: each test has an owner, tasks or endpoints of its own in
them.
"""

from collections.abc import AsyncIterator

import pytest

from service.app import Role
from tests.world import World, world


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world in which everything goes its way."""
    async with world(tmp_path_factory.mktemp("here")) as made:
        yield made


@pytest.fixture(scope="module")
async def still(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world without workers: what is submitted stays as it is."""
    async with world(tmp_path_factory.mktemp("still"), role=Role(workers=False)) as made:
        yield made
