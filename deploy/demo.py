"""`make demo`: runs the sandbox upstream, the service and a subscriber on this machine, submits
tasks through the public API, and checks the results. One task edits an uploaded picture with a
second reference image. The ledger of the tasks is printed and compared with the upstream's record.

The sandbox and the service are processes of their own. The subscriber is a small HTTP server in
this process. Files and logs stay in ./demo-data, which is emptied first.
"""

import hashlib
import io
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from service.signing import sign_webhook
from service.upstreams.sandbox.renderer import draw

FOLDER = Path("demo-data")
START_S, TASKS_S, STOP_S = 60.0, 60.0, 30.0  # limits for a slow machine
RECONCILE_AFTER_S = 3
TOLERANCE_S = 300  # of a signature's timestamp
LOOPBACK = "127.0.0.0/8"
JSON = dict[str, Any]


@dataclass(frozen=True)
class Order:
    """A task, the sandbox's faults for it, and its terminal state. `pictures` are uploaded first,
    and the task edits them.
    """

    about: str
    prompt: str
    ends: str
    sandbox: Mapping[str, Any]
    n: int = 1
    pictures: tuple[str, ...] = ()

    def body(self, files: list[str]) -> JSON:
        order = {
            "model": f"wan2.5-{'image' if files else 'text'}-to-image",
            "prompt": self.prompt,
            "n": self.n,
            "size": "1024x1024",
        }
        order |= {"image_urls": files} if files else {}
        return order | {"metadata": {"demo": self.about}, "sandbox": dict(self.sandbox)}


ORDERS = (
    Order("four images", "a lighthouse in the fog, four seasons", "completed", {}, n=4),
    Order("a failure", "不被允许的画面", "failed", {"fail": "content_policy_violation"}),
    Order("a cancel", "a harbour without ships", "cancelled", {"cancel": "status"}),
    Order("its callback is never sent", "雾中的灯塔,水墨画", "completed", {"drop_callback": True}),
    Order(
        "its callback is sent three times",
        "three gulls, 三只海鸥",
        "completed",
        {"repeat_callback": 3},
    ),
    Order(
        "an edit of an uploaded picture with a second reference image",
        "the lighthouse in the style of the second picture",
        "completed",
        {},
        pictures=("a lighthouse", "waves in ink, 水墨"),
    ),
)


class DemoFailed(Exception):
    """A check failed. The text says which."""


def check(holds: object, otherwise: str) -> None:
    if not holds:
        raise DemoFailed(otherwise)


@contextmanager
def program(
    name: str, *arguments: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Runs `darkroom …` with a clean environment. Yields the process and its log."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("DARKROOM_")
    }
    path = FOLDER / f"{name}.log"
    with path.open("wb") as log:
        command = [sys.executable, "-m", "service", *arguments]
        process = subprocess.Popen(
            command, cwd=FOLDER, env=inherited | environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield process, path
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def announced(process: subprocess.Popen[bytes], log: Path, event: str | None) -> str:
    """The address in the first log line of this event that has one."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        running, lines = process.poll() is None, log.read_text("utf-8", "replace").splitlines()
        for line in lines:
            fields = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if "address" in fields and fields.get("event") == event:
                return str(fields["address"])
        check(
            running,
            f"the {log.stem} ended at its start: {lines[-1] if lines else process.returncode}",
        )
        time.sleep(0.05)
    raise DemoFailed(f"{log.stem} did not start within {START_S:.0f} s")


class Subscriber(ThreadingHTTPServer):
    """Verifies each delivery over its raw bytes. `received` has the valid ones: id and body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), DeliveryHandler)
        self.secrets: list[str] = []
        self.received: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.refused: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/darkroom"


class DeliveryHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Subscriber

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        id, timestamp = self.headers["webhook-id"], int(self.headers["webhook-timestamp"])
        given = self.headers["webhook-signature"].split()
        valid = abs(time.time() - timestamp) <= TOLERANCE_S and any(
            sign_webhook([secret], id, timestamp, body) in given for secret in self.server.secrets
        )
        if valid:
            self.server.received.put((id, body))
        else:
            self.server.refused.append(id)
        self.send_response(200 if valid else 400)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `gather` prints deliveries."""


@contextmanager
def subscriber() -> Iterator[Subscriber]:
    with Subscriber() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def answer(response: httpx.Response) -> JSON:
    check(
        response.is_success,
        f"{response.request.method} {response.request.url.path} answered {response.status_code}:"
        f" {response.text}",
    )
    document: JSON = response.json()
    return document


def client(address: str, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=address, headers={"authorization": f"Bearer {key}"}, timeout=30, trust_env=False
    )


def gather(server: Subscriber, count: int, started: float) -> list[tuple[str, JSON]]:
    """Prints deliveries as they come, until there are `count` different events. Returns them."""
    received: list[tuple[str, JSON]] = []
    end = time.monotonic() + TASKS_S
    while len({id for id, _ in received}) < count:
        try:
            id, body = server.received.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise DemoFailed(
                f"{len(received)} of {count} events came within {TASKS_S:.0f} s; refused:"
                f" {server.refused}"
            ) from None
        event = json.loads(body)
        received.append((id, event))
        seconds = time.monotonic() - started
        print(
            f"  {seconds:5.1f} s  {event['type']:<20}  {event['sequence']}  {event['subject']} "
            f" {id}  signature verified"
        )
    return received


def check_events(
    received: list[tuple[str, JSON]], events: list[JSON], tasks: Mapping[str, Order]
) -> None:
    """Deliveries and outbox have the same events, and each task its own two."""
    outbox = {event["id"]: event for event in events}
    lost = outbox.keys() - {id for id, _ in received}
    check(not lost, f"never delivered: {sorted(lost)}")
    for id, event in received:
        check(
            event["id"] == id and outbox.get(id) == event,
            f"{id} is not in GET /v1/events as it was delivered",
        )
    for task_id, order in tasks.items():
        types = sorted(event["type"] for event in events if event["subject"] == task_id)
        wanted = sorted(["image.task.submitted", f"image.task.{order.ends}"])
        check(types == wanted, f"{task_id} ({order.about}) has the events {types}, not {wanted}")


def check_images(
    service: httpx.Client, upstream: httpx.Client, task: JSON, order: Order
) -> list[Path]:
    """Compares the files on disk with the upstream's and with those that the service serves."""
    check(
        task["state"] == order.ends,
        f"{task['id']} ({order.about}) is {task['state']}, not {order.ends}",
    )
    wanted = order.n if order.ends == "completed" else 0
    check(
        len(task["images"]) == len(task["results"]) == wanted,
        f"{task['id']} has {len(task['images'])} images, not {wanted}",
    )
    made = answer(upstream.get(f"/v1/tasks/{task['upstream_id']}")).get("results", [])
    check(
        len(made) == wanted, f"the upstream made {len(made)} images for {task['id']}, not {wanted}"
    )
    files = []
    for image, link, source in zip(task["images"], task["results"], made, strict=True):
        found = list((FOLDER / "images" / task["id"]).glob(f"{image['index']}-*"))
        check(len(found) == 1, f"{image['id']} is {len(found)} files on disk")
        digests = {
            hashlib.sha256(content).hexdigest()
            for content in (found[0].read_bytes(), service.get(link).content)
        }
        digests.add(hashlib.sha256(upstream.get(source).content).hexdigest())
        check(
            digests == {image["sha256"]},
            f"{image['id']}: disk, service, upstream and task do not agree on its bytes",
        )
        files += found
    return files


def check_timelines(service: httpx.Client, tasks: Mapping[str, Order]) -> None:
    """A timeline counts the callbacks of its task."""
    for task_id, order in tasks.items():
        steps = answer(service.get(f"/v1/tasks/{task_id}/timeline"))["data"]
        calls = [step["count"] for step in steps if step["step"] == "callback.received"]
        wanted = (
            [] if "drop_callback" in order.sandbox else [order.sandbox.get("repeat_callback", 1)]
        )
        check(calls == wanted, f"{task_id} ({order.about}) has the callbacks {calls}, not {wanted}")


def show(service: httpx.Client, files: list[Path], task_id: str) -> None:
    print(f"\nstored under {FOLDER / 'images'}")
    for path in files:
        print(f"  {path.stat().st_size:>8} bytes  {path.relative_to(FOLDER / 'images')}")
    print(f"\nthe timeline of {task_id}")
    for step in answer(service.get(f"/v1/tasks/{task_id}/timeline"))["data"]:
        details = {
            name: value
            for name, value in step.items()
            if name not in ("time", "step") and value is not None
        }
        print(
            f"  {step['time']}  {step['step']:<20} "
            f" {' '.join(f'{name}={value}' for name, value in details.items())}"
        )


def show_ledger(service: httpx.Client, upstream: httpx.Client, tasks: Mapping[str, Order]) -> None:
    """Prints the entries of each task, whose sum is the cost in the upstream's record."""
    charges = answer(upstream.get("/sandbox/charges"))["data"]
    record = {row["idempotency_key"]: row["used"] - row["refunded"] for row in charges}
    print("\nthe ledger, in credits")
    for task_id, order in tasks.items():
        entries = answer(service.get("/v1/ledger", params={"task": task_id}))["data"]
        print(f"  {task_id}  {order.about}")
        for entry in entries:
            print(f"    {entry['kind']:<8}  {entry['credits']:>4}  by {entry['source']}")
        spent = sum(row["credits"] for row in entries if row["kind"] not in ("estimate", "reserve"))
        check(
            spent == record[task_id],
            f"{task_id} costs {spent} credits, and {record[task_id]} by the upstream's record",
        )
    print(f"  {sum(record.values())} credits were spent, as the upstream's record says")


