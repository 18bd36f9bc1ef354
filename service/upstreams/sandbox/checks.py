"""The upstream's refusals, by the limits of the catalogue. Each is an `ApiError` that names the
field.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from decimal import Decimal

from service.errors import ApiError
from service.strict_json import JSON
from service.upstreams.catalogue import Catalogue
from service.upstreams.field_values import pixels_of

MAX_BODY = 1 << 20
URL_LENGTH = 2048
KEY = re.compile(r"[A-Za-z0-9._-]{16,96}")
RATIO = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")
EDGES = {"1K": 1024, "2K": 2048, "3K": 3072, "4K": 4096}
ASPECT = 16  # the largest that any model takes
EDGE = EDGES["1K"]  # of a square without a size
UNKNOWN_PRICE = Decimal("1.5")  # of a model without a price in the catalogue


@dataclass(frozen=True, slots=True)
class Order:
    """A submission that the upstream accepts. It makes `n` images. `price` is that of the
    catalogue, for each image or for the request (`per`).
    """

    model: str
    prompt: str
    width: int
    height: int
    n: int
    callback_url: str | None
    per: str = "image"
    image_urls: tuple[str, ...] = ()
    price: Decimal = UNKNOWN_PRICE
    mask_url: str | None = None


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


def read_order(body: JSON, catalogue: Catalogue) -> Order:
    """The order in a submission's body. The upstream ignores undocumented fields."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("model", "model is required")
    entry = catalogue.entry(model)
    if entry is None:
        raise ApiError(
            403, "model_access_denied", f"no access to model {model[:100]!r}", param="model"
        )
    if (violation := catalogue.check(body)) is not None:
        raise invalid(violation.param, violation.message)
    prompt, rule = body.get("prompt"), entry.fields.get("prompt")
    if rule is not None and rule.required and not str(prompt).strip():
        raise invalid("prompt", "prompt is required")
    urls = body.get("image_urls") or [] if "image_urls" in entry.fields else []
    check_links(urls, "every one of image_urls")
    mask = read_url(body, "mask_url") if "mask_url" in entry.fields else None
    check_links([] if mask is None else [mask], "mask_url")
    size = body.get("size") if "size" in entry.fields else None
    width, height = drawn_size(size or getattr(entry.fields.get("size"), "default", None))
    callback_url, n = read_url(body, "callback_url"), entry.images_of(body)
    drawn = prompt if isinstance(prompt, str) and prompt else model
    cost = catalogue.estimate(body)
    price = UNKNOWN_PRICE if cost.price is None else Decimal(cost.price) / 1_000_000
    return Order(model, drawn, width, height, n, callback_url, cost.per, tuple(urls), price, mask)


def drawn_size(size: str | None) -> tuple[int, int]:
    """Width and height of a documented size. A ratio has about as many pixels as 1024x1024."""
    if (sides := pixels_of(size)) is not None:
        return sides
    ratio = RATIO.fullmatch(size or "")
    if ratio is None:
        return (EDGES.get(size or "", EDGE),) * 2
    width, height = int(ratio[1]), int(ratio[2])
    return scaled(width, height, EDGE * EDGE)


def scaled(width: int, height: int, pixels: int) -> tuple[int, int]:
    """The sides in their ratio, at most 1:16 or 16:1, with about so many pixels."""
    ratio = min(max(width / height, 1 / ASPECT), ASPECT)
    return round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))


def shaped_like(order: Order, width: int, height: int) -> Order:
    """The order without a size: its images have the aspect of the last input image."""
    width, height = scaled(width, height, order.width * order.height)
    return replace(order, width=width, height=height)


def read_url(body: JSON, param: str) -> str | None:
    value = body.get(param)
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(param, f"{param} must be a string")
    if len(value) > URL_LENGTH:
        raise invalid(param, f"{param} must have at most {URL_LENGTH} characters, not {len(value)}")
    return value


def check_links(urls: list[str], which: str) -> None:
    if not all(len(url) <= URL_LENGTH and re.match(r"https?://[^/\s]", url) for url in urls):
        raise invalid(which.rsplit(maxsplit=1)[-1], f"{which} must be an http or https link")
