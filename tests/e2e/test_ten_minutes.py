"""Ten minutes with Darkroom, by its documentation alone: run it, break it, be told by an alert,
find the cause with the doctor and one task's id, and mend it.
"""

import html
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_drills import RULES, RUNBOOK, Scene, prometheus
from tests.environment import ROOT
from tests.integration.test_console_security import sign_in
from tests.integration.test_traces import PARENT, TRACE, Collector, collector  # noqa: F401
from tests.processes import ADMIN_KEY, UPSTREAM_KEY, sandbox
from tests.servers import free_port
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ALERT = "DarkroomAccountRefused"


@pytest.fixture
def scene(tmp_path: Path, collector: Collector) -> Iterator[Scene]:  # noqa: F811
    """A service that exports its traces to a collector and its figures to Prometheus."""
    with ExitStack() as stack:
        upstream = stack.enter_context(sandbox("--delay", "0", folder=tmp_path))
        made = Scene(tmp_path, upstream.address, None, free_port())
        made.environment = {
            "DARKROOM_SUBMIT_SCHEDULE": "0.5",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_SERVICE_NAME": "darkroom",
            "PYTHONPATH": str(ROOT),
        }
        made.start()
        stack.callback(made.stop)
        made.prometheus = stack.enter_context(prometheus(tmp_path, made.port))
        yield made


async def test_run_it_break_it_be_told_find_the_cause_and_mend_it(
    scene: Scene,
    collector: Collector,  # noqa: F811
) -> None:
    # Run it: a task is submitted and ends with its picture.
    assert "/images/img_" in scene.run("submit", "a lighthouse", "--wait")
    # Break it: the next start has a wrong key.
    scene.stop()
    scene.start(EVOLINK_API_KEY="sk-wrong")
    task = scene.submit(headers={"traceparent": PARENT}).json()["id"]
    # An alert tells, and names its page, which names the doctor and the way to mend it.
    await scene.firing(ALERT)
    (page,) = re.findall(rf"^## {ALERT}\n(.*?)^## ", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL)
    assert f"docs/runbook.md#{ALERT.lower()}" in RULES.read_text()
    assert "darkroom doctor" in page
    assert "DARKROOM_EVOLINK_API_KEY" in page
    # The doctor says what is wrong and how to mend it.
    assert "DARKROOM_EVOLINK_API_KEY" in next(
        line for line in scene.run("doctor", code=1).splitlines() if "upstream_key" in line
    )
    # One id finds the task in the log, in its timeline, in the trace and in the console.
    lines = [line for line in scene.running[-1].lines if task in line]
    assert any('"task.submission_retried"' in line and TRACE in line for line in lines)
    (reason,) = re.findall(r"task\.held +message=(.*)", scene.run("task", task))
    await wait_until(lambda: ("darkroom", "submit", TRACE) in collector.spans)
    async with httpx.AsyncClient(base_url=scene.url, trust_env=False) as browser:
        await sign_in(browser, ADMIN_KEY)
        shown = (await browser.get(f"/console/tasks/{task}")).text
        assert "queued" in shown
        assert reason in html.unescape(shown)
    # Mend it: the right key. The task ends by itself, and the alert clears.
    scene.stop()
    scene.start(EVOLINK_API_KEY=UPSTREAM_KEY)
    await scene.clear(ALERT)
    await wait_until(lambda: "completed" in scene.run("task", task))