def sandbox_command(key: str) -> tuple[str, ...]:
    return ("sandbox", "--json", "--port", "0", "--api-key", key, "--allow-networks", LOOPBACK)


def service_settings(upstream: str, upstream_key: str, admin_key: str) -> dict[str, str]:
    settings = {
        "PORT": "0",
        "DATA_DIR": ".",
        "ADMIN_KEY": admin_key,
        "CALLBACK_URL": "http://127.0.0.1:{port}",
        "EVOLINK_BASE_URL": upstream,
        "EVOLINK_API_KEY": upstream_key,
        "EVOLINK_RESULT_HOSTS": "127.0.0.1",
        "UPSTREAM_NETWORKS": LOOPBACK,
        "ENDPOINT_NETWORKS": LOOPBACK,
        "RECONCILE_AFTER_S": str(RECONCILE_AFTER_S),
        "MIN_FREE_BYTES": str(64 << 20),
    }
    return {f"DARKROOM_{name}": value for name, value in settings.items()}


def upload(service: httpx.Client, words: str) -> str:
    """Uploads a picture of these words. Returns the file's id."""
    content = draw(words, words, 640, 480, "png")
    file = answer(service.post("/v1/files", files={"file": (f"{words}.png", content)}))
    print(f"  uploaded   {file['id']}  {file['width']}x{file['height']}: {words}")
    return str(file["id"])


def submit(service: httpx.Client) -> dict[str, Order]:
    """Submits every order. Returns them by the ids of their tasks."""
    tasks = {}
    for order in ORDERS:
        headers = {"prefer": "respond-async"}
        body = order.body([upload(service, picture) for picture in order.pictures])
        task = answer(service.post("/v1/images/generations", json=body, headers=headers))
        tasks[task["id"]] = order
        print(f"  submitted  {task['id']}  {order.about}: {order.prompt}")
    print()
    return tasks


def check_stored(
    service: httpx.Client, upstream: httpx.Client, tasks: Mapping[str, Order]
) -> list[Path]:
    """Checks every image and the number of files. Returns the files."""
    files = []
    for id, order in tasks.items():
        files += check_images(service, upstream, answer(service.get(f"/v1/tasks/{id}")), order)
    stored = sum(path.is_file() for path in (FOLDER / "images").glob("task_*/*-*.*"))
    check(stored == len(files), f"{stored} files are on disk, not {len(files)}")
    return files


def demo() -> str:
    """Runs everything. Returns the last line."""
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    admin_key, upstream_key = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    with ExitStack() as stack:
        enter = stack.enter_context
        inbox = enter(subscriber())
        sandbox = enter(program("sandbox", *sandbox_command(upstream_key)))
        upstream_address = announced(*sandbox, None)
        settings = service_settings(upstream_address, upstream_key, admin_key)
        process, log = enter(program("service", "serve", **settings))
        address = f"http://{announced(process, log, 'service.started')}"
        print(f"sandbox upstream  {upstream_address}\nservice           {address}")
        print(f"subscriber        {inbox.url}\n")

        admin = enter(client(address, admin_key))
        key = {"owner": "demo", "scopes": ["submit", "read", "subscribe"]}
        service = enter(client(address, answer(admin.post("/v1/keys", json=key))["key"]))
        endpoint = answer(service.post("/v1/endpoints", json={"url": inbox.url}))
        inbox.secrets.append(endpoint["secret"])
        started, tasks = time.monotonic(), submit(service)
        received = gather(inbox, 2 * len(tasks), started)

        events = answer(service.get("/v1/events"))["data"]
        check_events(received, events, tasks)
        upstream = enter(client(upstream_address, upstream_key))
        files = check_stored(service, upstream, tasks)
        check_timelines(service, tasks)
        show(service, files, next(iter(tasks)))
        show_ledger(service, upstream, tasks)

        process.terminate()  # a clean stop finishes work in flight, and then nothing more comes
        check(process.wait(STOP_S) == 0, f"the service ended with {process.returncode}")
        ids = [id for id, _ in received]
        while not inbox.received.empty():
            ids.append(inbox.received.get()[0])
        doubled = sum(count - 1 for count in Counter(ids).values())
        check(not inbox.refused, f"deliveries without a valid signature: {inbox.refused}")
        check(not doubled, f"{doubled} deliveries came twice")
        return (
            f"demo: {len(tasks)} tasks, {len(events)} events, {len(files)} images, 0 lost,"
            f" {doubled} doubled"
        )


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the children stop too
    try:
        print("\n" + demo())
    except (
        DemoFailed,
        httpx.HTTPError,
        OSError,
        LookupError,
        ValueError,
        subprocess.TimeoutExpired,
    ) as error:
        reason = error if isinstance(error, DemoFailed) else f"{type(error).__name__}: {error}"
        print(
            f"\ndemo failed: {reason}; the logs are {FOLDER / 'service.log'} and"
            f" {FOLDER / 'sandbox.log'}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
