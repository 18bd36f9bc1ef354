"""`darkroom submit` and `darkroom task`."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from service.cli.api_client import ApiClient, CommandFailed, Interrupted, api_client, pairs, segment
from service.cli.list_rows import age_of, date, why_held
from service.cli.output import (
    Json,
    Text,
    flat,
    option,
    plain,
    put,
    put_fields,
    put_json,
    put_result,
    remark,
)
from service.cli.place import Place, place
from service.cli.submit_options import (
    Fields,
    Images,
    Model,
    NegativePrompt,
    Prompt,
    PromptExtend,
    inputs,
    key_of,
    prompt_of,
    put_all,
)
from service.cli.verb import named
from service.cli.verbs import Metadata
from service.errors import EgressError
from service.strict_json import JSON

SUBMIT_WAIT_S = 60  # how long one call waits for the end of the task
PROGRESS_WAIT_S = 1  # the same while a terminal shows progress
SHOWN = ("id", "state", "upstream_id", "model", "prompt", "request", "metadata", "usage", "error")
LEFT = "Its ids, times, state, costs and the sizes of its images are left."


def submit(
    prompt: Prompt,
    model: Model = None,
    size: Annotated[Text, option("Pixels, like 1280x1280.", metavar="WxH")] = None,
    n: Annotated[int | None, option("Number of images.", "--n", "-n", min=1)] = None,
    negative_prompt: NegativePrompt = None,
    prompt_extend: PromptExtend = None,
    fields: Fields = None,
    image: Images = None,
    metadata: Metadata = None,
    callback_url: Annotated[Text, option("Gets the terminal task, signed.", metavar="URL")] = None,
    idempotency_key: Annotated[
        Text, option("The same key and request are the same task, paid once.", metavar="KEY")
    ] = None,
    wait: Annotated[bool, option("Wait until the task is terminal.", "--wait")] = False,
    out: Annotated[
        Path | None,
        option("Wait, and save the images in this folder.", file_okay=False, metavar="DIR"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Submit a task. Prints its id; with --wait the links of its images, with --out the files.
    Fails if the task does.
    """
    model = model or ("wan2.5-image-to-image" if image else "wan2.5-text-to-image")
    order = named(
        {
            "model": model,
            "prompt": prompt_of(prompt),
            "negative_prompt": negative_prompt,
            "prompt_extend": prompt_extend,
            "size": size,
            "n": n,
            "image_urls": inputs(image, model),
            "metadata": pairs(metadata, "--metadata") or None,
            "callback_url": callback_url,
        }
    )
    put_all(order, fields, "--set")
    task, files, estimate = submitted(order, key_of(idempotency_key), wait, out)
    lines = [task["id"]] if not wait else task["results"]
    if files is not None:
        task, lines = {**task, "files": files}, files
    say_cost(task, estimate, place())
    put_result(task, as_json, *lines)
    check_outcome(task)


def has_ended(task: JSON) -> bool:
    return task["status"] not in ("pending", "processing")


def estimated(client: ApiClient, order: JSON) -> str | None:
    """The estimate in words, which a terminal shows at once, with the place. None: no answer."""
    remark(f"at {client.at}")
    try:
        cost = client.call("POST", "/v1/estimates", body=order)
    except (CommandFailed, EgressError):
        return None
    amount = "unknown" if cost["credits"] is None else f"{cost['credits']} {cost['unit']}"
    remark(text := f"estimate: {amount}")
    return text


def say_cost(task: JSON, estimate: str | None, at: Place) -> None:
    """Prints what a task cost, or what is reserved for it, on standard error. Without a terminal
    the place and the estimate too, and nothing for a task that failed: a failure is one line there.
    """
    used, reserved = task["usage"]["credits_used"], task["usage"]["credits_reserved"]
    cost = f"reserved: {reserved} credits" if used is None else f"cost: {used} credits"
    cost = "" if used is None and reserved is None else cost
    if sys.stderr.isatty():
        remark(cost)
    elif not has_ended(task) or task["state"] == "completed":
        sys.stderr.write("".join(f"{line}\n" for line in (f"at {at}", estimate, cost) if line))


def check_outcome(task: JSON) -> None:
    if has_ended(task) and task["state"] != "completed":
        error = task["error"] or {}
        raise CommandFailed(
            f"{task['id']} {task['state']}: {error.get('code')}: {error.get('message')}",
            {**error, "task_id": task["id"]},
        )


