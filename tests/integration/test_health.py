"""The health endpoints and metrics of a process: liveness, readiness and figures."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.app import Role, create_app
from service.upkeep import store_figures
from service.web.routes import health_routes
from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, order, refused, submitted
from tests.waiting import wait_until
from tests.world import World, answering, subscriber, world

pytestmark = pytest.mark.slow

JSON = dict[str, Any]
WITHOUT_WORKERS = Role(workers=False)


async def ready(here: World) -> JSON:
    """Returns the body of `/readyz` for a key, which must be 200."""
    return got(await here.client.get("/readyz"))


async def figures(here: World) -> dict[str, float]:
    """Every sample of `/metrics` by its name and labels."""
    answer = await here.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        ",".join(
            [sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))]
        ): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


# --- liveness and readiness
# -------------------------------------------------------------------------------------------------


async def test_a_process_that_lives_says_so_to_everybody(here: World) -> None:
    """`/healthz` needs no key and no store, and shows no detail."""
    assert got(await here.stranger.get("/healthz")) == {"status": "ok"}


async def test_a_process_that_can_commit_is_ready(here: World) -> None:
    """A key of any scope sees the causes, here none. A request without a key does not."""
    assert await ready(here) == {"status": "ok", "causes": []}
    assert got(await here.stranger.get("/readyz")) == {"status": "ok"}
    assert got(await here.stranger.get("/readyz", headers={"authorization": "Bearer wrong"})) == {
        "status": "ok"
    }
    for scope in ("submit", "read", "subscribe", "admin"):
        async with here.owner(scope) as client:
            assert got(await client.get("/readyz")) == {"status": "ok", "causes": []}


async def test_without_its_workers_a_process_is_degraded(tmp_path: Path) -> None:
    """The process can still commit a callback, so the answer is 200."""
    before = asyncio.all_tasks()
    async with world(tmp_path) as here:
        (workers,) = [task for task in asyncio.all_tasks() - before if task.get_name() == "workers"]
        await wait_until(lambda: here.context.workers_alive and here.context.workers_alive())
        workers.cancel()
        await asyncio.wait([workers])
        assert await ready(here) == {"status": "degraded", "causes": ["workers"]}
        assert got(await here.stranger.get("/readyz")) == {"status": "degraded"}


async def test_a_web_process_misses_no_workers(tmp_path: Path) -> None:
    """Another process runs the workers."""
    async with world(tmp_path, role=WITHOUT_WORKERS) as here:
        assert (await ready(here))["status"] == "ok"


async def test_without_room_for_images_a_process_is_degraded(tmp_path: Path) -> None:
    """The free space is below the limit at which the service refuses submissions."""
    async with world(tmp_path, role=WITHOUT_WORKERS, min_free_bytes=2**62) as here:
        assert await ready(here) == {"status": "degraded", "causes": ["blobs"]}


async def test_without_its_image_store_a_process_is_degraded_and_takes_no_submission(
    tmp_path: Path,
) -> None:
    """A submission is refused with 503 in the common error form. `/metrics` still answers."""
    async with world(tmp_path, role=WITHOUT_WORKERS) as here:
        shutil.rmtree(here.settings.image_dir)
        assert await ready(here) == {"status": "degraded", "causes": ["blobs"]}
        refused(await here.client.post(SUBMIT, json=order(), headers=ASYNC), 503, "unavailable")
        assert (await figures(here))["darkroom_blob_free_bytes"] == 0


async def test_a_process_that_stops_says_so(tmp_path: Path) -> None:
    """The process reports `degraded` while it still answers."""
    async with world(tmp_path, role=WITHOUT_WORKERS) as here:
        here.context.resources.store.signals.stop()
        assert await ready(here) == {"status": "degraded", "causes": ["stopping"]}


async def test_only_a_store_that_does_not_commit_makes_a_process_unready(tmp_path: Path) -> None:
    """`/readyz` answers 503 with `Retry-After`, and shows the cause to a key. A submission gets 503
    as well. `/healthz` stays 200.
    """
    async with world(tmp_path, role=WITHOUT_WORKERS) as here:
        got(await here.client.get("/v1/tasks"))
        here.context.resources.store._closing = True  # from now on nothing is committed
        answer = await here.client.get("/readyz")
        assert (answer.status_code, answer.json()) == (
            503,
            {"status": "unavailable", "causes": ["store"]},
        )
        assert answer.headers["retry-after"] == "1"
        assert (await here.stranger.get("/readyz")).json() == {"status": "unavailable"}
        refused(await here.client.post(SUBMIT, json=order(), headers=ASYNC), 503, "unavailable")
        assert (await here.stranger.get("/healthz")).status_code == 200


async def test_a_store_that_takes_too_long_makes_a_process_unready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/readyz` answers 503 when the store exceeds the probe's time limit."""
    monkeypatch.setattr(health_routes, "READY_S", 0.0)
    async with world(tmp_path, role=WITHOUT_WORKERS) as here:
        assert (await here.stranger.get("/readyz")).status_code == 503


