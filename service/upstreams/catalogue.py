"""The models: which upstream serves them, and the limits and prices that it documents.

`catalogue.toml` has them as data, and the operator's file extends and overrides it. An error in it
names the file and the field. A submission over a limit is refused here, before the upstream charges
for it.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import ConfigurationError
from service.strict_json import JSON
from service.upstreams.catalogue_entry import CatalogueFile, ModelEntry
from service.upstreams.catalogue_fields import ImagesField
from service.upstreams.catalogue_images import COMMON

MAX_WARNINGS, NAME_CHARS = 16, 100
DEFAULT_UPSTREAM = "evolink"
OPERATORS_FILE = "DARKROOM_CATALOGUE"


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request that breaks a limit. The message names the limit and the value."""

    param: str
    message: str


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """The cost of a submission, in millionths of a credit. None: the price is unknown.

    `price` is that of an image, or of the whole request (`per`). `n` of them are paid.
    """

    credits: int | None
    price: int | None
    n: int
    per: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    models: Mapping[str, ModelEntry]

    def entry(self, model: object) -> ModelEntry | None:
        return self.models.get(model) if isinstance(model, str) else None

    def check(self, body: Mapping[str, Any], *, whole: bool = True) -> Violation | None:
        """The first limit that a submission breaks. Of a model that is not in the catalogue only
        `n` has one. Without `whole`, fields may be missing.
        """
        entry = self.entry(body.get("model")) or ModelEntry()
        broken = entry.complaint(body, whole=whole)
        return Violation(*broken) if broken else None

    def image_rule(self, model: object) -> ImagesField:
        """The limits of the model's input images, or the common ones if it has none of its own."""
        entry = self.entry(model)
        rule = entry.fields.get("image_urls") if entry else None
        return rule if isinstance(rule, ImagesField) else COMMON

    def estimate(self, body: Mapping[str, Any]) -> CostEstimate:
        """The cost of a submission as the catalogue has it."""
        entry = self.entry(body.get("model")) or ModelEntry()
        per = entry.price.per if entry.price else "image"
        n, price = entry.images_of(body) if per == "image" else 1, entry.price_of(body)
        return CostEstimate(None if price is None else price * n, price, n, per)

    def images_of(self, body: Mapping[str, Any]) -> int:
        """How many images a submission asks for."""
        return (self.entry(body.get("model")) or ModelEntry()).images_of(body)

    def document(self, model: str) -> JSON:
        """A model as clients see it. KeyError: the catalogue does not have it."""
        return self.models[model].document(model, DEFAULT_UPSTREAM)

    def warnings(self, model: str, fields: Iterable[str]) -> list[str]:
        """Names the fields that the catalogue does not have for the model, at most 16. The upstream
        gets them all the same. A model that is not in the catalogue has no warnings.
        """
        entry = self.entry(model)
        known = {name.partition(".")[0] for name in entry.fields} | {"model"} if entry else set()
        unknown = (name for name in fields if name not in known)
        return [
            f"{name[:NAME_CHARS]} is no known field of {model}: it was passed on as it is"
            for name in islice(unknown, MAX_WARNINGS if entry else 0)
        ]


def load_catalogue(path: Path | None = None) -> Catalogue:
    """The catalogue that comes with the package, with the operator's file on top of it.

    ConfigurationError names the file and the field.
    """
    if path is None:
        return Catalogue(builtin_models())
    name = f"{OPERATORS_FILE}: {path}"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ConfigurationError(f"{name}: {reason}") from None
    return Catalogue(merged(builtin_models(), text, name))


@cache
def builtin_models() -> Mapping[str, ModelEntry]:
    text = files(__package__).joinpath("catalogue.toml").read_text("utf-8")
    return merged({}, text, "catalogue.toml")


def merged(below: Mapping[str, ModelEntry], text: str, name: str) -> dict[str, ModelEntry]:
    """The models of a file on top of `below`. `like` names a model of `below`, or an earlier model
    of the file.
    """
    models = dict(below)
    for model, entry in parse_catalogue(text, name).models.items():
        base = models.get(model, ModelEntry())
        if entry.like is not None:
            if entry.like not in models:
                reason = f"no model {entry.like!r} is in the catalogue or above"
                raise ConfigurationError(f"{name}: models.{model}.like: {reason}")
            base = models[entry.like].fields_alone()
        made = models[model] = entry.sourced(OPERATORS_FILE).over(base, OPERATORS_FILE)
        if (unknown := made.unknown_field()) is not None:
            place = ".".join(["models", model, *unknown[0]])
            raise ConfigurationError(f"{name}: {place}: the model has no field {unknown[1]!r}")
    return models


def parse_catalogue(text: str, name: str) -> CatalogueFile:
    """The file's models. `name` is the file's name in a ConfigurationError."""
    try:
        tables = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{name}: {error}") from None
    try:
        return CatalogueFile.model_validate(tables)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(path_in(tables, first["loc"]))
        words = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        value = first["input"] if isinstance(first["input"], str | int | Decimal) else None
        given = "" if value is None else f", not {json.dumps(value, default=str)}"
        raise ConfigurationError(f"{name}: {place}: {words}{given}") from None


def path_in(tables: Any, location: Sequence[int | str]) -> list[str]:
    """The names of the file that lead to a location of pydantic's, which also names classes."""
    path: list[str] = []
    for index, step in enumerate(location):
        if isinstance(tables, dict) and step in tables:
            path, tables = [*path, str(step)], tables[step]
        elif isinstance(tables, list) and isinstance(step, int) and step < len(tables):
            tables = tables[step]
        elif index == len(location) - 1 and isinstance(tables, dict):
            path.append(str(step))  # a field that is missing
    return path
