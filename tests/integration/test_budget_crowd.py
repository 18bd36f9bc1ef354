"""A crowd of clients against one budget, over processes (docs/money.md)."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import httpx
import pytest

from tests.api import ASYNC, SUBMIT, got, order
from tests.processes import ADMIN_KEY, sandbox, service_settings, started

CLIENTS, SUBMISSIONS, FIT = 20, 200, 50


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sandbox("--delay", "600", folder=tmp_path_factory.mktemp("upstream")) as running:
        yield running.address


def client_of(address: str, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False)


def crowd(addresses: list[str], key: str) -> Counter[int]:
    """Half of the clients, in a process of their own. Counts the statuses of their submissions."""

    def submissions(number: int) -> list[int]:
        with client_of(addresses[number % len(addresses)], key) as client:
            return [
                client.post(SUBMIT, json=order(), headers=ASYNC).status_code
                for _ in range(SUBMISSIONS // CLIENTS)
            ]

    with ThreadPoolExecutor(CLIENTS // 2) as threads:
        return Counter(chain.from_iterable(threads.map(submissions, range(CLIENTS // 2))))


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_two_hundred_submissions_against_a_budget_for_fifty(
    store: str, request: pytest.FixtureRequest, tmp_path: Path, upstream: str
) -> None:
    """Exactly 50 submissions are accepted. 20 clients in two processes submit at once. PostgreSQL
    has two processes that serve, and an SQLite store has one.
    """
    more = {}
    if store == "postgres":
        more = {"DATABASE_URL": request.getfixturevalue("postgres_url"), "SECRET_KEY": "k" * 32}
    settings = service_settings(upstream, tmp_path, **more)
    with ExitStack() as stack:
        serving = [
            stack.enter_context(started("serve", folder=tmp_path, **settings)).address
            for _ in range(2 if more else 1)
        ]
        admin = stack.enter_context(client_of(serving[0], ADMIN_KEY))
        body = {
            "owner": "crowd",
            "scopes": ["submit", "read"],
            "budget": {"period": "total", "credits": 2 * FIT},
        }
        key = got(admin.post("/v1/keys", json=body), 201)["key"]
        spawned = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
        with spawned as processes:
            counts = [processes.submit(crowd, serving, key) for _ in range(2)]
            statuses = counts[0].result() + counts[1].result()
        assert statuses == {200: FIT, 402: SUBMISSIONS - FIT}
        (budget,) = got(admin.get("/v1/budgets"))["data"]
        assert (budget["spent"] + budget["reserved"], budget["left"]) == (2 * FIT, 0)
        totals = got(admin.get("/v1/usage", params={"owner": "crowd"}))["totals"]
        assert (totals["tasks"], totals["estimated"]) == (FIT, 2 * FIT)
        assert len(got(admin.get("/v1/events", params={"type": "budget.exhausted"}))["data"]) == 1