# --- figures
# --------------------------------------------------------------------------------------------------

NAMES = {
    "darkroom_callbacks_total",
    "darkroom_callback_commit_seconds",
    "darkroom_tasks",
    "darkroom_upstream_requests_total",
    "darkroom_upstream_request_seconds",
    "darkroom_downloads_total",
    "darkroom_download_bytes_total",
    "darkroom_result_seconds_left",
    "darkroom_oldest_unsettled_seconds",
    "darkroom_oldest_due_delivery_seconds",
    "darkroom_deliveries_total",
    "darkroom_delivery_seconds",
    "darkroom_dead_letters",
    "darkroom_queue_depth",
    "darkroom_credits_total",
    "darkroom_callback_to_event_seconds",
    "darkroom_callback_to_delivery_seconds",
    "darkroom_blob_free_bytes",
}


async def test_the_metrics_have_their_names_and_count_what_happened(tmp_path: Path) -> None:
    """One task completes and one fails. One subscriber takes their deliveries, and one address has
    no listener.
    """
    async with world(tmp_path) as here, here.owner() as client, subscriber() as takes:
        empty = await figures(here)
        assert empty["darkroom_result_seconds_left"] == float("inf")
        assert (
            empty["darkroom_oldest_unsettled_seconds"]
            == empty["darkroom_oldest_due_delivery_seconds"]
            == 0
        )
        for url in (takes.url, "http://127.0.0.1:9/"):
            got(
                await client.post(
                    "/v1/endpoints", json={"url": url, "types": ["image.task.completed"]}
                ),
                201,
            )
        task = await submitted(client, UNTIL_DONE, n=2, sandbox={"repeat_callback": 3})
        await submitted(
            client, UNTIL_DONE, sandbox={"fail": "service_error", "drop_callback": False}
        )
        late = await submitted(client, {}, sandbox={"delay": 600})
        await here.stranger.post(here.callback_url(task["id"], "wrong"), json={})
        known: dict[str, float] = {}

        async def told() -> bool:  # workers count after their commits, in any order
            known.update(await figures(here))
            last = {
                "dead_letters": 1,
                "deliveries_total,outcome=delivered": 1,
                "deliveries_total,outcome=dead": 1,
                "callbacks_total,verdict=duplicate": 2,
            }
            return {name: known.get(f"darkroom_{name}") for name in last} == last

        await wait_until(told)
    assert {name.split(",")[0].removesuffix("_count") for name in known} >= NAMES
    expected = {
        "callbacks_total,verdict=accepted": 2,
        "callbacks_total,verdict=wrong_token": 1,
        "callback_commit_seconds_count": 4,
        "tasks,state=completed": 1,
        "tasks,state=failed": 1,
        "tasks,state=submitted": 1,
        "tasks,state=queued": 0,
        "upstream_requests_total,kind=submit,outcome=accepted": 3,
        "upstream_request_seconds_count,kind=submit": 3,
        "downloads_total,outcome=stored": 2,
        "download_bytes_total": sum(image["bytes"] for image in task["images"]),
        "deliveries_total,outcome=delivered": 1,
        "deliveries_total,outcome=retry": 2,
        "deliveries_total,outcome=dead": 1,
        "delivery_seconds_count": 4,
        "callback_to_event_seconds_count": 2,
        "callback_to_delivery_seconds_count": 1,
        "credits_total,kind=reserved": 8,
        "credits_total,kind=used": 4,
        "queue_depth,stage=settle": 0,
        "queue_depth,stage=reconcile": 1,
        "queue_depth,stage=submit": 0,
    }
    assert {name: known[f"darkroom_{name}"] for name in expected} == expected
    assert known["darkroom_upstream_requests_total,kind=query,outcome=found"] >= 2
    assert known["darkroom_blob_free_bytes"] > 0
    assert 0 <= known["darkroom_oldest_unsettled_seconds"] < 60
    assert late["state"] == "submitted"