def submitted(
    order: JSON, key: str, wait: bool, out: Path | None
) -> tuple[JSON, list[str] | None, str | None]:
    """The task, the files of its images if they have a folder, and the estimate."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    task: JSON = {}
    files = None
    try:
        client = api_client()
        estimate = estimated(client, order)
        task = post(client, order, key)
        if wait or out is not None:
            task = wait_for_end(client, order, key, task)
        if out is not None:
            files = [str(save(client, image, task["id"], out)) for image in task["images"]]
    except KeyboardInterrupt:
        raise Interrupted(goes_on(task, key), {"task_id": task.get("id")}) from None
    return task, files, estimate


def goes_on(task: JSON, key: str) -> str:
    again = f"the same command with --idempotency-key {key}"
    if not task:
        return f"interrupted: the task may have been taken; {again} shows it and is paid once"
    return (
        f"interrupted: {task['id']} goes on; `darkroom task {task['id']}` shows it, and {again}"
        " waits for it again"
    )


def post(client: ApiClient, order: JSON, key: str, wait_s: int | None = None) -> JSON:
    """The task after at most `wait_s` seconds. The same key gets the same task in every call."""
    headers = {"idempotency-key": key} | ({} if wait_s is None else {"prefer": f"wait={wait_s}"})
    try:
        return client.call("POST", "/v1/images/generations", body=order, headers=headers)
    except EgressError as error:
        raise CommandFailed(
            f"{error}; the task may have been taken: ask again with --idempotency-key {key}"
        ) from None


def wait_for_end(client: ApiClient, order: JSON, key: str, task: JSON) -> JSON:
    wait_s = PROGRESS_WAIT_S if sys.stderr.isatty() else SUBMIT_WAIT_S
    with progress(task) as update:
        while not has_ended(task):
            update(task, held(client, task))
            task = post(client, order, key, wait_s)
    return task


def held(client: ApiClient, task: JSON) -> str | None:
    """Why the task waits although the service works, as its timeline says it."""
    if task["state"] not in ("queued", "uncertain", "storing"):
        return None
    try:
        steps = client.call("GET", f"/v1/tasks/{segment(task['id'])}/timeline")["data"]
    except (CommandFailed, EgressError):  # a key without the scope `read`, or a restart
        return None
    return why_held(steps)


@contextmanager
def progress(task: JSON) -> Iterator[Callable[[JSON, str | None], None]]:
    """Shows progress, and why a task is held. Without a terminal only the latter, once."""
    if not sys.stderr.isatty():
        reasons: set[str] = set()

        def say(task: JSON, reason: str | None) -> None:
            if reason and reason not in reasons:
                reasons.add(reason)
                sys.stderr.write(f"{task['id']} {plain(reason)}\n")

        yield say
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        line = display.add_task(f"{task['id']} {task['state']}", total=None)

        def show(task: JSON, reason: str | None) -> None:
            display.update(line, description=f"{task['id']} {standing(task, reason)}")

        yield show


def standing(task: JSON, reason: str | None) -> str:
    """State, progress, the upstream's estimate, and why the task is held."""
    parts = [f"{task['state']} {task['progress']} %"]
    if estimate := task["task_info"]["estimated_time"]:
        parts.append(f"estimate {estimate} s")
    return ", ".join([*parts, plain(reason)] if reason else parts)


def save(client: ApiClient, image: JSON, task_id: str, folder: Path) -> Path:
    """Saves an image if its checksum is right, by a rename of the whole file."""
    import hashlib

    _, mark, signed = image["url"].partition("?")  # with `DARKROOM_IMAGE_LINK_TTL_S`
    content = client.fetch(f"/images/{segment(image['id'])}{mark}{signed}")
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


def task(
    id: Annotated[str, typer.Argument(help="Darkroom's id or the upstream's.", metavar="ID")],
    as_json: Json = False,
) -> None:
    """Show a task with its timeline."""
    client = api_client()
    task = client.call("GET", f"/v1/tasks/{segment(id)}")
    steps = []
    if "state" in task:  # the upstream's own task has neither
        steps = client.call("GET", f"/v1/tasks/{segment(task['id'])}/timeline")["data"]
    if as_json:
        put_json({**task, "timeline": steps})
        return
    fields = {name: task.get(name) for name in SHOWN}
    fields |= {"created": date(task["created"]), "age": age_of(task["created"])}
    if task.get("erased_at"):
        fields |= {"erased": f"{task['erased_at']}. {LEFT}"}
    put_fields(fields | {f"image {each['index']}": each["url"] for each in task.get("images", ())})
    put("")
    for step in steps:
        time, name = plain(step.pop("time")), plain(step.pop("step"))
        details = " ".join(f"{key}={value}" for key, value in flat(step))
        put(f"{time}  {name:<24} {plain(details)}".rstrip())
