"""What all peers do for a task, apart from their queue: they check the token of a callback, store
the picture and sign the event.

With `PEER_MODE=full` a peer keeps what Darkroom keeps: the picture is decoded, hashed and synced,
and an event keeps its id when it is sent again. With `plain` it does what most such programs do.
"""

import base64
import hashlib
import hmac
import io
import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

FULL = os.environ["PEER_MODE"] == "full"
FOLDER = Path(os.environ["PEER_FOLDER"])
UPSTREAM, RECEIVER = os.environ["PEER_UPSTREAM"], os.environ["PEER_RECEIVER"]
OWN_URL, REDIS = os.environ["PEER_URL"], os.environ.get("PEER_REDIS", "")
SECRET = os.environ["PEER_SECRET"]  # whsec_…
KEY = {"authorization": "Bearer sk-peer"}
ACCEPTED = {"status": "accepted"}
TIMEOUT_S = 10


ENDED = {"completed", "failed"}


class Order(BaseModel):
    id: str
    prompt: str


class Callback(BaseModel):
    id: str
    status: str


def token(task_id: str) -> str:
    return hmac.new(SECRET.encode(), f"callback {task_id}".encode(), "sha256").hexdigest()


def token_valid(task_id: str, given: str) -> bool:
    return hmac.compare_digest(token(task_id).encode(), given.encode())


def submission(task_id: str, prompt: str) -> dict[str, Any]:
    """The body of a submission."""
    return {
        "model": "wan2.5-text-to-image",
        "prompt": prompt,
        "size": "1024x1024",
        "callback_url": f"{OWN_URL}/callbacks/{task_id}/{token(task_id)}",
    }


def save(task_id: str, content: bytes) -> str | None:
    """Stores the picture. Returns its checksum in full mode."""
    path = FOLDER / f"{task_id}.jpeg"
    if not FULL:
        path.write_bytes(content)
        return None
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # raises if it is damaged
    part = path.with_suffix(f".{secrets.token_hex(4)}")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    folder = os.open(FOLDER, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return hashlib.sha256(content).hexdigest()


def event(
    task_id: str, upstream_id: str, status: str, checksums: Sequence[str | None]
) -> tuple[dict[str, str], bytes]:
    """Headers and body of the event, signed by Standard Webhooks."""
    now = int(time.time())
    data = {"upstream_id": upstream_id, "images": [{"sha256": each} for each in checksums]}
    kind = f"image.task.{status}"
    made = {"type": kind, "timestamp": now, "subject": task_id, "data": data}
    body = json.dumps(made).encode()
    id = f"msg_{task_id}" if FULL else f"msg_{secrets.token_hex(12)}"
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signature = base64.b64encode(hmac.digest(key, f"{id}.{now}.".encode() + body, "sha256"))
    headers = {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(now),
        "webhook-signature": f"v1,{signature.decode()}",
    }
    return headers, body
