"""The request limit of each key, `DARKROOM_KEY_REQUESTS`: 429 with `Retry-After`, and the routes
without a limit.
"""

import sys
import time
from pathlib import Path

import pytest
from starlette.responses import Response

from service.errors import ApiError, ConfigurationError
from service.settings import load_settings
from service.web.key_limits import KeyLimits
from tests.api import SUBMIT, UNTIL_DONE, got, order, refused
from tests.upstream import Upstream, document, picture
from tests.world import world


async def test_one_request_too_many_is_told_when_to_come_again(tmp_path: Path) -> None:
    """The answer is 429 in the common error form. Another key of the same owner has its own limit,
    and a refused request has no effect.
    """
    async with (
        world(tmp_path, key_requests="3/year") as here,
        here.owner(name="acme") as client,
        here.owner(name="acme") as other,
    ):
        task = got(await client.post(SUBMIT, json=order()))
        for _ in range(2):
            assert got(await client.get(f"/v1/tasks/{task['id']}"))["id"] == task["id"]
        for answer in (
            await client.get("/v1/tasks"),
            await client.post(SUBMIT, json=order(prompt="one too many")),
        ):
            refused(answer, 429, "rate_limit_exceeded")
            assert 1 <= int(answer.headers["retry-after"]) <= 366 * 86_400
        assert [task["prompt"] for task in got(await other.get("/v1/tasks"))["data"]] == [
            "a lighthouse"
        ]


@pytest.mark.slow
async def test_callbacks_images_health_and_metrics_have_no_request_limit(tmp_path: Path) -> None:
    """The upstream's callbacks, images, health and metrics stay open to a key that is at its limit,
    and without a key.
    """
    theirs = Upstream()
    async with world(tmp_path, upstream=theirs.app, key_requests="3/year") as here:
        task = await here.submit()
        url = f"{here.sandbox_url}/files/0"
        theirs.files["0"], theirs.queries[task["upstream_id"]] = (
            [Response(picture(), media_type="image/png")],
            [document("completed", url)],
        )
        called = await here.stranger.post(
            here.callback_url(task["id"]), json={"status": "completed", "results": [url]}
        )
        assert called.json() == {"status": "accepted"}
        image = (
            await here.client.get("/v1/events", params={"wait": 28, "type": "image.task.completed"})
        ).json()["data"][0]
        await here.client.get("/v1/tasks")
        refused(await here.client.get("/v1/tasks"), 429, "rate_limit_exceeded")
        for path in (
            "/healthz",
            "/readyz",
            "/metrics",
            f"/images/{image['data']['images'][0]['id']}",
        ):
            for _ in range(5):
                assert (await here.client.get(path)).status_code == 200
        assert (await here.client.get("/readyz")).json()["causes"] == []
        for _ in range(5):
            assert (
                await here.stranger.post(
                    here.callback_url(task["id"]), json={"status": "completed", "results": [url]}
                )
            ).status_code == 200
        refused(await here.stranger.get("/v1/tasks"), 401, "unauthorized")


async def test_a_wait_counts_once(tmp_path: Path) -> None:
    """A request that waits or streams counts once, whatever its duration."""
    async with world(tmp_path, key_requests="2/year") as here:
        task = await here.submit(headers=UNTIL_DONE)
        assert task["state"] == "completed"
        async with here.client.stream(
            "GET", "/v1/events", params={"after": "0"}, headers={"accept": "text/event-stream"}
        ) as events:
            assert events.status_code == 200
        refused(await here.client.get("/v1/tasks"), 429)


async def test_without_the_setting_there_is_no_limit() -> None:
    limits = KeyLimits(None)
    for _ in range(10_000):
        await limits.count("key")


@pytest.mark.parametrize("requests", ["1/second", "7/minute", "100 per 3 minutes", "600/minute"])
async def test_after_retry_after_a_request_is_allowed(
    requests: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Retry-After` is at least one second. A client that waits for that time is let in, at any
    point of the limit's window.
    """
    now = 1_750_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    limits = KeyLimits(requests)
    for _ in range(60):
        waits = None
        for _ in range(1000):
            try:
                await limits.count("key")
            except ApiError as error:
                waits = error.retry_after
                break
            now += 0.0137
        assert waits is not None
        assert 1 <= waits <= 181
        with pytest.raises(ApiError):
            await limits.count("key")
        await limits.count("another")
        now += waits + 0.001
        await limits.count("key")


@pytest.mark.parametrize(
    "value",
    [
        "600",
        "600/fortnight",
        "0/minute",
        "-1/minute",
        "ten/minute",
        "600/minute;",
        "10/second;600/minute",
        "1.5/second",
        "9" * 5000 + "/day",
    ],
)
def test_a_bad_limit_stops_the_start(value: str) -> None:
    """The error is one line that names the setting and its form, and does not show the value."""
    with pytest.raises(
        ConfigurationError,
        match=r"^DARKROOM_KEY_REQUESTS: should be requests per time, such as 600/minute$",
    ):
        load_settings({"DARKROOM_KEY_REQUESTS": value}, None)


def test_a_limit_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start fails with the setting and without the library. Without the setting the library is
    not needed.
    """
    monkeypatch.setitem(sys.modules, "limits", None)
    with pytest.raises(ConfigurationError, match="DARKROOM_KEY_REQUESTS: needs the extra limits"):
        load_settings({"DARKROOM_KEY_REQUESTS": "600/minute"}, None)
    assert load_settings({}, None).key_requests is None
