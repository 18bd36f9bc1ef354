"""Checks of the store, the image store, the workers, and the endpoints."""

import asyncio
import hashlib
import os

from sqlalchemy import Connection, select

from service.blobs.blob_store import Blobs
from service.db.clock import wall_clock
from service.db.schema import revision, revisions
from service.db.tables import deliveries, endpoints
from service.doctor.patient import (
    MIGRATE,
    NETWORK,
    PROBE_S,
    Finding,
    Patient,
    fault,
    file_system,
    ok,
    skipped,
    told,
    warning,
)
from service.errors import BlobUnavailable, EgressError, StoreUnavailable
from service.ids import blob_name, make_id
from service.images.downloads import host_refused
from service.upkeep import store_figures

ENDPOINTS = 20  # named in a finding


async def check_store(patient: Patient) -> dict[str, Finding]:
    store = patient.store
    if isinstance(store, Finding):
        return {"store": store}
    try:
        async with asyncio.timeout(PROBE_S):
            await store.write(store_figures.mark, None)
            current = await store.read(revision)
    except (StoreUnavailable, TimeoutError) as error:
        cause = error.__cause__ and getattr(error.__cause__, "orig", error.__cause__)
        text = f"the store does not commit: {cause or told(error)}"
        mend = "look at the database's disk, its permissions and its server's log"
        return {"store": fault(text.replace("\n", " ")[:300], mend)}
    head = revisions()[-1]
    if current != head:
        text = f"the store's schema is {current}, and this program needs {head}"
        return {"store": fault(text, MIGRATE)}
    return {"store": ok(f"the store commits, and its schema is {head}")}


async def check_store_disk(patient: Patient) -> dict[str, Finding]:
    """The embedded store needs a local file system."""
    path = patient.settings.sqlite_path
    if path is None:
        return {"store_disk": skipped("PostgreSQL has its own disk")}
    kind = await asyncio.to_thread(file_system, path.parent)
    if kind not in NETWORK:
        return {"store_disk": ok(f"the store is on {kind}")}
    text = f"{path} is on a network file system ({kind}), where locks and syncs do not hold"
    return {"store_disk": fault(text, "move DARKROOM_DATA_DIR to a local disk, or use PostgreSQL")}


async def check_images(patient: Patient) -> dict[str, Finding]:
    """Stores an object, reads it where links lead, and deletes it."""
    blobs, settings = patient.blobs, patient.settings
    mend = "make DARKROOM_BLOB_URL writable: permissions, credentials, the bucket's name"
    if isinstance(blobs, str):
        return {"images": fault(blobs, mend)}
    body = b"darkroom doctor\n"
    task_id = make_id("task", wall_clock(), os.urandom(10))
    name = blob_name(task_id, 0, hashlib.sha256(body).hexdigest(), "image/png")
    findings = {}
    try:
        async with asyncio.timeout(PROBE_S):
            async with blobs.incoming() as incoming:
                await incoming.write(body)
                await blobs.put(incoming, name, "image/png")
            findings["image_links"] = await public(patient, name, body)
            await blobs.delete(name)
            findings["images"] = await room(blobs, settings.min_free_bytes)
    except (BlobUnavailable, TimeoutError) as error:
        findings["images"] = fault(f"the image store takes no file: {told(error)}", mend)
    return findings


async def room(blobs: Blobs, least: int) -> Finding:
    free = await blobs.free_bytes()
    if free is None:
        return ok("the image store takes files")
    text = f"{free} bytes are free for images, and {least} must stay free"
    if free < least:
        return fault(text, "free space, or lower DARKROOM_MIN_FREE_BYTES: new submissions get 503")
    if free < 2 * least:
        return warning(text, "free space soon, or set DARKROOM_IMAGE_RETENTION_DAYS")
    return ok(text)


async def public(patient: Patient, name: str, body: bytes) -> Finding:
    """Whether anyone can read an object at the address of links."""
    base = patient.settings.image_base_url
    if base is None:
        return ok("the service serves the images itself")
    try:
        answer = await patient.egress.request("GET", f"{base}/{name}", timeout=PROBE_S)
    except EgressError as error:
        mend = "let DARKROOM_IMAGE_BASE_URL lead to the bucket or the CDN"
        return fault(f"{base} cannot be reached: {error}", mend)
    if answer.status == 200 and answer.body == body:
        return ok(f"a new image can be read at {base}")
    if answer.status in (401, 403):
        mend = "add a bucket policy that allows s3:GetObject to everyone below the prefix"
        return fault(f"{base} answers {answer.status} for a stored image", mend)
    mend = "let DARKROOM_IMAGE_BASE_URL serve what is below DARKROOM_BLOB_URL, under the same names"
    return fault(f"{base} answers {answer.status} for a stored image, and not with it", mend)


async def check_workers(patient: Patient) -> dict[str, Finding]:
    if patient.workers is None:
        return {"workers": skipped("only a process at work knows")}
    if patient.workers:
        return {"workers": ok("workers are at work")}
    mend = "start `darkroom worker`, or look for worker.failed in its log"
    return {"workers": fault("no process has workers", mend)}


async def check_endpoints(patient: Patient) -> dict[str, Finding]:
    """Endpoints that redirect, by the last response of each, and hosts of results."""
    store = patient.store
    if isinstance(store, Finding):
        return {}
    findings = {"endpoints": ok("no endpoint redirects")}
    redirecting = await store.read(redirects)
    if redirecting:
        named = ", ".join(f"{id} answered {status}" for id, status in redirecting[:ENDPOINTS])
        mend = "PATCH the url of the endpoint to where it redirects: deliveries follow no redirect"
        findings["endpoints"] = fault(f"endpoints redirect: {named}", mend)
    if await store.read(host_refused):
        mend = "add the host that image.at_risk names to DARKROOM_EVOLINK_RESULT_HOSTS"
        findings["result_hosts"] = fault("results wait whose host is not allowed", mend)
    return findings


def redirects(connection: Connection) -> list[tuple[str, int]]:
    """Active endpoints that answered the last attempt of a delivery with a redirect."""
    statement = (
        select(endpoints.c.id, deliveries.c.last_status)
        .join(deliveries, deliveries.c.endpoint_id == endpoints.c.id)
        .where(
            deliveries.c.cause.is_not(None),
            deliveries.c.last_status.between(300, 399),
            endpoints.c.status != "disabled",
        )
        .distinct()
    )
    return [(row.id, row.last_status) for row in connection.execute(statement.limit(1000))]
