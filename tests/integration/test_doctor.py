"""Each check of the doctor, with its fault caused for real (docs/doctor.md)."""

import asyncio
import ctypes
import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest
from alembic import command
from nats.js.api import StorageType, StreamConfig
from sqlalchemy import create_engine, text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from service.app import Role
from service.db.schema import config
from service.doctor import broker_checks, setting_checks
from service.doctor.examination import examine, report
from service.doctor.patient import local
from service.settings import load_settings
from service.upkeep import heartbeats
from service.web.sessions import COOKIE
from tests.api import ASYNC, got, refused, submitted
from tests.brokers import PASSWORD, START_S, USER, BrokerServer, address, broker_running, program
from tests.browser.people import cookie
from tests.disks import remount, small_disk
from tests.processes import darkroom
from tests.servers import free_port, missing
from tests.upstream import error
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, LOOPBACK, World, answering, subscriber, world

pytestmark = pytest.mark.slow

SECRET = "doctor-" + "0123456789abcdef" * 2
CREDITS = {"success": True, "data": {"token": {"remaining_credits": 41.5}}}
Cause = Callable[[AsyncExitStack, Path], Any]  # returns the settings that have the fault


async def diagnosed(folder: Path, **settings: Any) -> dict[str, Any]:
    """The checks by name, examined from here."""
    usual = {
        "data_dir": folder / "data",
        "secret_key": SECRET,
        "evolink_api_key": "sandbox",
        "upstream_networks": LOOPBACK,
        "min_free_bytes": 0,
    }
    given = {name: value for name, value in (usual | settings).items() if value is not None}
    async with local(load_settings({}, None, **given)) as patient:
        checks = report(await examine(patient))["checks"]
    return {check["name"]: check for check in checks}


def says(answer: Response) -> Starlette:
    async def respond(_: Request) -> Response:
        return answer

    return Starlette(routes=[Route("/{path:path}", respond, methods=["GET", "POST", "PUT"])])


def upstream(answer: Response) -> Cause:
    """An upstream with this answer to the free call."""

    async def cause(stack: AsyncExitStack, _: Path) -> dict[str, Any]:
        url = await stack.enter_async_context(answering(says(answer)))
        return {"evolink_base_url": url}

    return cause


def callbacks(answer: Response) -> Cause:
    """A proxy before the callback URL that answers so."""

    async def cause(stack: AsyncExitStack, _: Path) -> dict[str, Any]:
        return {"callback_url": await stack.enter_async_context(answering(says(answer)))}

    return cause


def simply(**settings: Any) -> Cause:
    async def cause(_stack: AsyncExitStack, _folder: Path) -> dict[str, Any]:
        return settings

    return cause


