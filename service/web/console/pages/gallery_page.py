"""The gallery: stored pictures by day, a large view of each, and several of them as one file."""

import io
import zipfile
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from starlette.responses import Response, StreamingResponse

from service.blobs.blob_store import check_size
from service.errors import ApiError, invalid_request
from service.images.downloads import shown_image
from service.strict_json import JSON
from service.web.console.visits import View, Visit

TASKS_A_PAGE, MAX_SELECTED = 24, 100
DOWNLOAD = "/console/gallery/pictures.zip"


async def gallery(visit: Visit) -> Response:
    """Pictures of completed tasks, newest first. `metadata` is `KEY=VALUE`."""
    query, error = visit.query, None
    page: JSON = {"data": [], "next_cursor": None}
    key, equals, value = query.get("metadata", "").partition("=")
    filters = {name: query.get(name) for name in ("model", "prompt", "since", "until", "cursor")}
    filters |= {f"metadata.{key}": value} if key and equals else {}
    for name, hour in (("since", "00:00:00"), ("until", "23:59:59.999")):
        if filters[name]:
            filters[name] = f"{filters[name]}T{hour}Z"
    if not visit.caller.sees:  # a gallery is of one's own pictures, also for the scope admin
        filters["owner"] = visit.caller.owner
    try:
        if key and not equals:
            message = "metadata must be a key and a value, as in customer=7"
            raise invalid_request(message, "metadata")
        selection = {**filters, "state": "completed", "limit": TASKS_A_PAGE}
        page = await visit.call("GET /v1/tasks", selection)
    except ApiError as refusal:
        if refusal.status != 400:
            raise
        error = refusal
    tasks = [task for task in page["data"] if task["images"]]
    return visit.render(
        "gallery.html",
        error=error,
        days=[(day, list(each)) for day, each in groupby(tasks, day_of)],
        cursor=page["next_cursor"],
        models=sorted(visit.context.intake.catalogue.models),
        download=DOWNLOAD,
    )


def day_of(task: JSON) -> str:
    return f"{datetime.fromtimestamp(task['created'], UTC):%Y-%m-%d}"


async def large(visit: Visit) -> Response:
    """One picture with what is known about it, and the links to its neighbours in its task."""
    task, image = await picture(visit, f"{visit.path('task_id')}/{visit.path('index')}")
    return visit.render("gallery_picture.html", task=task, image=image)


async def picture(visit: Visit, name: str) -> tuple[JSON, JSON]:
    """A task of the caller's and its picture. `name` is `TASK/INDEX`. Raises ApiError."""
    task_id, _, index = name.partition("/")
    task = await visit.call("GET /v1/tasks/{task_id}", task_id=task_id)
    image = next((each for each in task["images"] if str(each["index"]) == index), None)
    if image is None:
        raise ApiError(404, "image_not_found", f"{task_id} has no picture {index}")
    return task, image


async def download(visit: Visit) -> Response:
    """The selected pictures as a ZIP file, which is made while it is sent."""
    names = list(dict.fromkeys(visit.form.all("picture")))
    if not 1 <= len(names) <= MAX_SELECTED:
        message = f"select 1 to {MAX_SELECTED} pictures: {len(names)} are selected"
        raise invalid_request(message, "picture")
    blobs: list[tuple[str, str]] = []
    for name in names:
        task, image = await picture(visit, name)
        row = await visit.context.resources.store.look_up(shown_image, image["id"])
        if row is None or row.blob is None:
            raise ApiError(410, "gone", f"the picture {name} was erased")
        await check_size(visit.context.resources.blobs, row.blob, row.bytes, f"the picture {name}")
        extension = row.blob.rpartition(".")[2]
        blobs.append((f"{task['id']}-{image['index']}.{extension}", row.blob))
    headers = {"content-disposition": 'attachment; filename="pictures.zip"'}
    return StreamingResponse(zipped(visit, blobs), 200, headers, media_type="application/zip")


async def zipped(visit: Visit, blobs: Sequence[tuple[str, str]]) -> AsyncIterator[bytes]:
    """A ZIP file. Pictures are compressed already, so they are stored as they are."""
    written = Written()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        for name, blob in blobs:
            with archive.open(name, "w", force_zip64=True) as member:
                async for chunk in visit.context.resources.blobs.read(blob):
                    member.write(chunk)
                    yield written.take()
    yield written.take()


class Written(io.RawIOBase):
    """A file that cannot seek. It holds what was written until it is taken."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


VIEWS = (
    View("GET /console/gallery", gallery, "read", "Gallery", "gallery"),
    View(f"POST {DOWNLOAD}", download, "read"),
    View("GET /console/gallery/{task_id}/{index}", large, "read"),
)
