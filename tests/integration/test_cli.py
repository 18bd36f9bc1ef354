"""The program `darkroom`: its output, its requests to the service, and its failures."""

import hashlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from service import VERSION, cli
from service.cli.exit_codes import main
from service.cli.sandbox_commands import announce
from service.settings import load_settings
from tests.docs.pages import commands
from tests.docs.render import DOCS
from tests.environment import clean_environment
from tests.inputs import photo
from tests.processes import ADMIN_KEY, Running, darkroom, sandbox, service_settings, started

TASK = r"task_[a-z2-7]{26}"
COMMANDS = [
    *(
        ["serve"],
        ["worker"],
        ["sandbox"],
        ["submit"],
        ["tasks"],
        ["task"],
        ["events"],
        ["models"],
        ["estimate"],
        ["usage"],
        ["backup"],
        ["restore"],
        ["migrate"],
        ["listen"],
        ["completion"],
        ["cancel"],
        ["erase"],
        ["reconcile"],
        ["resolve"],
        ["credits"],
        ["pause"],
        ["resume"],
        ["audit"],
        ["doctor"],
        ["openapi"],
        ["asyncapi"],
    ),
    *(
        ["endpoints", word]
        for word in ("list", "create", "get", "patch", "delete", "rotate", "test")
    ),
    *(["deliveries", word] for word in ("list", "get", "retry")),
    *(["bulk", word] for word in ("reconcile", "requeue", "resolve", "deliveries")),
    *(["replay", word] for word in ("start", "get", "cancel")),
    *(["budgets", word] for word in ("list", "set", "clear")),
    *(["files", word] for word in ("upload", "list", "get", "delete")),
    *(["keys", word] for word in ("create", "list", "revoke", "rotate-secret")),
]


