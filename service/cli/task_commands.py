"""`darkroom submit`, `darkroom tasks`, `darkroom task`."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from service.cli.client import CommandFailed, Service, call, pairs, segment, service
from service.cli.endpoint_commands import Cursor, Limit
from service.cli.output import Json, plain, put, put_fields, put_json, put_table, remark, terminal
from service.errors import EgressError
from service.strict_json import JSON
from service.tasks.state import TERMINAL

HOLD_S, LOOK_S = (
    60,
    1,
)  # how long one call waits for the end: alone, and under a display that shows progress
Metadata = Annotated[list[str] | None, typer.Option(help="May be repeated.", metavar="KEY=VALUE")]


def submit(
    prompt: Annotated[str, typer.Argument(help="What the pictures are to show.", metavar="PROMPT")],
    model: Annotated[
        str | None,
        typer.Option(help="Default: wan2.5-text-to-image, with --image wan2.5-image-to-image."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, like 1280x1280.", metavar="WxH")] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="How many pictures.", min=1)] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="An input picture; may be repeated.", metavar="URL")
    ] = None,
    metadata: Metadata = None,
    callback_url: Annotated[
        str | None, typer.Option(help="Gets the task when it has ended, signed.", metavar="URL")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="The same key and order is the same task, paid once.", metavar="KEY"),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until the task has ended.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Save the pictures there; waits for them.", file_okay=False, metavar="DIR"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Submit a task. Prints its id; with --wait the links of its pictures, with --out the files.
    Fails if the task does.
    """
    for text in image or []:
        if not text.startswith(("http://", "https://")):
            raise typer.BadParameter(
                f"{text!r} is no URL, and files cannot be sent yet", param_hint="--image"
            )
    order: JSON = {
        "model": model or ("wan2.5-image-to-image" if image else "wan2.5-text-to-image"),
        "prompt": prompt,
    }
    wishes = {
        "size": size,
        "n": n,
        "image_urls": image,
        "metadata": pairs(metadata, "--metadata"),
        "callback_url": callback_url,
    }
    order |= {name: value for name, value in wishes.items() if value not in (None, [], {})}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    key = idempotency_key or secrets.token_hex(16)
    with service() as client:
        task = ask(client, order, key, None)
        if wait or out is not None:
            task = ended(client, order, key, task)
        files = (
            [str(saved(client, each, task["id"], out)) for each in task["images"]]
            if out is not None
            else []
        )
    if as_json:
        put_json({**task, "files": files} if out is not None else task)
    else:
        lines = (
            (files if out is not None else task["results"])
            if wait or out is not None
            else [task["id"]]
        )
        for line in lines:
            put(line)
    if task["state"] in TERMINAL and task["state"] != "completed":
        error = task["error"] or {}
        raise CommandFailed(
            f"{task['id']} {task['state']}: {error.get('code')}: {error.get('message')}"
        )


def ask(client: Service, order: JSON, key: str, hold_s: int | None) -> JSON:
    """The task, as it is after `hold_s` seconds at most or its end; the same task for the same key
    however often it is asked for.
    """
    headers = {"idempotency-key": key} | ({} if hold_s is None else {"prefer": f"wait={hold_s}"})
    try:
        return client.call("POST", "/v1/images/generations", body=order, headers=headers)
    except EgressError as error:
        raise CommandFailed(
            f"{error}; the task may have been taken: ask again with --idempotency-key {key}"
        ) from None


def ended(client: Service, order: JSON, key: str, task: JSON) -> JSON:
    """The task at its end; meanwhile its state on the terminal, if there is one."""
    hold_s = LOOK_S if terminal() else HOLD_S
    with progress(task) as show:
        while task["state"] not in TERMINAL:
            task = ask(client, order, key, hold_s)
            show(task)
    return task


@contextmanager
def progress(task: JSON) -> Iterator[Callable[[JSON], None]]:
    """A line that lives while the task does; nothing where nobody looks."""
    if not terminal():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        line = display.add_task(f"{task['id']} {task['state']}", total=None)
        yield lambda task: display.update(
            line, description=f"{task['id']} {task['state']} {task['progress']} %"
        )


def saved(client: Service, image: JSON, task_id: str, folder: Path) -> Path:
    """The image in the folder, checked, whole or not at all."""
    content = client.fetch(f"/images/{segment(image['id'])}")
    if hashlib.sha256(content).hexdigest() != image["sha256"]:
        raise CommandFailed(f"{image['id']}: what came is not what was stored")
    kind = {"image/jpeg": "jpg"}.get(image["media_type"], image["media_type"].rpartition("/")[2])
    path = folder / f"{task_id}-{image['index']}.{kind}"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def tasks(
    state: Annotated[
        str | None, typer.Option(help="queued, submitted, completed, failed, …")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of this model.")] = None,
    metadata: Metadata = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    as_json: Json = False,
) -> None:
    """List tasks, newest first."""
    asked = {"state": state, "model": model, "limit": limit, "cursor": cursor}
    asked |= {f"metadata.{name}": value for name, value in pairs(metadata, "--metadata").items()}
    page = call("GET", "/v1/tasks", params=asked)
    if as_json:
        put_json(page)
        return
    rows = [
        {
            **task,
            "created": date(task["created"]),
            "images": len(task["images"]),
            "prompt": plain(task["prompt"] or "")[:60],
        }
        for task in page["data"]
    ]
    put_table(rows, "id", "state", "created", "images", "model", "prompt")
    if page["next_cursor"]:
        remark(f"more: --cursor {page['next_cursor']}")


def task(
    id: Annotated[str, typer.Argument(help="Ours or the upstream's.", metavar="ID")],
    as_json: Json = False,
) -> None:
    """Show a task with its timeline."""
    with service() as client:
        task = client.call("GET", f"/v1/tasks/{segment(id)}")
        steps = (
            client.call("GET", f"/v1/tasks/{segment(task['id'])}/timeline")["data"]
            if "state" in task
            else []
        )
    if as_json:
        put_json({**task, "timeline": steps})
        return
    shown = {
        name: task.get(name)
        for name in (
            "id",
            "state",
            "upstream_id",
            "model",
            "prompt",
            "request",
            "metadata",
            "usage",
            "error",
        )
    }
    put_fields(
        shown
        | {"created": date(task["created"])}
        | {f"image {each['index']}": each["url"] for each in task.get("images", ())}
    )
    put("")
    for step in steps:
        details = " ".join(
            f"{name}={value}"
            for name, value in step.items()
            if name not in ("time", "step") and value is not None
        )
        put(f"{plain(step['time'])}  {plain(step['step']):<24} {plain(details)}".rstrip())


def date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
