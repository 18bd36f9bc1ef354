"""Callbacks are answered in time while a service is under attack."""

from collections.abc import AsyncIterator

import pytest

from tests.attack.attacks import ATTACKS, attacked
from tests.attack.target import Pulse, Target, pulse

pytestmark = pytest.mark.timeout(240)

ROUNDS, CALLBACKS, AT_ONCE, LIMIT_MS = 5, 100, 5, 500


@pytest.fixture(scope="module")
async def services(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Target, Pulse]]:
    async with (
        attacked(tmp_path_factory.mktemp("attack")) as under,
        pulse(under, at_once=AT_ONCE) as measured,
    ):
        yield under, measured


@pytest.mark.parametrize("name", ATTACKS)
async def test_callbacks_are_answered_meanwhile(services: tuple[Target, Pulse], name: str) -> None:
    """Each callback gets its 200, in the best of five rounds 99 % of them within half a second.
    Five senders share them. `tests.bench.attacks` compares them with those of an idle service.

    Other work of the machine only adds to the times, so the first round below the limit is the
    last.
    """
    under, measured = services
    found: list[float] = []
    async with ATTACKS[name](under):
        while not found or (len(found) < ROUNDS and found[-1] >= LIMIT_MS):
            found += await measured.p99(CALLBACKS)
    assert found[-1] < LIMIT_MS, found