@dataclass(frozen=True)
class Done:
    """A command's exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the program in this process, in an empty folder, with only the given settings."""
    for name in [name for name in os.environ if name.upper().startswith("DARKROOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def act(*arguments: str, **environment: str) -> Done:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["darkroom", *arguments])
            with pytest.raises(SystemExit) as end:
                main()
        said = capsys.readouterr()
        return Done(int(end.value.code or 0), said.out, said.err)

    return act


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`darkroom serve --sandbox --json`."""
    with started(
        "serve", "--sandbox", "--json", "--port", "0", folder=tmp_path_factory.mktemp("dev")
    ) as running:
        yield running


@pytest.fixture(scope="module")
def picture_link() -> Iterator[str]:
    """A link on this machine, from which the sandbox fetches an input image."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = photo()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/a.png"
        server.shutdown()


@pytest.fixture
def client(dev: Running) -> Mapping[str, str]:
    """The two environment variables that a client command needs."""
    return {"DARKROOM_URL": dev.address, "DARKROOM_API_KEY": dev.announcement["key"]}


def one_line(done: Done) -> str:
    """The only line of a failed command: exit code 1, nothing on standard output, no traceback."""
    assert done.code == 1, done
    (line,) = done.err.splitlines()
    assert line.startswith("darkroom: ")
    return line.removeprefix("darkroom: ")


# --- usage
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(run: Run, command: list[str]) -> None:
    """Every command has `--help` and `--json` (docs/cli.md)."""
    done = run(*command, "--help")
    assert done.code == 0
    assert "--json" in done.out
    assert f"Usage: darkroom {' '.join(command)}" in done.out


def test_the_table_of_commands_is_whole(run: Run) -> None:
    """The command list of these tests equals the program's."""
    group = typer.main.get_command(cli.program)
    known: list[list[str]] = []
    # # typer's own group class is private
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        known += (
            [[name, word] for word in command.commands]
            if hasattr(command, "commands")
            else [[name]]
        )
    assert sorted(known) == sorted(COMMANDS)
    assert run("--version").out == f"darkroom {VERSION}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("submit",),
        ("submit", "x", "--n", "none"),
        ("submit", "x", "--image", "picture.png"),
        ("submit", "x", "--metadata", "novalue"),
        ("submit", "x", "--idempotency-key", "✓"),
        ("tasks", "--limit", "0"),
        ("task", ".."),
        ("endpoints", "patch", "ep_x"),
        ("keys", "create", "--owner", "x", "--scopes", "everything"),
        ("keys", "create", "--owner", "x", "--scopes", "read", "--budget", ""),
        ("sandbox", "--fault", "nonsense=1"),
        ("sandbox", "--fault", "delay"),
        ("sandbox", "--price", "-1"),
        ("sandbox", "--price", "cheap"),
        ("sandbox", "--allow-networks", "127.0.0.1/8"),
        ("serve", "--sandbox", "--no-worker"),
        ("serve", "--fault", "delay=1"),
        ("tasks", "--url", "http://a.test", "--local"),
        ("serve", "--port", "70000"),
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_two(run: Run, arguments: tuple[str, ...]) -> None:
    """Bad usage exits with 2 and a message on standard error, before the command sends a request or
    opens a file (docs/cli.md).
    """
    done = run(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Error: " in done.err
    assert not (Path.cwd() / "data").exists()


# --- failures
# --------------------------------------------------------------------------------------------------


def test_a_service_that_is_not_there_is_one_line(run: Run) -> None:
    """The line for a refused connection names the address and its variable."""
    assert (
        one_line(run("tasks", DARKROOM_URL="http://127.0.0.1:9"))
        == "no service answers at http://127.0.0.1:9: is DARKROOM_URL right?"
    )


def test_a_service_that_is_something_else_is_one_line(run: Run) -> None:
    """The message distinguishes another server at the address from a service that rejects the
    request.
    """

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"<html>not here</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        line = one_line(run("tasks", DARKROOM_URL=f"http://127.0.0.1:{server.server_port}"))
    assert "answered 404, but not as the service does: is DARKROOM_URL right?" in line


def test_a_connection_that_breaks_does_not_lose_the_order(run: Run) -> None:
    """The service may have created the task, so the line has the key for a safe retry."""

    class Cut(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        done = run(
            "submit",
            "x",
            "--idempotency-key",
            "my-order",
            DARKROOM_URL=f"http://127.0.0.1:{server.server_port}",
        )
        server.shutdown()
    assert one_line(done).endswith(
        "the task may have been taken: ask again with --idempotency-key my-order"
    )


def test_refusals_are_told_in_the_services_words(
    run: Run, client: Mapping[str, str], dev: Running
) -> None:
    """An API error is printed as its code and message. A missing key is named."""
    assert one_line(run("submit", "x", "--size", "10x10", **client)).startswith(
        "invalid_parameter: size must"
    )
    assert one_line(run("task", "task_unknown", **client)).startswith("task_not_found: ")
    assert one_line(run("tasks", DARKROOM_URL=dev.address)).endswith(
        "(DARKROOM_API_KEY is not set)"
    )
    assert one_line(run("tasks", DARKROOM_URL=dev.address, DARKROOM_API_KEY="dk_wrong")).startswith(
        "unauthorized: "
    )
    assert one_line(run("tasks", DARKROOM_URL="ftp://x")).startswith("DARKROOM_URL: ")


def test_a_start_that_cannot_be_is_one_line(run: Run, tmp_path: Path, dev: Running) -> None:
    """The line names what is wrong or missing: key, address, store, unknown settings."""
    taken = dev.address.rpartition(":")[2]
    assert f"127.0.0.1:{taken} cannot be listened on" in one_line(run("serve", "--port", taken))
    assert "(--host, --port)" in one_line(run("sandbox", "--port", taken))
    figures = run("serve", "--sandbox", "--port", "0", DARKROOM_METRICS_PORT=taken)
    assert figures.err.endswith("Address already in use (DARKROOM_METRICS_PORT)\n")
    assert "DARKROOM_NONSENSE is not a setting" in one_line(run("serve", DARKROOM_NONSENSE="1"))
    assert "on SQLite `darkroom serve` does both" in one_line(run("worker", "--port", "0"))
    done = darkroom("serve", "--port", "0", folder=tmp_path)
    assert "DARKROOM_EVOLINK_API_KEY is required" in one_line(
        Done(done.returncode, done.stdout, done.stderr)
    )
    (tmp_path / "not-a-store").write_text("hello, this is no database at all")
    done = darkroom("migrate", folder=tmp_path, DARKROOM_DATABASE_URL="sqlite:///not-a-store")
    assert "cannot be used" in one_line(Done(done.returncode, done.stdout, done.stderr))


# --- tasks
# --------------------------------------------------------------------------------------------------


def test_submit_prints_the_id_and_waits_if_asked(
    run: Run, client: Mapping[str, str], picture_link: str
) -> None:
    """Standard output has only the result: the id, the links, the files, or with `--json` the whole
    task.
    """
    id = run("submit", "a lighthouse", **client)
    assert re.fullmatch(TASK + "\n", id.out)
    said = [f"at {client['DARKROOM_URL']} (DARKROOM_URL)", "estimate: 2 credits"]
    assert id.err.splitlines()[:2] == said
    links = run(
        "submit", "灯塔", "--n", "2", "--size", "768x768", "--wait", **client
    ).out.splitlines()
    assert [link.startswith(client["DARKROOM_URL"] + "/images/img_") for link in links] == [
        True,
        True,
    ]
    task = run(
        "submit", "a gull", "--json", "--metadata", "a=b", "--metadata", "c=d=e", **client
    ).json
    assert (task["prompt"], task["metadata"], task["model"]) == (
        "a gull",
        {"a": "b", "c": "d=e"},
        "wan2.5-text-to-image",
    )
    image = run("submit", "a gull", "--image", picture_link, "--json", **client).json
    assert (image["model"], image["request"]["image_urls"]) == (
        "wan2.5-image-to-image",
        [picture_link],
    )


def test_files_are_uploaded_and_edited(
    run: Run, client: Mapping[str, str], tmp_path: Path, picture_link: str
) -> None:
    """`files upload PATH…` prints ids, and `--image` takes a path, an id, a link or a result."""
    paths = [tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "small.png"]
    for path, content in zip(paths, (photo(), photo("JPEG"), photo(size=(9, 9))), strict=True):
        path.write_bytes(content)
    ids = run("files", "upload", str(paths[0]), str(paths[1]), **client).out.splitlines()
    assert all(re.fullmatch("file_[a-z2-7]{26}", id) for id in ids)
    given = [str(paths[0]), ids[1], picture_link]
    images = [word for each in given for word in ("--image", each)]
    task = run("submit", "a gull", *images, "--wait", "--json", **client).json
    assert [each["id"] is None for each in task["inputs"]] == [False, False, True]
    assert task["inputs"][1]["id"] == ids[1]
    result = task["images"][0]["id"]
    again = run("submit", "at night", "--image", result, "--wait", "--json", **client).json
    assert again["inputs"][0]["id"] == result
    refusal = run("files", "upload", str(paths[2]), **client)
    assert (refusal.code, refusal.out) == (1, "")
    assert all(word in one_line(refusal) for word in ("small.png", "384 to 5000", "9x9"))
    assert run("files", "delete", ids[0], "--json", **client).json == {
        "id": ids[0],
        "deleted": True,
    }
    assert run("files", "get", ids[0], **client).code == 1
    listed = run("files", "list", "--json", **client).json["data"]
    assert ids[1] in [file["id"] for file in listed]


def test_submit_saves_the_images(run: Run, client: Mapping[str, str], tmp_path: Path) -> None:
    """`--out DIR` creates the folder, waits, and saves the stored images byte for byte."""
    task = run(
        "submit", "a lighthouse", "--n", "2", "--out", "pictures/new", "--json", **client
    ).json
    files = [tmp_path / name for name in task["files"]]
    assert sorted(files) == sorted((tmp_path / "pictures" / "new").iterdir())
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == [
        image["sha256"] for image in task["images"]
    ]
    (tmp_path / "taken").touch()
    assert run("submit", "x", "--out", "taken", **client).code == 2


def test_the_same_idempotency_key_is_the_same_task(run: Run, client: Mapping[str, str]) -> None:
    """A repeated order returns the first task. A different order under the same key is rejected."""
    first, second = (
        run("submit", "once", "--idempotency-key", "order-1", **client).out for _ in range(2)
    )
    assert first == second
    assert one_line(run("submit", "twice", "--idempotency-key", "order-1", **client)).startswith(
        "idempotency_conflict: "
    )


def test_a_task_that_fails_fails_the_command(run: Run, tmp_path: Path) -> None:
    """Waiting for a task that does not complete exits with 1 and names the outcome. Ctrl+C exits
    with 130.
    """
    with (
        sandbox(
            "--fault", "fail=content_policy_violation", "--delay", "0", folder=tmp_path
        ) as upstream,
        started(
            "serve", folder=tmp_path, **service_settings(upstream.address, tmp_path)
        ) as service,
    ):
        client = {"DARKROOM_URL": service.address, "DARKROOM_API_KEY": ADMIN_KEY}
        line = one_line(run("submit", "x", "--wait", **client))
        assert "failed: content_policy_violation: " in line
        done = run("submit", "x", "--wait", "--json", **client)
        assert (done.code, done.json["state"]) == (1, "failed")


def test_tasks_are_listed_and_one_is_told_in_full(run: Run, client: Mapping[str, str]) -> None:
    """A list has one form for people and one for programs. A task is found by our id and the
    upstream's, with its timeline.
    """
    run("submit", "another lighthouse", "--wait", "--json", **client)
    made = run(
        "submit",
        "a \x1b[31mred\x1b[0m\nlighthouse",
        "--metadata",
        "list=this",
        "--wait",
        "--json",
        **client,
    ).json
    listed = run("tasks", "--metadata", "list=this", **client).out.splitlines()
    assert listed[0].split() == [
        *("id", "state", "age", "cost", "images", "created", "model", "prompt")
    ]
    assert listed[1].startswith(f"{made['id']}  completed  ")
    assert len(listed) == 2
    assert "\x1b" not in listed[1]
    page = run("tasks", "--state", "completed", "--limit", "1", "--json", **client).json
    assert [task["id"] for task in page["data"]] == [made["id"]]
    assert page["next_cursor"]
    for id in (made["id"], made["upstream_id"]):
        steps = [step["step"] for step in run("task", id, "--json", **client).json["timeline"]]
        assert steps[0] == "task.queued"
        assert steps[-1] == "event.emitted"
    text = run("task", made["id"], **client).out
    assert "image.task.completed" in text
    assert re.search(r"^age +([0-9]+m )?[0-9]+s$", text, re.MULTILINE)
    assert "\x1b" not in text


# --- events
# --------------------------------------------------------------------------------------------------


def test_events_are_json_lines_in_order(run: Run, client: Mapping[str, str]) -> None:
    """One event per line, in sequence. Filters are position, type and task."""
    made = run("submit", "a lighthouse", "--wait", "--json", **client).json
    every = [json.loads(line) for line in run("events", **client).out.splitlines()]
    assert [event["sequence"] for event in every] == sorted(event["sequence"] for event in every)
    ours = [
        json.loads(line)
        for line in run("events", "--task", made["id"], "--json", **client).out.splitlines()
    ]
    assert [event["type"] for event in ours] == ["image.task.submitted", "image.task.completed"]
    rest = run(
        "events",
        "--after",
        ours[0]["sequence"],
        "--type",
        "image.task.completed",
        "--task",
        made["id"],
        **client,
    )
    assert [json.loads(line)["id"] for line in rest.out.splitlines()] == [ours[1]["id"]]
    assert one_line(run("events", "--after", "yesterday", **client)).startswith(
        "invalid_request: after "
    )


@contextmanager
def following(
    client: Mapping[str, str], folder: Path, after: str
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "service", "events", "--follow", "--after", after]
    environment = clean_environment(client)
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_following_prints_what_comes_until_it_is_interrupted(
    run: Run, client: Mapping[str, str], tmp_path: Path
) -> None:
    """`--follow` prints each event when it happens. Ctrl+C ends it with 130 and no message."""
    run("submit", "a lighthouse", "--wait", **client)
    place = json.loads(run("events", **client).out.splitlines()[-1])["sequence"]
    with following(client, tmp_path, place) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        id = run("submit", "a lighthouse", "--wait", "--json", **client).json["id"]
        ours = (
            event for event in map(json.loads, process.stdout) if event["subject"] == id
        )  # other tests' tasks end as well
        assert [next(ours)["type"] for _ in range(2)] == [
            "image.task.submitted",
            "image.task.completed",
        ]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""


def test_a_reader_that_leaves_ends_the_command_quietly(
    run: Run, client: Mapping[str, str], tmp_path: Path
) -> None:
    """`darkroom events --follow | head -1` prints no traceback and no error."""
    run("submit", "a lighthouse", "--wait", **client)
    with following(client, tmp_path, "0") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        run("submit", "a lighthouse", "--wait", **client)
        assert process.wait(30) == 1
        assert process.stderr.read() == ""


# --- administration
# --------------------------------------------------------------------------------------------------


def test_endpoints_and_deliveries(run: Run, client: Mapping[str, str]) -> None:
    """The test covers an endpoint's whole life and a delivery with its attempts."""
    made = run(
        "endpoints",
        "create",
        "http://127.0.0.1:9/hook",
        "--description",
        "nobody there",
        "--json",
        **client,
    ).json
    assert made["secret"].startswith("whsec_")
    assert made["id"] in run("endpoints", "list", **client).out
    task = run("submit", "a lighthouse", "--wait", "--json", **client).json
    listing = ("deliveries", "list", "--endpoint", made["id"], "--task", task["id"], "--json")
    while not all(each["attempts"] for each in run(*listing, **client).json["data"]):
        pass  # a worker of the service makes them
    patched = run(
        "endpoints",
        "patch",
        made["id"],
        "--status",
        "disabled",
        "--type",
        "image.task.failed",
        "--json",
        **client,
    ).json
    assert (patched["status"], patched["types"]) == ("disabled", ["image.task.failed"])
    shown = run("endpoints", "get", made["id"], **client).out
    assert "disabled" in shown
    assert "whsec_" not in shown
    page = run(*listing, **client).json
    assert {delivery["task"] for delivery in page["data"]} == {task["id"]}
    delivery = run("deliveries", "get", page["data"][-1]["id"], **client).out
    assert made["id"] in delivery
    assert "NotConnected" in delivery
    assert "attempts" in run("deliveries", "list", **client).out
    assert run("endpoints", "delete", made["id"], "--json", **client).json == {
        "id": made["id"],
        "deleted": True,
    }
    assert one_line(run("endpoints", "get", made["id"], **client)).startswith(
        "endpoint_not_found: "
    )


def test_rotating_testing_retrying_and_replaying(run: Run, client: Mapping[str, str]) -> None:
    """Failed deliveries are counted, sent again, and shown. A failed endpoint test fails the
    command.
    """
    made = run("endpoints", "create", "http://127.0.0.1:9/hook", "--json", **client).json
    rotated = run("endpoints", "rotate", made["id"], "--overlap", "0", "--json", **client).json
    assert rotated["secret"] not in ("", made["secret"])
    tried = run("endpoints", "test", made["id"], "--json", **client)
    assert (tried.code, tried.json["status"]) == (1, None)
    assert "the endpoint did not take it: NotConnected" in tried.err
    task = run("submit", "a lighthouse", "--wait", "--json", **client).json
    page = run(
        "deliveries", "list", "--endpoint", made["id"], "--task", task["id"], "--json", **client
    ).json
    (delivery, *_) = page["data"]
    retried = run("deliveries", "retry", delivery["id"], "--json", **client).json
    assert len(retried["attempts"]) > len(delivery["attempts"])
    assert (
        run("replay", "start", made["id"], "--only", "all", "--dry-run", "--json", **client).json[
            "id"
        ]
        is None
    )
    ending = (
        "--only",
        "all",
        "--type",
        "image.task.completed",
        "--since",
        "2026-01-01T00:00:00Z",
        "--json",
    )
    replay = run("replay", "start", made["id"], *ending, **client).json
    assert replay["count"] > 0
    assert run("replay", "get", replay["id"], "--json", **client).json["endpoint"] == made["id"]
    assert run("replay", "cancel", replay["id"], "--json", **client).json == {
        "id": replay["id"],
        "cancelled": True,
    }
    assert one_line(run("replay", "start", made["id"], "--only", "some", **client)).startswith(
        "invalid_request: only: "
    )
    run("endpoints", "delete", made["id"], **client)


def test_keys_are_made_in_a_store_that_nobody_serves_and_else_through_the_api(
    run: Run, tmp_path: Path
) -> None:
    """On SQLite the command opens the file only while no process holds its lock. Standard output
    has only the answer.
    """
    settings = service_settings("https://upstream.invalid", tmp_path)

    def directly(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return darkroom("keys", *arguments, "--json", folder=tmp_path, **settings | environment)

    made = json.loads(directly("create", "--owner", "studio", "--scopes", "submit,read").stdout)
    assert made["key"].startswith("dk_")
    assert made["callback_secret"].startswith("whsec_")
    bad = directly("create", "--owner", "NOT AN OWNER", "--scopes", "read")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert json.loads(bad.stderr)["error"]["message"].startswith("invalid_request: owner: ")
    with started("serve", folder=tmp_path, **settings) as service:
        here = settings | {"DARKROOM_URL": service.address}
        assert run("tasks", "--json", **here | {"DARKROOM_API_KEY": made["key"]}).json == {
            "data": [],
            "next_cursor": None,
        }
        second = run(
            "keys", "create", "--owner", "studio", "--scopes", "read", "--json", **here
        ).json  # by the admin key
        assert second["callback_secret"] is None
        other = run(
            "keys", "rotate-secret", "--owner", "studio", "--overlap", "60", "--json", **here
        ).json
        assert other["owner"] == "studio"
        assert other["callback_secret"] not in (None, made["callback_secret"])
        assert one_line(run("keys", "rotate-secret", "--owner", "nobody", **here)).startswith(
            "owner_not_found: "
        )
        assert run("keys", "revoke", second["id"], **here).out.split() == [
            "id",
            second["id"],
            "revoked",
            "true",
        ]
        assert (
            one_line(run("keys", "revoke", "key_unknown", **here))
            == "key_not_found: no key has that id"
        )
        listed = run("keys", "list", **here).out
        assert listed.split()[:3] == ["id", "hint", "owner"]
        assert made["key"] not in listed
        # The service holds the lock, and no service answers at the configured address.
        assert "no service answers" in one_line(
            run("keys", "list", **settings, DARKROOM_URL="http://127.0.0.1:9")
        )
    assert json.loads(directly("rotate-secret", "--owner", "studio").stdout)[
        "callback_secret"
    ] not in (None, other["callback_secret"])
    assert directly("rotate-secret", "--owner", "nobody").returncode == 1
    assert directly("revoke", made["id"], DARKROOM_URL="http://127.0.0.1:9").returncode == 0
    assert all(key["revoked_at"] for key in json.loads(directly("list").stdout)["data"])


def test_an_address_elsewhere_never_means_the_store_here(run: Run, tmp_path: Path) -> None:
    """With a DARKROOM_URL of another machine the command writes nothing to a local store."""
    assert "no service answers" in one_line(
        run("keys", "list", DARKROOM_URL="http://darkroom.invalid")
    )
    assert not (tmp_path / "data").exists()


def test_migrate_openapi_and_asyncapi(run: Run, tmp_path: Path) -> None:
    """These commands need no service. They create or keep the schema and print the documents as
    JSON.
    """
    first, second = (
        darkroom("migrate", "--json", folder=tmp_path, DARKROOM_MIGRATE="off") for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json.loads(first.stdout) == json.loads(second.stdout)
    for command, version in (("openapi", "3.1.0"), ("asyncapi", "3.0.0")):
        document = run(command).json
        assert document[command] == version
        assert document == run(command, "--json").json


# --- for people
# --------------------------------------------------------------------------------------------------


def test_the_line_that_serve_sandbox_prints_works(dev: Running) -> None:
    """`make dev` prints an address, a key and a curl line. The printed line, run unchanged, brings
    a completed task.
    """
    words = shlex.split(dev.announcement["curl"])
    assert words[:3] == ["curl", "-sS", f"{dev.address}/v1/images/generations"]
    headers = dict(word.split(": ", 1) for flag, word in pairwise(words) if flag == "-H")
    answer = httpx.post(
        words[2], headers=headers, content=words[words.index("-d") + 1], timeout=40, trust_env=False
    )
    assert answer.json()["state"] == "completed"


@pytest.mark.parametrize("console", ["on", "off"])
def test_the_first_lines_name_the_console_if_the_service_has_one(
    console: str, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(load_settings(console=console), "http://127.0.0.1:9", "dk_a", as_json=False)
    assert ("http://127.0.0.1:8080/console/" in capsys.readouterr().out) == (console == "on")


def test_a_terminal_shows_progress_and_the_start_tells_how_to_go_on(
    client: Mapping[str, str], tmp_path: Path
) -> None:
    """A terminal shows the estimate, then the task's state while it runs, and below it the cost and
    the result.
    """
    main, terminal = pty.openpty()
    slow = ("--set", 'sandbox={"delay": 2}')
    command = [sys.executable, "-m", "service", "submit", "a lighthouse", "--wait", *slow]
    environment = clean_environment({**client, "TERM": "xterm", "COLUMNS": "200"})
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        said = b""
        with suppress(OSError):  # Linux reports with an OSError that the other side has closed
            while part := os.read(main, 65536):
                said += part
        assert process.wait(30) == 0
    os.close(main)
    text = said.decode()
    parts = ("at http://", "estimate: 2 credits", "submitted 0 %, estimate", "cost: 2 credits")
    shown = [text.index(part) for part in parts]
    assert shown == sorted(shown)
    assert "/images/img_" in text.splitlines()[-1]


def test_serve_sandbox_tells_people_where_it_is(tmp_path: Path) -> None:
    """Without `--json` the address, the key and the example commands stand between the log lines.
    Sandbox data is separate from real tasks.
    """
    with started("serve", "--sandbox", folder=tmp_path, DARKROOM_PORT="0") as running:
        running.signal(signal.SIGTERM)
        assert running.ended() == 0
    assert any(line.startswith("key       dk_") for line in running.lines)
    assert (tmp_path / "data" / "sandbox" / "darkroom.db").is_file()
    assert not (tmp_path / "data" / "darkroom.db").exists()


# --- the catalogue


def test_models_are_shown_with_limits_and_prices(run: Run, client: Mapping[str, str]) -> None:
    """A row for each model. With a name, a row for each field with its limit and its source."""
    done = run("models", **client)
    header, *rows = done.out.splitlines()
    assert header.split() == ["model", "edits", "n", "input_images", "sizes", "price"]
    assert [row.split()[0] for row in rows] == [
        entry["model"] for entry in run("models", "--json", **client).json["data"]
    ]
    assert next(row for row in rows if row.startswith("mj-v7 ")).endswith(
        "5.4 credits per request (model_params.speed: draft 2.7, fast 5.4, turbo 10.8)"
    )
    shown = run("models", "wan2.5-image-to-image", **client).out
    assert "2 credits per image" in shown
    field = next(line for line in shown.splitlines() if line.startswith("image_urls "))
    assert "a list of 1 to 5 links, required" in field
    assert "https://docs.evolink.ai/" in field
    assert run("models", "wan2.5-image-to-image", "--json", **client).json["edits"] is True
    fields = run("models", "doubao-seedream-4.0", **client).out
    row = r"n +integer +1 +a whole number from 1 to 15, together with the input images at most 15 "
    assert re.search(row, fields), fields
    assert re.search(r"nsfw_check +boolean +false ", run("models", "z-image-turbo", **client).out)
    assert one_line(run("models", "dall-e-9", **client)).startswith("model_not_found: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("wan2.5-text-to-image --n 3", "6 credits = 3 x 2 per image"),
        ("wan2.5-text-to-image --size 768x768", "2 credits = 1 x 2 per image"),
        ("mj-v7 --field model_params.speed=turbo", "10.8 credits = 1 x 10.8 per request"),
        ("z-image-turbo --field seed=5", "0.026 credits = 1 x 0.026 per image"),
        ("gpt-image-2 -n 2", "the catalogue has no price of gpt-image-2"),
    ],
)
def test_an_estimate_is_printed_before_anything_is_submitted(
    run: Run, client: Mapping[str, str], arguments: str, line: str
) -> None:
    words = arguments.split()
    assert run("estimate", *words, **client).out == line + "\n"
    assert run("estimate", *words, "--json", **client).json["unit"] == "credits"


def test_an_estimate_over_a_limit_fails_with_one_line(run: Run, client: Mapping[str, str]) -> None:
    line = one_line(run("estimate", "wan2.5-text-to-image", "--n", "5", **client))
    assert line == "invalid_parameter: n must be a whole number from 1 to 4, not 5"
    assert run("estimate", "wan2.5-text-to-image", "--field", "seed", **client).code == 2


def test_the_page_about_money_is_true(run: Run, client: Mapping[str, str]) -> None:
    """Every command of docs/money.md works, and `submit` prints what the page shows."""
    page = DOCS / "money.md"
    typed = [shlex.split(command)[1:] for command in commands(page)]
    done = [run(*words, **client) for words in typed]
    assert [end.code for end in done] == [0] * len(typed)
    assert {words[0] for words in typed} == {"submit", "usage", "keys", "budgets"}
    (said,) = (end.err for words, end in zip(typed, done, strict=True) if words[0] == "submit")
    said = said.replace(f"{client['DARKROOM_URL']} (DARKROOM_URL)", "http://127.0.0.1:8080")
    assert "".join(f"    {line}\n" for line in said.splitlines()) in page.read_text()


def test_a_submission_without_a_price_says_so(run: Run, client: Mapping[str, str]) -> None:
    done = run("submit", "x", "--model", "gpt-image-2", "--size", "1:1", **client)
    assert done.err.splitlines()[1:] == ["estimate: unknown", "reserved: 1.5 credits"]


CLEARED: dict[str, tuple[str, str, Any, Any]] = {
    "ordered_by": ("--ordered-by", "user", "user", None),
    "metadata": ("--metadata", "shop=7", {"shop": "7"}, {}),
    "headers": ("--header", "X-Env=prod", {"X-Env": "prod"}, {}),
    "rate_per_s": ("--rate-per-s", "2.5", 2.5, None),
    "description": ("--description", "a shop", "a shop", ""),
}


def test_an_empty_text_clears_an_option_of_an_endpoint(run: Run, client: Mapping[str, str]) -> None:
    """Each alone. The others stay, and so does what the command does not name."""
    given = [word for name, text, *_ in CLEARED.values() for word in (name, text)]
    # No task of these tests expires, so no delivery fails meanwhile.
    kind = ("--type", "image.task.expired")
    make = ("endpoints", "create", "http://127.0.0.1:9/a", *kind, *given, "--json")
    made = run(*make, **client).json
    assert made["ordered"]  # --ordered-by says so
    assert {name: made[name] for name in CLEARED} == {name: CLEARED[name][2] for name in CLEARED}
    wanted = dict(made)
    for name, (option, _, _, cleared) in CLEARED.items():
        patched = run("endpoints", "patch", made["id"], option, "", "--json", **client).json
        wanted[name] = cleared
        assert patched == {each: wanted[each] for each in patched}, option
    for option, text in (("--rate-per-s", "x"), ("--header", "x"), ("--metadata", "=")):
        assert run("endpoints", "patch", made["id"], option, text, **client).code == 2
    zero = run("endpoints", "patch", made["id"], "--rate-per-s", "0", **client)
    assert "rate_per_s" in one_line(zero)
    run("endpoints", "delete", made["id"], **client)


def test_an_enabled_endpoint_shows_what_it_missed_and_how_to_send_it(
    run: Run, client: Mapping[str, str]
) -> None:
    """The endpoint asks for a type of event that no other test causes."""
    kind = ("--type", "image.task.cancelled")
    made = run("endpoints", "create", "http://127.0.0.1:9/a", *kind, "--json", **client).json
    patch = ("endpoints", "patch", made["id"], "--status")
    for _ in range(2):
        run(*patch, "disabled", **client)
        shown = run(*patch, "enabled", **client).out
        assert "replay" not in shown
        assert "missed" not in shown
    run(*patch, "disabled", **client)
    slow = ("--set", 'sandbox={"delay": 600}')
    task = run("submit", "a lighthouse", *slow, "--json", **client).json
    run("cancel", task["id"], **client)
    lines = dict(
        re.split(" {2,}", line) for line in run(*patch, "enabled", **client).out.splitlines()
    )
    assert lines["missed"] == "1"
    assert not [name for name in lines if name.startswith("replay")]
    program, *words = lines["to send them"].split()
    assert program == "darkroom"
    assert run(*words, "--json", **client).json["count"] == 1
    run("endpoints", "delete", made["id"], **client)


def test_a_refused_picture_names_the_option_of_the_command(
    run: Run, client: Mapping[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "glass.png"
    path.write_bytes(photo("PNG", mode="RGBA"))
    for words in (("files", "upload", str(path)), ("submit", "x", "--image", str(path))):
        line = one_line(run(*words, **client))
        assert line.endswith("darkroom files upload --flatten removes the channel"), line
        assert str(path) in line
    error = json.loads(run("files", "upload", str(path), "--json", **client).err)["error"]
    assert (error["param"], "--flatten" in error["message"]) == ("file", True)
    assert run("files", "upload", str(path), "--flatten", **client).out.startswith("file_")


def test_a_budget_is_set_and_its_figures_are_shown(run: Run, client: Mapping[str, str]) -> None:
    """A key with a budget, its figures, a refusal, and usage."""
    words = "keys create --owner shop --scopes submit,read --budget 50/day"
    made = run(*words.split(), "--json", **client).json
    assert made["budget"] == {"period": "day", "credits": 50}
    key = made["key"]
    own = dict(client) | {"DARKROOM_API_KEY": key}
    done = run("submit", "a lighthouse", "--wait", **own)
    assert done.err.splitlines()[1:] == ["estimate: 2 credits", "cost: 2 credits"]
    head, row = run("budgets", "list", **own).out.splitlines()
    assert head.split() == ["owner", "period", "limit", "spent", "reserved", "left"]
    assert row.split() == ["shop", "day", "50", "2", "0", "48"]
    assert run("budgets", "set", "shop", "100/month", "--json", **client).json["left"] == 98
    for word in ("100", "100/week", "-1/day", "x/day"):
        assert run("budgets", "set", "shop", "--", word, **client).code == 2
    assert run("budgets", "set", "shop", "2/total", **client).code == 0
    assert one_line(run("submit", "a lighthouse", **own)).startswith("budget_exceeded: the task")
    assert run("budgets", "clear", "shop", **client).code == 0
    assert run("budgets", "list", "--json", **own).json["data"] == []
    figures = run("usage", **own).out.splitlines()[1].split()[1:]
    assert figures == ["1", "1", "1", "2", "2", "2", "0"]
    table = run("usage", "--by", "model", "--from", "2026-02-01", **own).out.splitlines()
    assert [line.split()[0] for line in table] == ["model", "wan2.5-text-to-image", "total"]
    assert run("usage", "--by", "hour", **own).code == 2


@pytest.mark.parametrize("arguments", ["serve", "serve --sandbox", "sandbox --catalogue {}"])
def test_a_wrong_catalogue_stops_the_start_with_one_line(tmp_path: Path, arguments: str) -> None:
    """The line names the file, the line in it, the field and the value."""
    path = tmp_path / "models.toml"
    path.write_text("[models.a]\n\nprice = { credits = 'x' }\n")
    settings = {"DARKROOM_CATALOGUE": str(path), "DARKROOM_EVOLINK_API_KEY": "k"}
    words = [word.format(path) for word in arguments.split()]
    done = darkroom(*words, "--port", "0", folder=tmp_path, **settings)
    line = one_line(Done(done.returncode, "", done.stderr))
    assert line.startswith(f"DARKROOM_CATALOGUE: {path}, line 3: models.a.price.credits: ")
    assert line.endswith(', not "x"')
    assert not (tmp_path / "data").exists()
