"""Hooks of Schemathesis: values that a schema cannot describe. A valid request gets a real picture,
an order that its model allows, and addresses of this machine. Invalid requests stay as they are.
"""

import base64
import os
import zlib
from functools import cache
from typing import Any

import schemathesis

from tests.inputs import photo

RECEIVER = os.environ.get("DARKROOM_TEST_RECEIVER", "http://127.0.0.1:9")
MAX_WAIT_S = 0.05
SIZES = ("768x768", "1280x1280", "1024x768", None)
UPLOADS = ("/v1/files", "/api/v1/files/upload/stream")
SUBMISSIONS = ("/v1/images/generations", "/v1/estimates")
FORMS = (("PNG", (400, 390)), ("JPEG", (384, 512)), ("WEBP", (640, 384)), ("BMP", (384, 384)))


@cache
def picture(number: int) -> bytes:
    format, size = FORMS[number % len(FORMS)]
    return photo(format, size)


@schemathesis.hook
def before_call(_: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """The body that is sent replaces the generated one, which stays what the checks look at."""
    if case.path == "/v1/events" and short(case.query.get("wait")):
        case.query["wait"] = MAX_WAIT_S
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    body, number = case.body, zlib.crc32(repr(case.body).encode())
    if case.path in UPLOADS and isinstance(body, dict):
        limited = case.query.get("model")  # whose limits a photo in PNG is within
        kwargs["files"] = {"file": ("photo", picture(0 if limited else number))}
    elif case.method in ("POST", "PUT", "PATCH") and isinstance(body, dict):
        kwargs["json"] = fitting(case.path, body, number)


def short(wait: object) -> bool:
    """Whether it is a time that the service would wait."""
    try:
        return MAX_WAIT_S < float(str(wait)) <= 60
    except ValueError:
        return False


def fitting(path: str, body: dict[str, Any], number: int) -> dict[str, Any]:
    """The body with values that the service can act on."""
    if path == "/api/v1/files/upload/base64":
        return {**body, "base64_data": base64.b64encode(picture(number)).decode()}
    if path == "/api/v1/files/upload/url":
        return {**body, "file_url": f"{RECEIVER}/photo.png"}
    made = dict(body)
    for name in ("url", "callback_url"):
        if isinstance(made.get(name), str) and made[name]:
            made[name] = f"{RECEIVER}/{number}"
    if path in SUBMISSIONS:
        made |= ordered(made, number)
    return made


def ordered(body: dict[str, Any], number: int) -> dict[str, Any]:
    """Most submissions are for a model that the catalogue has, within its limits."""
    given: dict[str, Any] = {"image_urls": None, "model_params": None, "sandbox": None}
    # 2.0 is an integer by JSON Schema. Upstreams refuse it, and so does the service.
    n = None if body.get("n") is None else int(body["n"])
    if number % 8 == 0:
        return given | {"model": f"unknown-{number}", "n": n}
    return given | {
        "model": "wan2.5-text-to-image",
        "prompt": (str(body.get("prompt") or "").strip() or "a lighthouse")[:2000],
        "size": SIZES[number % len(SIZES)],
        "n": None if n is None else 1 + n % 2,
        "negative_prompt": body.get("negative_prompt") and body["negative_prompt"][:500],
    }
