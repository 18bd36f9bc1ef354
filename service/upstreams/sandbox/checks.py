"""What the upstream refuses, as its pages say (see the limits below). Pure: every refusal is an
`ApiError` that names the field.
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
CALLBACK_URL_LENGTH = 2048
IMAGE_COUNT = range(1, 5)
MIN_PIXELS = 768 * 768
DEFAULT_SIZE = "1280x1280"
KEY = re.compile(r"[A-Za-z0-9._-]{16,96}")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one model: pixels in all at most, and how many input images."""

    max_pixels: int
    inputs: range


MODELS: Mapping[str, Limits] = {
    "wan2.5-text-to-image": Limits(1440 * 1440, range(1)),
    "wan2.5-image-to-image": Limits(1280 * 1280, range(1, 6)),
}


@dataclass(frozen=True, slots=True)
class Order:
    """A submission that the upstream would take."""

    model: str
    prompt: str
    width: int
    height: int
    n: int
    callback_url: str | None


def invalid(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_parameter", message, param=param)


def read_body(raw: bytes) -> JSON:
    """The submitted object; 400 for anything else."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_request", "the body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    return body


def read_key(key: str | None) -> str | None:
    """A usable `Idempotency-Key`, or None without one."""
    if key is not None and not KEY.fullmatch(key):
        raise invalid("Idempotency-Key", "Idempotency-Key must be 16 to 96 of A-Z a-z 0-9 . _ -")
    return key


def read_order(body: JSON) -> Order:
    """The order in a submission's body. Fields nobody documented are ignored, as upstream."""
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
    n = optional(
        body,
        "n",
        lambda value: type(value) is int and value in IMAGE_COUNT,
        "an integer from 1 to 4",
    )
    width, height = read_size(
        DEFAULT_SIZE if body.get("size") is None else body["size"], limits.max_pixels
    )
    check_inputs(body.get("image_urls"), limits.inputs)
    callback_url = text(body, "callback_url", CALLBACK_URL_LENGTH)
    return Order(model, prompt, width, height, 1 if n is None else n, callback_url)


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
    """Width and height in pixels. The total is limited, not the sides; the aspect is 1:4 to 4:1."""
    match = (
        re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
        if isinstance(size, str)
        else None
    )
    if match is None:
        raise invalid("size", "size must be WIDTHxHEIGHT in pixels, like 1280x1280")
    width, height = int(match[1]), int(match[2])
    if not MIN_PIXELS <= width * height <= max_pixels:
        raise invalid(
            "size",
            f"size must have {MIN_PIXELS} to {max_pixels} pixels in all, not {width * height}",
        )
    if max(width, height) > 4 * min(width, height):
        raise invalid("size", "size must have an aspect from 1:4 to 4:1")
    return width, height


def check_inputs(urls: object, counts: range) -> None:
    """`image_urls` of an image-to-image model; one that takes none ignores them."""
    if counts.stop == 1:
        return
    if not isinstance(urls, list) or len(urls) not in counts:
        raise invalid(
            "image_urls", f"image_urls must be a list of {counts.start} to {counts.stop - 1} links"
        )
    if not all(
        isinstance(url, str) and re.match(r"https?://[^/\s]", url) and len(url) <= 2048
        for url in urls
    ):
        raise invalid("image_urls", "every one of image_urls must be an http or https link")
