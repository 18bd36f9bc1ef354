"""What the upstream documents of its models, so that a request it would refuse costs nothing
(contract section 8).
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request that breaks a limit; the message names the limit."""

    param: str
    message: str


@dataclass(frozen=True, slots=True)
class Limits:
    """A model of `catalogue.toml`: lengths in characters, sizes in pixels, `aspect` = width /
    height, `price` in credits an image.
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
    """Limits by model."""

    models: Mapping[str, Limits]

    def check(self, request: Mapping[str, object]) -> Violation | None:
        """The first limit a submission breaks. A field that is null counts as absent; a model that
        is not here passes through.
        """
        model = request.get("model")
        limits = self.models.get(model) if isinstance(model, str) else None
        if limits is None:
            return None
        return (
            _prompt(request, limits)
            or _negative_prompt(request, limits)
            or _size(request, limits)
            or _n(request, limits)
            or _image_urls(request, limits)
        )


def load_catalogue() -> Catalogue:
    """The catalogue that comes with the package."""
    tables = tomllib.loads(files("service").joinpath("catalogue.toml").read_text("utf-8"))
    return Catalogue({name: Limits(**table) for name, table in tables["models"].items()})


def _prompt(request: Mapping[str, object], limits: Limits) -> Violation | None:
    prompt = request.get("prompt")
    if isinstance(prompt, str) and 1 <= len(prompt) <= limits.prompt_max:
        return None
    found = f"; this one has {len(prompt)}" if isinstance(prompt, str) else ""
    return Violation(
        "prompt", f"prompt is required: a text of 1 to {limits.prompt_max} characters{found}"
    )


def _negative_prompt(request: Mapping[str, object], limits: Limits) -> Violation | None:
    prompt = request.get("negative_prompt")
    if prompt is None or (isinstance(prompt, str) and len(prompt) <= limits.negative_prompt_max):
        return None
    found = f"; this one has {len(prompt)}" if isinstance(prompt, str) else ""
    return Violation(
        "negative_prompt",
        f"negative_prompt must be a text of at most {limits.negative_prompt_max} characters{found}",
    )


def _size(request: Mapping[str, object], limits: Limits) -> Violation | None:
    size = request.get("size")
    if size is None:
        return None
    match = (
        re.fullmatch("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size) if isinstance(size, str) else None
    )
    if match is None:
        return Violation(
            "size", f"size must be WIDTHxHEIGHT in pixels, such as {limits.size_default}"
        )
    width, height = int(match[1]), int(match[2])
    if not limits.total_min <= width * height <= limits.total_max:
        return Violation(
            "size",
            f"size must have {limits.total_min} to {limits.total_max} pixels in all; {size} has"
            f" {width * height}",
        )
    if not limits.aspect_min * height <= width <= limits.aspect_max * height:
        return Violation(
            "size",
            f"size must be {limits.aspect_min:g} to {limits.aspect_max:g} times as wide as high;"
            f" {size} is not",
        )
    return None


def _n(request: Mapping[str, object], limits: Limits) -> Violation | None:
    n = request.get("n")
    if n is None or (isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= limits.n_max):
        return None
    return Violation("n", f"n must be a whole number from 1 to {limits.n_max}")


def _image_urls(request: Mapping[str, object], limits: Limits) -> Violation | None:
    urls = request.get("image_urls")
    if limits.image_urls_max is None:
        return None
    links = urls if isinstance(urls, list) else []
    if limits.image_urls_min <= len(links) <= limits.image_urls_max and all(
        isinstance(url, str) and url for url in links
    ):
        return None
    return Violation(
        "image_urls",
        f"image_urls must be a list of {limits.image_urls_min} to {limits.image_urls_max} links",
    )
