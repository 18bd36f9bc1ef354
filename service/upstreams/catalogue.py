"""The models: which upstream serves them, and the limits that it documents (`catalogue.toml`).

A request over a limit is refused here, before the upstream charges for it.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice

MAX_WARNINGS, NAME_CHARS = 16, 100
DEFAULT_UPSTREAM = "evolink"


def upstream_for(model: str) -> str:
    """The name of the upstream that serves a model. One upstream serves all of them so far."""
    del model
    return DEFAULT_UPSTREAM


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request that breaks a limit. The message names the limit."""

    param: str
    message: str


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """A model of `catalogue.toml`: lengths in characters, sizes in pixels, `aspect` = width /
    height, `price` in credits per image.
    """

    prompt_max: int
    negative_prompt_max: int
    n_max: int
    size_default: str
    total_min: int
    total_max: int
    aspect_min: float
    aspect_max: float
    price: int | float
    image_urls_min: int = 1
    image_urls_max: int | None = None


@dataclass(frozen=True, slots=True)
class Catalogue:
    models: Mapping[str, ModelLimits]

    def check(self, request: Mapping[str, object]) -> Violation | None:
        """The first limit that a submission breaks. A null field counts as absent. A model that is
        not in the catalogue passes.
        """
        model = request.get("model")
        limits = self.models.get(model) if isinstance(model, str) else None
        if limits is None:
            return None
        for param, check in CHECKS.items():
            if message := check(request.get(param), limits):
                return Violation(param, message)
        return None

    def warnings(self, model: str, fields: Iterable[str]) -> list[str]:
        """Names the fields that the catalogue does not have for the model, at most 16. The upstream
        gets them all the same. A model that is not in the catalogue has no warnings.
        """
        unknown = (name for name in fields if name not in FIELDS)
        return [
            f"{name[:NAME_CHARS]} is no known field of {model}: it was passed on as it is"
            for name in islice(unknown, MAX_WARNINGS if model in self.models else 0)
        ]


def load_catalogue() -> Catalogue:
    """The catalogue that comes with the package."""
    tables = tomllib.loads(files("service").joinpath("catalogue.toml").read_text("utf-8"))
    return Catalogue({name: ModelLimits(**table) for name, table in tables["models"].items()})


def _prompt(prompt: object, limits: ModelLimits) -> str | None:
    if isinstance(prompt, str) and 1 <= len(prompt) <= limits.prompt_max:
        return None
    length = f"; this one has {len(prompt)}" if isinstance(prompt, str) else ""
    return f"prompt is required: a text of 1 to {limits.prompt_max} characters{length}"


def _negative_prompt(prompt: object, limits: ModelLimits) -> str | None:
    most = limits.negative_prompt_max
    if prompt is None or (isinstance(prompt, str) and len(prompt) <= most):
        return None
    length = f"; this one has {len(prompt)}" if isinstance(prompt, str) else ""
    return f"negative_prompt must be a text of at most {most} characters{length}"


def _size(size: object, limits: ModelLimits) -> str | None:
    if size is None:
        return None
    form = "([1-9][0-9]{0,5})x([1-9][0-9]{0,5})"
    match = re.fullmatch(form, size) if isinstance(size, str) else None
    if match is None:
        return f"size must be WIDTHxHEIGHT in pixels, such as {limits.size_default}"
    width, height = int(match[1]), int(match[2])
    least, most = limits.total_min, limits.total_max
    if not least <= width * height <= most:
        return f"size must have {least} to {most} pixels in all; {size} has {width * height}"
    low, high = limits.aspect_min, limits.aspect_max
    if not low * height <= width <= high * height:
        return f"size must be {low:g} to {high:g} times as wide as high; {size} is not"
    return None


def _n(n: object, limits: ModelLimits) -> str | None:
    if n is None or (type(n) is int and 1 <= n <= limits.n_max):
        return None
    return f"n must be a whole number from 1 to {limits.n_max}"


def _image_urls(urls: object, limits: ModelLimits) -> str | None:
    least, most = limits.image_urls_min, limits.image_urls_max
    links = urls if isinstance(urls, list) else []
    texts = all(isinstance(url, str) and url for url in links)
    if most is None or (least <= len(links) <= most and texts):
        return None
    return f"image_urls must be a list of {least} to {most} links"


CHECKS = {
    "prompt": _prompt,
    "negative_prompt": _negative_prompt,
    "size": _size,
    "n": _n,
    "image_urls": _image_urls,
}
FIELDS = {"model", "prompt_extend", "model_params", *CHECKS}
