"""A drill for each alert: a real Prometheus scrapes the service, the test causes the fault, sees
the alert fire, follows docs/runbook.md and sees the alert clear.

Windows, delays and thresholds of the rules are shorter than in production.
"""

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from service.db.queues import QUEUES
from service.ops.metrics import STAGES, Metrics
from service.setting_types import keys_of
from service.signing import Keyring
from service.web.overload import SHED_AT
from tests.api import SUBMIT, order
from tests.brokers import BrokerServer, address, broker_running
from tests.consumers.programs import listening
from tests.disks import small_disk
from tests.environment import ROOT
from tests.processes import (
    ADMIN_KEY,
    UPSTREAM_KEY,
    Running,
    darkroom,
    sandbox,
    service_settings,
    started,
)
from tests.servers import free_port, missing
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RULES = ROOT / "deploy" / "prometheus" / "darkroom.rules.yaml"
RUNBOOK = ROOT / "docs" / "runbook.md"
DASHBOARD = ROOT / "deploy" / "grafana" / "darkroom.json"
NAMES = [
    rule["alert"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
]
QUICK = {
    r"for: \d+\w": "for: 0s",
    r"\[\d+[mh]\]": "[10s]",
    r"(oldest_unsettled\w+\)) > 3600": r"\1 > 2",
    r"(oldest_due\w+\)|sink_lag\)) > 60": r"\1 > 2",
    "< 5e9": "< 25e6",
    "< 100$": "< 9999",  # the sandbox gives 10,000
}
QUICK_BEATS = """
from service.upkeep import heartbeats

heartbeats.BEAT_S, heartbeats.SILENT_MS = 0.5, 4000
"""
SCRAPING = """
global: {{scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 500ms}}
rule_files: [rules.yaml]
scrape_configs:
  - job_name: darkroom
    authorization: {{credentials: {key}}}
    static_configs: [{{targets: {targets}}}]
"""


def promtool(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        missing("prometheus")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_rule_fires_and_is_silent_where_it_should() -> None:
    promtool("check", "rules", str(RULES))
    promtool("test", "rules", "tests/e2e/darkroom.rules.test.yaml")
    tried = (ROOT / "tests/e2e/darkroom.rules.test.yaml").read_text()
    assert sorted(re.findall(r"alertname: (\w+)", tried)) == sorted([*NAMES, *NAMES])


def test_each_alert_has_its_page_in_the_runbook() -> None:
    """The page says what the alert means, what to look at and what to do."""
    pages = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)[1:]
    assert [page.split("\n")[0] for page in pages] == NAMES
    for page in pages:
        assert re.findall(r"^\*\*(.*?)\.?\*\*", page, re.MULTILINE) == [
            *("Meaning", "Look at", "Do")
        ]
    rules = RULES.read_text()
    assert re.findall(r"runbook: (.*)", rules) == [f"docs/runbook.md#{n.lower()}" for n in NAMES]


def test_the_dashboard_and_the_rules_name_metrics_that_exist() -> None:
    known = {sample.name for each in Metrics().registry.collect() for sample in each.samples}
    known |= {each.name for each in Metrics().registry.collect()}
    assert json.loads(DASHBOARD.read_text())["panels"]
    named = re.findall(r"\bdarkroom_\w+", DASHBOARD.read_text() + RULES.read_text())
    assert named
    assert {re.sub("_bucket$", "", name) for name in named} <= known | {f"{n}_total" for n in known}
    assert set(STAGES) - {"claim", "inbox"} == QUEUES.keys()  # whose faults count from 0


@dataclass(slots=True)
class Scene:
    """A service on a small disk with a sandbox and a broker, and the Prometheus that scrapes it.
    `fading` names alerts whose faults are over, and which clear once their windows have passed.
    """

    folder: Path
    upstream: str
    broker: BrokerServer | None
    port: int
    prometheus: str
    running: list[Running] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)  # beside the settings
    fading: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, **more: str) -> None:
        settings = {
            "PORT": str(self.port),
            "DELIVERY_SCHEDULE": "0.1",
            "EVOLINK_RESULT_TTL_S": "1800",
        }
        if self.broker:
            settings["SINKS"] = address("nats", self.broker.port, "drill")
        environment = service_settings(self.upstream, self.folder, **settings | more)
        environment |= self.environment
        self.running.append(Running("serve", folder=self.folder, **environment))
        assert self.running[-1].address

    def stop(self) -> None:
        process = self.running.pop()
        process.signal(15)
        process.ended()

    def run(self, *arguments: str, code: int = 0, key: str = ADMIN_KEY) -> str:
        """The output of a command of the runbook."""
        place = {"DARKROOM_URL": self.url, "DARKROOM_API_KEY": key}
        done = darkroom(*arguments, folder=self.folder, **place)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def submit(
        self, key: str = ADMIN_KEY, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", "prefer": "respond-async", **(headers or {})}
        return httpx.post(
            self.url + SUBMIT, json=order(**fields), headers=headers, timeout=30, trust_env=False
        )

    def asked(self, path: str, **query: str) -> Any:
        """The data that Prometheus answers with, or None until it is ready."""
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{self.prometheus}/api/v1/{path}", params=query, trust_env=False)
            return answer.json()["data"] if answer.status_code == 200 else None
        return None

    def alerts(self) -> set[str] | None:
        """The names of the alerts that fire, or None until Prometheus is ready."""
        found = self.asked("alerts")
        if found is None:
            return None
        return {
            each["labels"]["alertname"] for each in found["alerts"] if each["state"] == "firing"
        }

    async def firing(self, name: str) -> None:
        """Waits until the alert fires."""
        await wait_until(lambda: name in (self.alerts() or ()), 90)

    async def clear(self, name: str) -> None:
        """Waits until the alert does not fire."""

        def told() -> bool:
            fire = self.alerts()
            return fire is not None and name not in fire

        await wait_until(told, 90)

    async def scraped(self) -> None:
        """Waits until Prometheus has the figures of several scrapes."""

        def told() -> bool:
            found = self.asked("query", query="count_over_time(darkroom_dead_letters[10s]) > 1")
            return bool(found and found["result"])

        await wait_until(told, 90)


class Observer(NamedTuple):
    """The port that Prometheus scrapes, and its own address."""

    port: int
    address: str


@contextmanager
def receiving(port: int) -> Iterator[None]:
    """A subscriber that takes every delivery."""
    answer = "s.rfile.read(int(s.headers['content-length'])), s.send_response(204), s.end_headers()"
    program = (
        "import http.server as h; "
        f"R = type('R', (h.BaseHTTPRequestHandler,), dict(do_POST=lambda s: ({answer}))); "
        f"h.HTTPServer(('127.0.0.1', {port}), R).serve_forever()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def prometheus(folder: Path, port: int) -> Iterator[Observer]:
    rules = RULES.read_text()
    for pattern, replacement in QUICK.items():
        rules, count = re.subn(pattern, replacement, rules, flags=re.MULTILINE)
        assert count, pattern
    (folder / "rules.yaml").write_text(rules)
    target = json.dumps([f"127.0.0.1:{port}"])
    (folder / "prometheus.yaml").write_text(SCRAPING.format(key=ADMIN_KEY, targets=target))
    listen = free_port()
    try:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yaml",
                f"--storage.tsdb.path={folder}/prometheus",
                f"--web.listen-address=127.0.0.1:{listen}",
                "--log.level=warn",
            ]
        )
    except FileNotFoundError:
        missing("prometheus")
    with process:
        try:
            yield Observer(port, f"http://127.0.0.1:{listen}")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def observers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Observer]]:
    """Two Prometheus servers. They start together, because each first scrapes after 5 s."""
    with ExitStack() as stack:
        folders = [tmp_path_factory.mktemp("observer") for _ in range(2)]
        yield [stack.enter_context(prometheus(folder, free_port())) for folder in folders]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, observers: list[Observer]) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("drills")
    with ExitStack() as stack:
        upstream = stack.enter_context(
            sandbox("--delay", "0", "--result-ttl", "1800", folder=folder)
        )
        broker = stack.enter_context(broker_running("nats"))
        stack.enter_context(small_disk(folder / "data", 64))
        made = Scene(folder, upstream.address, broker, *observers[0])
        made.start()
        stack.callback(made.stop)
        yield made
        for name in sorted(made.fading):  # here, so that the windows pass at the same time
            asyncio.run(made.clear(name))