async def test_the_gauges_tell_how_old_what_waits_is(tmp_path: Path) -> None:
    """The gauges are seconds, from the times in the store: until a result link expires, since a
    delivery is due, since a task is unsettled. Unknown free space is NaN.
    """
    async with world(tmp_path, role=WITHOUT_WORKERS) as here:
        counted = await here.context.resources.store.read(store_figures.figures)
        waiting = counted | {
            "first_link_dies": 90_000,
            "oldest_unsettled": 20_000,
            "oldest_due_delivery": 29_500,
            "sinks_behind": {},
            "processes": {},
        }
        text = here.context.resources.metrics.show(waiting, 30_000, None).decode()
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["darkroom_result_seconds_left"] == 60
    assert samples["darkroom_oldest_unsettled_seconds"] == 10
    assert samples["darkroom_oldest_due_delivery_seconds"] == 0.5
    assert samples["darkroom_blob_free_bytes"] != samples["darkroom_blob_free_bytes"]


async def test_figures_of_all_owners_want_a_key_with_admin_on_the_main_port(here: World) -> None:
    """Metrics and the account's credits are everybody's sums. The answer is 401 without a key and
    403 with any other scope.
    """
    for path in ("/metrics", "/v1/credits"):
        refused(await here.stranger.get(path), 401, "unauthorized")
        async with here.owner("submit", "read", "subscribe") as client:
            refused(await client.get(path), 403, "permission_denied")
        async with here.owner("admin") as client:
            assert (await client.get(path)).status_code == 200


async def test_the_metrics_port_wants_no_key_and_serves_no_clients(here: World) -> None:
    """The metrics port serves the same figures, the probes, and nothing else."""
    async with answering(create_app(here.context, Role(), metrics_open=True)) as url:
        answer = await here.stranger.get(f"{url}/metrics")
        assert answer.status_code == 200
        assert "darkroom_tasks{" in answer.text
        assert (await here.stranger.get(f"{url}/healthz")).status_code == 200
        assert got(await here.client.get(f"{url}/readyz"))["status"] == "ok"
        for path in ("/v1/tasks", "/openapi.json", "/images/x", "/callbacks/evolink/a/b"):
            refused(await here.client.get(f"{url}{path}"), 404, "not_found")


async def test_a_worker_process_serves_the_probes_and_figures_alone(tmp_path: Path) -> None:
    """A worker process serves `/metrics` with a key, as on any main port, and no task, image or
    callback.
    """
    async with world(tmp_path, role=Role(web=False)) as here:
        assert got(await here.stranger.get("/healthz")) == {"status": "ok"}
        assert (await ready(here))["status"] == "ok"
        refused(await here.stranger.get("/metrics"), 401)
        assert "darkroom_tasks,state=queued" in await figures(here)
        for path in ("/v1/tasks", "/images/x", "/openapi.json"):
            refused(await here.client.get(path), 404, "not_found")
        for path in (SUBMIT, "/callbacks/evolink/a/b"):
            refused(await here.client.post(path, json={}), 404, "not_found")
