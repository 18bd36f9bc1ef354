"""Ten minutes with Darkroom, by its documentation alone: run it, break it, be told by an alert,
find the cause with the doctor and one task's id, and mend it.
"""

import html
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.certificates import self_signed
from tests.docs.pages import CODE, commands
from tests.docs.render import DOCS
from tests.e2e.test_documented_commands import Shell, terminal
from tests.e2e.test_drills import RULES, RUNBOOK, Scene, prometheus
from tests.environment import ROOT
from tests.integration.test_console_security import sign_in
from tests.integration.test_traces import Collector, collector  # noqa: F401
from tests.processes import ADMIN_KEY, LOOPBACK, UPSTREAM_KEY, started
from tests.servers import free_port, missing
from tests.waiting import wait_until

TEN_MINUTES = 600
pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEN_MINUTES)]

ALERT = "DarkroomAccountRefused"


@dataclass(slots=True)
class Machine:
    """A machine with a public name, on which nothing runs yet."""

    shell: Shell
    public: str

    @property
    def log(self) -> str:
        return self.shell.log(self.shell.ports["serve"])


def caddyfile(folder: Path, certificate: Path, backend: str) -> Path:
    """The file of deploy/ for a name that no authority certifies, beside other servers."""
    text = (ROOT / "deploy" / "Caddyfile").read_text()
    for word, more in (
        ("{\n\tlog {", "{\n\tadmin off\n\tauto_https disable_redirects\n\tlog {"),
        ("darkroom.example} {", f"darkroom.example}} {{\n\ttls {certificate} {certificate}"),
        ("127.0.0.1:8080}", f"{backend}}}"),
    ):
        assert word in text
        text = text.replace(word, more)
    made = folder / "Caddyfile"
    made.write_text(text)
    return made


@pytest.fixture
def machine(tmp_path: Path, collector: Collector) -> Iterator[Machine]:  # noqa: F811
    """The upstream trusts the certificate of the machine and reaches it. The service exports its
    last spans as it stops, so the collector stays longer.
    """
    if shutil.which("caddy") is None:
        missing("caddy")
    certificate = self_signed(tmp_path)
    words = ["--json", "--port", "0", "--api-key", UPSTREAM_KEY, "--allow-networks", LOOPBACK]
    words += ["--delay", "0.1"]
    with (
        started("sandbox", *words, folder=tmp_path, SSL_CERT_FILE=str(certificate)) as upstream,
        terminal(tmp_path, upstream.address, SUBMIT_SCHEDULE="0.5") as shell,
    ):
        port, backend = free_port(), f"127.0.0.1:{shell.ports['serve']}"
        public = f"https://localhost:{port}"
        file = caddyfile(tmp_path, certificate, backend)
        shell.ports["run"] = port
        shell.words |= {
            "https://darkroom.example": public,
            "PROXY_SITE=darkroom.example": f"PROXY_SITE={public}",
            "deploy/Caddyfile": str(file),
            "sudo ": "",
        }
        shell.type(f"export SSL_CERT_FILE={certificate}")
        shell.type(f"export OTEL_EXPORTER_OTLP_ENDPOINT={collector.url}")
        yield Machine(shell, public)


@pytest.fixture
def watched(machine: Machine, tmp_path: Path) -> Iterator[Scene]:
    """What Prometheus sees of the machine."""
    port = machine.shell.ports["serve"]
    with ExitStack() as stack:
        yield Scene(tmp_path, "", None, *stack.enter_context(prometheus(tmp_path, port)))


def runbook(name: str) -> str:
    (page,) = re.findall(rf"^## {name}\n(.*?)^## ", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL)
    return str(page)


async def test_run_it_break_it_be_told_find_the_cause_and_mend_it(
    machine: Machine,
    watched: Scene,
    collector: Collector,  # noqa: F811
) -> None:
    shell = machine.shell
    # Run it, as docs/deploy.md says: https in front, a callback through it, and a picture.
    for command in commands(DOCS / "deploy.md"):
        if command != "make setup":  # it runs this test
            shell.type(command)
    assert "callback.received" in shell.output
    (picture,) = (shell.folder / "images").iterdir()
    assert picture.stat().st_size
    async with httpx.AsyncClient(base_url=machine.public, verify=False, trust_env=False) as public:
        assert (await public.get("/v1/tasks")).status_code == 401
        assert (await public.get("/metrics")).status_code == 404
    # Break it: the next start has a wrong key.
    env = shell.folder / ".env"
    right = env.read_text()
    env.write_text(right.replace(UPSTREAM_KEY, "sk-wrong"))
    shell.type("darkroom serve")
    shell.type("darkroom submit 'three gulls' --json")
    task = json.loads(shell.output)["id"]
    # An alert tells, and names its page.
    await watched.firing(ALERT)
    assert f"docs/runbook.md#{ALERT.lower()}" in RULES.read_text()
    page = runbook(ALERT)
    # The page's command finds the cause and names the setting that the page says to correct.
    (command,) = (code.strip("`") for code in CODE.findall(page) if code.startswith("`darkroom "))
    shell.type(f"{command} || test $? = 1")
    (line,) = (line for line in shell.output.splitlines() if "upstream_key" in line)
    setting = "DARKROOM_EVOLINK_API_KEY"
    assert setting in line
    assert f"Correct `{setting}` and restart" in page
    # One id finds the task in the timeline, in the log, in the trace and in the console.
    shell.type(f"darkroom task {task}")
    (reason,) = re.findall(r"task\.held +message=(.*)", shell.output)
    await wait_until(lambda: "submit" in dict(collector.of_tasks.get(task, ())))
    (trace,) = {trace for name, trace in collector.of_tasks[task] if name == "submit"}
    whole = machine.log.rpartition("\n")[0]
    said = [json.loads(line) for line in whole.splitlines() if task in line]
    assert {"task.queued", "task.submission_retried"} <= {line["event"] for line in said}
    assert {line["trace_id"] for line in said if "trace_id" in line} == {trace}
    async with httpx.AsyncClient(base_url=machine.public, verify=False, trust_env=False) as browser:
        await sign_in(browser, ADMIN_KEY)
        shown = html.unescape((await browser.get(f"/console/tasks/{task}")).text)
    assert f"The task is {re.findall('state +([a-z]+)', shell.output)[0]}." in shown
    assert reason in shown
    # Mend it. The task ends by itself with its picture, and the alert clears.
    env.write_text(right)
    shell.type("darkroom serve")
    await watched.clear(ALERT)

    def ended() -> bool:
        shell.type(f"darkroom task {task} --json")
        return bool(json.loads(shell.output)["state"] == "completed")

    await wait_until(ended)
    assert len(json.loads(shell.output)["images"]) == 1
