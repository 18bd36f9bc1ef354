"""The whole journey of a picture and of its cost, over HTTP (docs/editing.md, docs/money.md)."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api import SUBMIT, UNTIL_DONE, got, order, refused
from tests.inputs import photo
from tests.processes import ADMIN_KEY, UPSTREAM_KEY, sandbox, service_settings, started

JSON = dict[str, Any]
EDIT = "wan2.5-image-to-image"
FIGURES = ("tasks", "images_requested", "images", "estimated", "reserved", "used", "refunded")
PICTURES = {"house.png": photo("PNG", (480, 400)), "style.jpg": photo("JPEG", (400, 600))}


def client_of(address: str, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    options = ("--delay", "0.05")
    with (
        sandbox(*options, folder=tmp_path_factory.mktemp("upstream")) as running,
        client_of(running.address, UPSTREAM_KEY) as client,
    ):
        yield client


@pytest.fixture(params=["sqlite", "postgres", "s3"])
def admin(
    request: pytest.FixtureRequest, upstream: httpx.Client, tmp_path: Path
) -> Iterator[httpx.Client]:
    """A service on each store, and one that keeps its images on S3."""
    more: dict[str, str] = {}
    if request.param == "postgres":
        more = {"DATABASE_URL": request.getfixturevalue("postgres_url"), "SECRET_KEY": "k" * 32}
    elif request.param == "s3":
        more = {"BLOB_URL": f"s3://{request.getfixturevalue('s3_bucket')}/images"}
    settings = service_settings(str(upstream.base_url).rstrip("/"), tmp_path, **more)
    with (
        started("serve", folder=tmp_path, **settings) as running,
        client_of(running.address, ADMIN_KEY) as client,
    ):
        yield client
    assert running.logged("worker.failed") == running.logged("http.failed") == []


def submitted(client: httpx.Client, **fields: Any) -> JSON:
    return got(client.post(SUBMIT, json=order(**fields), headers=UNTIL_DONE))


def record(upstream: httpx.Client, tasks: list[JSON]) -> dict[str, JSON]:
    """What the sandbox noted about these tasks, in the figures of a usage report. Nothing drew
    another reservation than the catalogue's price.
    """
    rows = upstream.get("/sandbox/charges").raise_for_status().json()["data"]
    noted = {
        row["idempotency_key"]: row
        | {"tasks": 1, "estimated": row["credits_reserved"]}
        | {"reserved": row["credits_reserved"]}
        for row in rows
    }
    ids = [task["id"] for task in tasks]
    assert sorted(row["idempotency_key"] for row in rows if row["idempotency_key"] in ids) == (
        sorted(ids)
    )
    return {id: noted[id] for id in ids}


def sums(rows: list[JSON]) -> JSON:
    return {name: pytest.approx(sum(row[name] for row in rows)) for name in FIGURES}


def check_usage(client: httpx.Client, noted: dict[str, JSON]) -> None:
    """Every figure of every report is that of the sandbox's record."""
    for by in ("day", "model", "owner", "task"):
        report = got(client.get("/v1/usage", params={"by": by}))
        assert report["totals"] == sums(list(noted.values())), by
        for row in report["data"]:
            alike = [
                each
                for id, each in noted.items()
                if {"model": each["model"], "task": id}.get(by, row["key"]) == row["key"]
            ]
            assert row == {"key": row["key"]} | sums(alike), by
        csv_answer = client.get("/v1/usage", params={"by": by}, headers={"accept": "text/csv"})
        rows = list(csv.DictReader(io.StringIO(csv_answer.text)))
        assert [row["key"] for row in rows] == [row["key"] for row in report["data"]]
        for row, figures in zip(rows, report["data"], strict=True):
            assert {name: float(row[name]) for name in FIGURES} == {
                name: figures[name] for name in FIGURES
            }


def test_a_picture_is_edited_twice_and_every_figure_is_the_upstreams(
    admin: httpx.Client, upstream: httpx.Client
) -> None:
    """Upload two pictures, estimate, submit, read the result, feed it back, read the usage by
    model, and be refused by the budget.
    """
    key = {"owner": "shop", "scopes": ["submit", "read"]}
    budget = {"period": "day", "credits": 30}
    created = got(admin.post("/v1/keys", json=key | {"budget": budget}), 201)
    with client_of(str(admin.base_url), created["key"]) as client:
        files = [
            got(client.post("/v1/files", files={"file": (name, content)}), 201)
            for name, content in PICTURES.items()
        ]
        wish = order(model=EDIT, n=2, image_urls=[file["id"] for file in files])
        estimate = got(client.post("/v1/estimates", json=wish))
        assert (estimate["credits"], estimate["basis"]) == (4, "catalogue")
        assert estimate["budget"] == {"limit": 30, "spent": 0, "reserved": 0, "left": 30}

        first = submitted(client, **wish)
        assert (first["state"], first["usage"]["credits_used"]) == ("completed", 4)
        assert [each["sha256"] for each in first["inputs"]] == [file["sha256"] for file in files]
        results = [upstream.get(link).content for link in sent(upstream, first)["results"]]
        assert [client.get(image["url"]).content for image in first["images"]] == results
        links = sent(upstream, first)["image_urls"]
        assert [upstream.get(link).content for link in links] == [*PICTURES.values()]

        again = submitted(client, model=EDIT, image_urls=[first["images"][1]["id"], files[0]["id"]])
        assert again["state"] == "completed"
        links = sent(upstream, again)["image_urls"]
        assert [upstream.get(link).content for link in links] == [results[1], PICTURES["house.png"]]

        others = [
            submitted(client, n=4, sandbox={"images": 3, "refund": 2}),
            submitted(client, sandbox={"fail": "content_policy_violation"}),
            submitted(client, model="mj-v7", size=None, sandbox={"images": 2}),
            submitted(client, model="krea-2-turbo", size="3:4", sandbox={"usage": 0.01}),
        ]
        tasks = [first, again, *others]
        noted = record(upstream, tasks)
        check_usage(client, noted)

        (figures,) = got(client.get("/v1/budgets"))["data"]
        spent = sum(row["used"] - row["refunded"] for row in noted.values())
        assert figures["spent"] == pytest.approx(spent)
        assert figures["left"] == pytest.approx(30 - spent)
        got(
            admin.put(
                "/v1/budgets/shop",
                json={"period": "day", "credits": round(figures["spent"] + 1, 6)},
            )
        )
        error = refused(client.post(SUBMIT, json=wish), 402, "budget_exceeded")
        assert "the task needs 4 credits" in error["message"]
        assert "has 1 left" in error["message"]
        assert len(got(client.get("/v1/tasks"))["data"]) == len(tasks)
        check_usage(client, record(upstream, tasks))


def sent(upstream: httpx.Client, task: JSON) -> JSON:
    """The upstream's task."""
    tasks = upstream.get("/sandbox/tasks").raise_for_status().json()["data"]
    (found,) = (each for each in tasks if each["idempotency_key"] == task["id"])
    assert found["id"] == task["upstream_id"]
    document: JSON = found
    return document