@pytest.fixture
async def scene(staged: Scene) -> Scene:
    await staged.scraped()
    return staged


async def test_a_process_that_is_down(scene: Scene) -> None:
    await scene.clear("DarkroomDown")
    scene.stop()
    await scene.firing("DarkroomDown")
    scene.start()
    await scene.clear("DarkroomDown")


async def test_links_at_risk(scene: Scene) -> None:
    """The host of the results is not in the settings. The event names the setting."""
    scene.stop()
    scene.start(EVOLINK_RESULT_HOSTS="results.example")
    task = scene.submit().json()["id"]
    await scene.firing("DarkroomLinksAtRisk")
    await wait_until(
        lambda: "EVOLINK_RESULT_HOSTS" in scene.run("events", "--type", "image.at_risk")
    )
    scene.stop()
    scene.start()
    await scene.clear("DarkroomLinksAtRisk")
    await wait_until(lambda: "completed" in scene.run("task", task))


async def test_a_task_that_does_not_end(scene: Scene) -> None:
    task = scene.submit(sandbox={"delay": 600}).json()["id"]
    await scene.firing("DarkroomTaskUnsettled")
    assert task in scene.run("tasks", "--state", "submitted", "--json")
    scene.run("reconcile", task)
    scene.run("cancel", task)
    await scene.clear("DarkroomTaskUnsettled")