async def late(stack: AsyncExitStack, _: Path) -> dict[str, Any]:
    """An upstream whose clock is behind. An ASGI server would write the right time."""
    body = json.dumps(CREDITS).encode()
    head = f"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\ncontent-length: {len(body)}"

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
        writer.close()

    server = await stack.enter_async_context(await asyncio.start_server(respond, "127.0.0.1", 0))
    return {"evolink_base_url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}


async def other_keys(stack: AsyncExitStack, folder: Path) -> dict[str, Any]:
    role = Role(workers=False)
    here = await stack.enter_async_context(
        world(folder / "other", role=role, secret_key="other-" * 8)
    )
    return {"callback_url": here.url}


async def read_only(stack: AsyncExitStack, folder: Path) -> dict[str, Any]:
    disk = stack.enter_context(small_disk(folder / "disk", 8))
    (disk / "images").mkdir()
    database(disk / "d.db", "head")
    remount(disk, "ro")
    return {"database_url": f"sqlite:///{disk}/d.db", "blob_url": f"file://{disk}/images"}


def database(path: Path, revision: str) -> None:
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        command.upgrade(config(connection), "head" if revision == "newer" else revision)
        if revision == "newer":
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()


async def key_lost(_: AsyncExitStack, folder: Path) -> dict[str, Any]:
    """A store that was used with a key of its own, which is gone. It does not start."""
    async with world(folder, role=Role(workers=False)) as here:
        await submitted(here.client, ASYNC)
    here.settings.key_file.unlink()
    return {"data_dir": here.settings.data_dir, "secret_key": None}


def schema(revision: str) -> Cause:
    async def cause(_: AsyncExitStack, folder: Path) -> dict[str, Any]:
        database(folder / "d.db", revision)
        return {"database_url": f"sqlite:///{folder}/d.db"}

    return cause


@contextmanager
def network_disk(folder: Path) -> Iterator[Path]:
    """A mount of the type `fuse.sshfs` whose other side never answers, which needs root."""
    folder.mkdir()
    kernel = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        missing("a network file system", "no FUSE here")
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if kernel.mount(b"host:/srv", str(folder).encode(), b"fuse.sshfs", 0, options):
        missing("a network file system", "no file system can be mounted here")
    try:
        yield folder
    finally:
        kernel.umount2(str(folder).encode(), 2)
        os.close(device)


async def on_a_network(stack: AsyncExitStack, folder: Path) -> dict[str, Any]:
    disk = stack.enter_context(network_disk(folder / "share"))
    return {"database_url": f"sqlite:///{disk}/d.db"}


async def bucket_without_policy(stack: AsyncExitStack, folder: Path) -> dict[str, Any]:
    del stack, folder
    bucket, url = os.environ["TEST_BUCKET"], os.environ["AWS_ENDPOINT_URL"]
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        assert (await client.delete(f"/{bucket}?policy")).status_code in (200, 204)
    return {"blob_url": f"s3://{bucket}/pictures", "image_base_url": f"{url}/{bucket}/pictures"}


async def running(stack: AsyncExitStack, server: BrokerServer) -> BrokerServer:
    server.start()
    stack.callback(server.kill)
    await wait_until(server.up, START_S)
    return server


def redis(*options: str) -> Cause:
    async def cause(stack: AsyncExitStack, folder: Path) -> dict[str, Any]:
        port = free_port()
        where = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
        program_ = program("redis-server", "Redis")
        login = ["--requirepass", PASSWORD]
        await running(
            stack, BrokerServer("redis", folder, [program_, *where, *login, *options], port)
        )
        return {"sinks": address("redis", port, "events")}

    return cause


def jetstream(storage: StorageType | None) -> Cause:
    """A stream that is there already, or one that the service makes."""

    async def cause(stack: AsyncExitStack, _: Path) -> dict[str, Any]:
        server = stack.enter_context(broker_running("nats"))
        await wait_until(server.up, START_S)
        url = f"nats://127.0.0.1:{server.port}"
        if storage is not None:
            async with await nats.connect(url, user=USER, password=PASSWORD) as client:
                made = StreamConfig("events", subjects=["events.>"], storage=storage)
                await client.jetstream().add_stream(made)
        return {"sinks": address("nats", server.port, "events") + "&name=bus"}

    return cause


NOWHERE = "http://127.0.0.1:9"
HTML = Response("<html>welcome</html>", media_type="text/html")
EMPTY = JSONResponse({"success": True, "data": {"token": {"remaining_credits": 0}}})
URL, KEY, CALLBACK = (
    f"DARKROOM_{x}" for x in ("EVOLINK_BASE_URL", "EVOLINK_API_KEY", "CALLBACK_URL")
)
FAULTS: list[tuple[str, str, Cause, str, str, str]] = [
    # what is wrong, the check, its cause, its state, a part of the finding, a part of the mend
    ("no key", "upstream_key", simply(evolink_api_key=None), "fault", "not set", KEY),
    ("a wrong key", "upstream_key", upstream(error(401, "unauthorized")), "fault", "401", KEY),
    ("a closed account", "upstream_key", upstream(error(403, "banned")), "fault", "403", KEY),
    ("no credits", "upstream_credits", upstream(EMPTY), "fault", "no credits", "buy"),
    ("402", "upstream_credits", upstream(error(402, "no_credits")), "fault", "no credits", "buy"),
    ("no upstream", "upstream", simply(evolink_base_url=NOWHERE), "fault", "reached", URL),
    ("a page", "upstream", upstream(HTML), "fault", "200", URL),
    ("no such path", "upstream", upstream(PlainTextResponse("no", 404)), "fault", "404", URL),
    ("a redirect", "upstream", upstream(RedirectResponse("/login")), "fault", "/login", URL),
    ("an outage", "upstream", upstream(error(503, "busy")), "warning", "503", "wait"),
    ("a clock", "upstream_clock", late, "fault", "ahead of", "NTP"),
    ("no way back", "callbacks", simply(callback_url=NOWHERE), "fault", "reached", CALLBACK),
    (
        "a moved way",
        "callbacks",
        callbacks(RedirectResponse("https://x.test/")),
        "fault",
        "redirects to https://x.test",
        CALLBACK,
    ),
    ("a page in the way", "callbacks", callbacks(HTML), "fault", "answers 200", CALLBACK),
    ("a wall", "callbacks", callbacks(PlainTextResponse("no", 401)), "fault", "401", CALLBACK),
    ("other keys", "callbacks", other_keys, "fault", "another secret", "SECRET_KEY"),
    ("a disk", "store", read_only, "fault", "cannot be written", "writable"),
    ("a read-only folder", "images", read_only, "fault", "Read-only", "writable"),
    ("a lost key", "secrets", key_lost, "fault", "secret.key is missing", "put the key back"),
    ("an old schema", "store", schema("0011"), "fault", "0011", "darkroom migrate"),
    ("a newer schema", "store", schema("newer"), "fault", "newer", "version"),
    (
        "no server",
        "store",
        simply(database_url="postgresql://u:p@127.0.0.1:9/d"),
        "fault",
        "PostgreSQL cannot be used",
        "DATABASE_URL",
    ),
    ("a share", "store_disk", on_a_network, "fault", "fuse.sshfs", "local disk"),
    ("little room", "images", simply(min_free_bytes=2**60), "fault", "must stay free", "free"),
    ("quotes", "secrets", simply(secret_key=f"'{SECRET}'"), "fault", "quotes", "without quotes"),
    ("a quoted key", "secrets", simply(evolink_api_key="'sk-x'"), "fault", "quotes", KEY),
    (
        "no broker",
        "broker bus",
        simply(sinks="nats://127.0.0.1:9/e?stream=e&name=bus"),
        "fault",
        "cannot be used",
        "DARKROOM_SINKS",
    ),
    ("unsynced", "broker bus", jetstream(None), "warning", "one copy", "sync_interval: always"),
    ("a stream in memory", "broker bus", jetstream(StorageType.MEMORY), "fault", "memory", "file"),
    ("Redis in memory", "broker redis", redis("--save", ""), "fault", "nothing on disk", "always"),
    ("a lazy Redis", "broker redis", redis("--appendonly", "yes"), "warning", "everysec", "always"),
]


@pytest.mark.parametrize(
    ("check", "cause", "state", "finding", "mend"),
    [each[1:] for each in FAULTS],
    ids=[each[0] for each in FAULTS],
)
async def test_a_fault_is_found_and_its_mend_is_named(
    check: str, cause: Cause, state: str, finding: str, mend: str, tmp_path: Path
) -> None:
    """In one line each. The other checks run all the same."""
    async with AsyncExitStack() as stack:
        settings = await cause(stack, tmp_path)
        settings.setdefault("evolink_base_url", NOWHERE)
        found = await diagnosed(tmp_path, **settings)
    name = next(name for name in found if name == check or name.startswith(f"{check}://"))
    told = found[name]
    assert told["state"] == state, told
    assert finding in told["finding"]
    assert mend in told["mend"]
    assert "\n" not in told["finding"] + told["mend"]
    assert found["open_files"]["state"] in ("ok", "fault")
    assert SECRET not in json.dumps(found)


async def test_an_old_schema_on_postgresql_is_found(postgres_url: str, tmp_path: Path) -> None:
    found = await diagnosed(tmp_path, database_url=postgres_url, evolink_base_url=NOWHERE)
    assert (found["store"]["state"], "empty" in found["store"]["finding"]) == ("fault", True)
    assert found["store_disk"]["state"] == "skipped"


async def test_a_bucket_is_tried_with_an_object(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket without a policy refuses readers, a missing one refuses the service."""
    url = os.environ["AWS_ENDPOINT_URL"]
    prefix, more = f"{s3_bucket}/pictures", {"evolink_base_url": NOWHERE}
    public = {"blob_url": f"s3://{prefix}", "image_base_url": f"{url}/{prefix}"}
    found = await diagnosed(tmp_path, **public, **more)
    assert [found[name]["state"] for name in ("images", "image_links")] == ["ok", "ok"]
    monkeypatch.setenv("TEST_BUCKET", s3_bucket)
    async with AsyncExitStack() as stack:
        found = await diagnosed(tmp_path, **await bucket_without_policy(stack, tmp_path), **more)
    told = found["image_links"]
    assert (told["state"], "403" in told["finding"], "policy" in told["mend"]) == (
        "fault",
        True,
        True,
    )
    found = await diagnosed(tmp_path, blob_url="s3://nobodys-bucket/x", **more)
    assert found["images"]["state"] == "fault"


# --- the process at work


async def examined(here: World) -> dict[str, Any]:
    document = got(await here.client.get("/v1/doctor"))
    found = {check["name"]: check for check in document["checks"]}
    faults = any(check["state"] == "fault" for check in found.values())
    assert (document["status"] == "fault") == faults
    return found


async def test_a_process_in_order_has_no_fault(here: World) -> None:
    """The signed probe comes back through the public address. Nothing is left behind."""
    found = await examined(here)
    assert {check["state"] for check in found.values()} <= {"ok", "warning"}, found
    assert "signed probe" in found["callbacks"]["finding"]
    assert found["workers"]["state"] == "ok"
    left = [path for path in here.settings.image_dir.rglob("*") if path.is_file()]
    assert left == []
    async with here.owner() as client:
        refused(await client.get("/v1/doctor"), 403, "permission_denied")


async def test_the_console_shows_the_checks_when_they_are_asked_for(here: World) -> None:
    cookies = {COOKIE: cookie(here, ADMIN_KEY)}
    async with httpx.AsyncClient(base_url=here.url, cookies=cookies) as browser:
        page = await browser.get("/console/doctor")
        assert (page.status_code, "signed probe came back" in page.text) == (200, False)
        assert "signed probe came back" in (await browser.get("/console/doctor?run=1")).text


async def test_web_processes_alone_miss_their_workers(
    still: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "SILENT_MS", -1)
    told = (await examined(still))["workers"]
    assert (told["state"], "darkroom worker" in told["mend"]) == ("fault", True)


async def test_an_endpoint_that_redirects_is_named(tmp_path: Path) -> None:
    async with world(tmp_path) as here, subscriber() as hook:
        hook.answer = lambda _n, _request: RedirectResponse("/elsewhere", 301)
        body = {"url": hook.url, "types": ["image.task.*"]}
        id = got(await here.client.post("/v1/endpoints", json=body), 201)["id"]
        await here.ended((await here.submit())["id"])

        async def named() -> Any:
            told = (await examined(here))["endpoints"]
            return told if told["state"] == "fault" else None

        told = await wait_until(named)
        assert f"{id} answered 301" in told["finding"]


async def test_a_broker_that_lacks_events_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker is not there. Events wait for it."""
    monkeypatch.setattr(broker_checks, "LATE_MS", 0)
    sink = "nats://127.0.0.1:9/e?stream=e&name=bus"
    async with world(tmp_path, sinks=sink) as here:
        await submitted(here.client, ASYNC)

        async def late() -> bool:
            lag = (await examined(here)).get("broker_lag bus")
            return lag is not None and lag["state"] == "fault"

        await wait_until(late)


# --- the command


async def test_the_command_asks_the_service(here: World, tmp_path: Path) -> None:
    """It exits with 0 without a fault, and says where to look if nobody answers."""
    given = {"DARKROOM_URL": here.url, "DARKROOM_API_KEY": ADMIN_KEY}

    def run(*arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return darkroom("doctor", *arguments, folder=tmp_path, **(given | more))

    done = await asyncio.to_thread(run)
    assert (done.returncode, "signed probe" in done.stdout) == (0, True), done.stdout
    document = json.loads((await asyncio.to_thread(run, "--json")).stdout)
    assert document.keys() == {"status", "checks"}
    alone = await asyncio.to_thread(run, DARKROOM_URL=NOWHERE)
    assert (alone.returncode, "--local" in alone.stderr) == (1, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SECRET_KEY", "short"),
        ("CALLBACK_URL", "http://example.com"),
        ("EVOLINK_BASE_URL", "api.evolink.ai"),
        ("PORTT", "8080"),
        ("SINKS", "rabbit://x"),
    ],
)
def test_the_command_explains_why_a_service_does_not_start(
    name: str, value: str, tmp_path: Path
) -> None:
    """The wrong setting is a fault, and the other checks run. Nothing is made in its place."""
    given = {f"DARKROOM_{name}": value, "DARKROOM_EVOLINK_API_KEY": "x"}
    if name != "EVOLINK_BASE_URL":
        given |= {"DARKROOM_EVOLINK_BASE_URL": NOWHERE, "DARKROOM_UPSTREAM_NETWORKS": LOOPBACK}
    assert darkroom("serve", folder=tmp_path, **given).returncode == 1
    done = darkroom("doctor", "--local", "--json", folder=tmp_path, **given)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, found[f"setting DARKROOM_{name}"]["state"]) == (1, "fault")
    assert f"DARKROOM_{name}" in found[f"setting DARKROOM_{name}"]["mend"]
    assert found["open_files"]["state"] == "ok"
    assert ("upstream" in found) == (name != "EVOLINK_BASE_URL")
    assert not list(tmp_path.iterdir())


def test_a_low_limit_of_open_files_is_found(tmp_path: Path) -> None:
    few = setting_checks.FILES - 1
    prelude = f"import resource; resource.setrlimit({resource.RLIMIT_NOFILE}, ({few}, {few}))"
    done = darkroom("doctor", "--local", folder=tmp_path, prelude=prelude)
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if "open_files" in line)
    assert line.startswith("FAULT")
    assert "LimitNOFILE" in line
