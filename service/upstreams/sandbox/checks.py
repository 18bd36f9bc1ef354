"""The upstream's refusals, by the limits that it documents. Each is an `ApiError` that names the
field.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import ApiError
from service.strict_json import JSON

MAX_BODY = 1 << 20
PROMPT_LENGTH = 2000
NEGATIVE_PROMPT_LENGTH = 500
URL_LENGTH = 2048
IMAGE_COUNT = range(1, 5)
MIN_PIXELS = 768 * 768
DEFAULT_SIZE = "1280x1280"
KEY = re.compile(r"[A-Za-z0-9._-]{16,96}")
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """The most pixels of an image, and the possible numbers of input images."""

    max_pixels: int
    inputs: range


MODELS: Mapping[str, SandboxLimits] = {
    "wan2.5-text-to-image": SandboxLimits(1440 * 1440, range(1)),
    "wan2.5-image-to-image": SandboxLimits(1280 * 1280, range(1, 6)),
}


@dataclass(frozen=True, slots=True)
class Order:
    """A submission that the upstream accepts."""

    model: str
    prompt: str
    width: int
    height: int
    n: int
    callback_url: str | None


def invalid(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_parameter", message, param=param)


def read_body(raw: bytes) -> JSON:
    """The submitted object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_request", "the body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    return body


def read_key(key: str | None) -> str | None:
    """A valid `Idempotency-Key`."""
    if key is not None and not KEY.fullmatch(key):
        raise invalid("Idempotency-Key", "Idempotency-Key must be 16 to 96 of A-Z a-z 0-9 . _ -")
    return key


def read_order(body: JSON) -> Order:
    """The order in a submission's body. The upstream ignores undocumented fields."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("model", "model is required")
    if model not in MODELS:
        raise ApiError(
            403, "model_access_denied", f"no access to model {model[:100]!r}", param="model"
        )
    limits = MODELS[model]
    prompt = text(body, "prompt", PROMPT_LENGTH)
    if prompt is None or not prompt.strip():
        raise invalid("prompt", "prompt is required")
    text(body, "negative_prompt", NEGATIVE_PROMPT_LENGTH)
    optional(body, "prompt_extend", lambda value: isinstance(value, bool), "true or false")
    n = optional(body, "n", is_image_count, "an integer from 1 to 4")
    size = body.get("size")
    width, height = read_size(DEFAULT_SIZE if size is None else size, limits.max_pixels)
    check_inputs(body.get("image_urls"), limits.inputs)
    callback_url = text(body, "callback_url", URL_LENGTH)
    return Order(model, prompt, width, height, 1 if n is None else n, callback_url)


def is_image_count(value: object) -> bool:
    return type(value) is int and value in IMAGE_COUNT


def optional(body: JSON, param: str, accepts: Callable[[Any], bool], what: str) -> Any:
    value = body.get(param)
    if value is not None and not accepts(value):
        raise invalid(param, f"{param} must be {what}")
    return value


def text(body: JSON, param: str, longest: int) -> str | None:
    value = body.get(param)
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(param, f"{param} must be a string")
    if len(value) > longest:
        raise invalid(param, f"{param} must have at most {longest} characters, not {len(value)}")
    return value


def read_size(size: object, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels. Their product has limits, and the aspect is 1:4 to 4:1."""
    match = SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise invalid("size", "size must be WIDTHxHEIGHT in pixels, like 1280x1280")
    width, height = int(match[1]), int(match[2])
    pixels = width * height
    if not MIN_PIXELS <= pixels <= max_pixels:
        raise invalid(
            "size", f"size must have {MIN_PIXELS} to {max_pixels} pixels in all, not {pixels}"
        )
    if max(width, height) > 4 * min(width, height):
        raise invalid("size", "size must have an aspect from 1:4 to 4:1")
    return width, height


def check_inputs(urls: object, counts: range) -> None:
    """Checks `image_urls`. A model without input images ignores them."""
    if counts.stop == 1:
        return
    if not isinstance(urls, list) or len(urls) not in counts:
        raise invalid(
            "image_urls", f"image_urls must be a list of {counts.start} to {counts.stop - 1} links"
        )
    if not all(is_link(url) for url in urls):
        raise invalid("image_urls", "every one of image_urls must be an http or https link")


def is_link(url: object) -> bool:
    if not isinstance(url, str) or len(url) > URL_LENGTH:
        return False
    return re.match(r"https?://[^/\s]", url) is not None