async def test_dead_letters(scene: Scene) -> None:
    """Nobody listens at the endpoint's address until the operator sends the deliveries again."""
    port = free_port()
    endpoint = scene.run("endpoints", "create", f"http://127.0.0.1:{port}/", "--json")
    scene.submit(sandbox={"fail": "service_error"})
    await scene.firing("DarkroomDeadLetters")
    identifier = json.loads(endpoint)["id"]
    assert identifier in scene.run("deliveries", "list", "--state", "dead", "--json")
    with receiving(port):
        await listening(port)
        scene.run("bulk", "deliveries", "--endpoint", identifier, "--yes")
        mine = ("deliveries", "list", "--endpoint", identifier, "--state", "delivered", "--json")
        await wait_until(lambda: len(json.loads(scene.run(*mine))["data"]) == 2)
        scene.fading.add("DarkroomDeadLetters")
    scene.run("endpoints", "delete", identifier)


async def test_callbacks_with_wrong_tokens(scene: Scene) -> None:
    async with httpx.AsyncClient(base_url=scene.url, trust_env=False, timeout=30) as stranger:
        for number in range(15):
            path = f"/callbacks/evolink/task_agrcruksvk3yv2kiynce2m3swe/wrong{number:020}"
            assert (await stranger.post(path, json={"id": "x"})).status_code in (401, 429)
    await scene.firing("DarkroomCallbacksRefused")
    await wait_until(lambda: "wrong_token" in str(scene.running[-1].logged("callback.refused")))
    scene.fading.add("DarkroomCallbacksRefused")


async def test_an_account_that_is_refused(scene: Scene) -> None:
    scene.stop()
    scene.start(EVOLINK_API_KEY="sk-wrong")
    task = scene.submit(sandbox={"fail": "service_error"}).json()["id"]
    await scene.firing("DarkroomAccountRefused")
    assert "upstream_key" in scene.run("doctor", code=1)
    scene.stop()
    scene.start(EVOLINK_API_KEY=UPSTREAM_KEY)
    await scene.clear("DarkroomAccountRefused")
    await wait_until(lambda: "failed" in scene.run("task", task))


async def test_submission_that_stays_paused(scene: Scene) -> None:
    scene.run("pause", "the upstream is repaired")
    await scene.firing("DarkroomSubmissionPaused")
    assert "the upstream is repaired" in scene.run("audit", "--action", "submission.pause")
    scene.run("resume")
    await scene.clear("DarkroomSubmissionPaused")


async def test_a_budget_that_is_used_up(scene: Scene) -> None:
    """The owner gets 402 until the operator raises the budget. Few credits are left meanwhile."""
    made = scene.run(
        *("keys", "create", "--owner", "ann", "--scopes", "submit,read", "--budget", "1/day"),
        "--json",
    )
    key = json.loads(made)["key"]
    await wait_until(lambda: scene.submit(key).status_code == 402)
    await scene.firing("DarkroomBudgetExhausted")
    assert "ann" in scene.run("budgets", "list")
    scene.run("budgets", "set", "ann", "100/day")
    assert scene.submit(key).status_code == 200
    scene.fading.add("DarkroomBudgetExhausted")


async def test_few_credits(scene: Scene) -> None:
    """Another account of the upstream has credits again."""
    scene.submit()
    await wait_until(lambda: scene.run("credits"))
    await scene.firing("DarkroomCreditsLow")
    with sandbox("--delay", "0", folder=scene.folder) as other:
        scene.stop()
        scene.start(EVOLINK_BASE_URL=other.address)
        assert "10000" in scene.run("credits")
        figures = "min(darkroom_upstream_credits) >= 9999"
        await wait_until(lambda: (scene.asked("query", query=figures) or {}).get("result"), 90)
        await scene.clear("DarkroomCreditsLow")
        scene.stop()
    scene.start()


async def test_a_disk_that_fills(scene: Scene) -> None:
    await scene.clear("DarkroomDiskFilling")
    ballast = scene.folder / "data" / "ballast"
    ballast.write_bytes(bytes(40 << 20))
    await scene.firing("DarkroomDiskFilling")
    ballast.unlink()
    await scene.clear("DarkroomDiskFilling")


async def test_a_broker_that_is_behind(scene: Scene) -> None:
    assert scene.broker
    scene.broker.kill()
    scene.submit(sandbox={"fail": "service_error"})
    await scene.firing("DarkroomBrokerBehind")
    await wait_until(lambda: scene.running[-1].logged("sink.failed"))
    await scene.broker.restarted()
    await scene.clear("DarkroomBrokerBehind")


async def test_a_worker_that_meets_an_exception(scene: Scene) -> None:
    """The row of a submission is damaged. Once it is whole, the worker submits it by itself."""
    scene.run("pause", "a drill")
    task = scene.submit(sandbox={"fail": "service_error"}).json()["id"]
    with closing(sqlite3.connect(scene.folder / "data" / "darkroom.db", timeout=30)) as db:
        db.execute("UPDATE tasks SET inputs = '{' WHERE id = ?", (task,))
        db.commit()
        scene.run("resume")
        await scene.firing("DarkroomWorkerFaults")
        await wait_until(lambda: task in str(scene.running[-1].logged("worker.failed")))
        db.execute("UPDATE tasks SET inputs = NULL WHERE id = ?", (task,))
        db.commit()
    scene.fading.add("DarkroomWorkerFaults")
    await wait_until(lambda: "failed" in scene.run("task", task))


async def test_a_store_that_does_not_commit(scene: Scene) -> None:
    with closing(sqlite3.connect(scene.folder / "data" / "darkroom.db", timeout=30)) as db:
        db.execute("BEGIN IMMEDIATE")
        await wait_until(lambda: scene.submit().status_code == 503)
        await scene.firing("DarkroomStoreFailing")
        db.rollback()
    scene.fading.add("DarkroomStoreFailing")


async def test_clients_that_are_shed(scene: Scene) -> None:
    """The bodies of many callbacks are slow. Clients get 503 meanwhile, and the log says so."""
    ring = Keyring(keys_of((scene.folder / "data" / "secret.key").read_text().strip()))
    task = "task_" + "a" * 26
    path = f"/callbacks/evolink/{task}/{ring.callback_token('evolink', task)}"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n".encode()
    key = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with (
        AsyncExitStack() as stack,
        httpx.AsyncClient(base_url=scene.url, headers=key, trust_env=False, timeout=30) as client,
    ):
        for _ in range(SHED_AT + 20):
            _, writer = await asyncio.open_connection("127.0.0.1", scene.port)
            stack.callback(writer.close)
            writer.write(head)

        async def shed() -> bool:
            return (await client.get("/v1/tasks")).status_code == 503

        await wait_until(shed)
    await wait_until(lambda: scene.running[-1].logged("http.shed"))
    await scene.firing("DarkroomShedding")
    scene.fading.add("DarkroomShedding")


async def test_no_worker_and_late_deliveries(
    postgres_url: str, tmp_path: Path, observers: list[Observer]
) -> None:
    """The only worker is killed while a delivery waits for its retry. The web process goes on."""
    with ExitStack() as stack:
        upstream = stack.enter_context(sandbox("--delay", "0", folder=tmp_path))
        more = {
            "DATABASE_URL": postgres_url,
            "SECRET_KEY": "k" * 64,
            "DELIVERY_SCHEDULE": ",".join(["2"] * 30),
            "PORT": str(observers[1].port),
        }
        settings = service_settings(upstream.address, tmp_path, **more)
        own = settings | {"DARKROOM_PORT": "0"}
        stack.enter_context(
            started("serve", "--no-worker", folder=tmp_path, prelude=QUICK_BEATS, **settings)
        )
        worker = Running("worker", folder=tmp_path, prelude=QUICK_BEATS, **own)
        stack.callback(lambda: worker.process.poll() is None and worker.process.kill())
        assert worker.address
        scene = Scene(tmp_path, upstream.address, None, *observers[1])
        await scene.scraped()
        scene.run("endpoints", "create", f"http://127.0.0.1:{free_port()}/")
        scene.submit(sandbox={"fail": "service_error"})
        await wait_until(lambda: worker.logged("delivery.attempted"))
        worker.process.kill()
        worker.ended()
        await scene.firing("DarkroomDeliveriesLate")
        await scene.firing("DarkroomNoWorker")
        assert "workers" in scene.run("doctor", code=1)
        stack.enter_context(started("worker", folder=tmp_path, prelude=QUICK_BEATS, **own))
        await scene.clear("DarkroomNoWorker")
        await scene.clear("DarkroomDeliveriesLate")
