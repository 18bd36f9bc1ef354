"""The models: which upstream serves them, and the limits and prices that it documents.

`catalogue.toml` has them as data, and the operator's file extends and overrides it. An error in it
names the file, the line and the field. A submission over a limit is refused here, before the
upstream charges for it.
"""

import json
import re
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
HEADER = re.compile(r"\s*\[([^\[\]].*)\]\s*(#.*)?")
PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def upstream_for(model: str) -> str:
    """The name of the upstream that serves a model. One upstream serves all of them so far."""
    del model
    return DEFAULT_UPSTREAM


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
        return self.models[model].document(model, upstream_for(model))

    def warnings(self, model: str, fields: Iterable[str]) -> list[str]:
        """Names the fields that the catalogue does not have for the model, at most 16. The upstream
        gets them all the same. A model that is not in the catalogue has no warnings.
        """
        entry = self.entry(model)
        names = {name.partition(".")[0] for name in entry.fields} | {"model"} if entry else set()
        unknown = (name for name in fields if name not in names)
        return [
            f"{name[:NAME_CHARS]} is no known field of {model}: it was passed on as it is"
            for name in islice(unknown, MAX_WARNINGS if entry else 0)
        ]


def load_catalogue(path: Path | None = None) -> Catalogue:
    """The catalogue that comes with the package, with the operator's file on top of it.

    ConfigurationError names the file, the line and the field.
    """
    if path is None:
        return Catalogue(builtin_models())
    return Catalogue(merged(builtin_models(), *read_catalogue(path)))


@cache
def builtin_models() -> Mapping[str, ModelEntry]:
    text = files(__package__).joinpath("catalogue.toml").read_text("utf-8")
    return merged({}, parse_catalogue(text, "catalogue.toml"), text, "catalogue.toml")


def merged(
    below: Mapping[str, ModelEntry], file: CatalogueFile, text: str, name: str
) -> dict[str, ModelEntry]:
    """The models of a file on top of `below`. `like` names a model of `below`, or an earlier model
    of the file.
    """
    models = dict(below)
    for model, entry in file.models.items():
        base = models.get(model, ModelEntry())
        if entry.like is not None:
            if entry.like not in models:
                line = line_of(text, ["models", model, "like"])
                reason = f"no model {entry.like!r} is in the catalogue or above"
                raise ConfigurationError(f"{name}, line {line}: models.{model}.like: {reason}")
            base = models[entry.like].fields_alone()
        merged_entry = models[model] = entry.sourced(OPERATORS_FILE).over(base, OPERATORS_FILE)
        if (unknown := merged_entry.unknown_field()) is not None:
            path = ["models", model, *unknown[0]]
            reason = f"the model has no field {unknown[1]!r}"
            line = line_of(text, path)
            raise ConfigurationError(f"{name}, line {line}: {'.'.join(path)}: {reason}")
    return models


# --- the file


def parse_catalogue(text: str, name: str) -> CatalogueFile:
    """The file's models. `name` is the file's name in a ConfigurationError."""
    try:
        tables = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        match = PLACE.search(str(error))
        line = int(match[1]) if match and match[1] else len(text.splitlines())
        reason = PLACE.sub("", str(error))
        raise ConfigurationError(f"{name}, line {line}: {reason}") from None
    try:
        return CatalogueFile.model_validate(tables)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = path_in(tables, first["loc"])
        if first["type"] == "missing":
            path.append(str(first["loc"][-1]))
        words = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if first["type"] == "union_tag_not_found":
            words = "type is required"
        value = first["input"] if isinstance(first["input"], str | int | Decimal) else None
        actual = "" if value is None else f", not {json.dumps(value, default=str)}"
        raise ConfigurationError(
            f"{name}, line {line_of(text, path)}: {'.'.join(path)}: {words}{actual}"
        ) from None


def read_catalogue(path: Path) -> tuple[CatalogueFile, str, str]:
    """The operator's file, its text, and its name in an error."""
    name = f"DARKROOM_CATALOGUE: {path}"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ConfigurationError(f"{name}: {reason}") from None
    return parse_catalogue(text, name), text, name


def path_in(tables: Any, location: Sequence[int | str]) -> list[str]:
    """The names of the file that lead to a location of pydantic's, which also names classes."""
    path: list[str] = []
    for step in location:
        if isinstance(tables, dict) and step in tables:
            path, tables = [*path, str(step)], tables[step]
        elif isinstance(tables, list) and isinstance(step, int) and step < len(tables):
            tables = tables[step]
    return path


def line_of(text: str, path: Sequence[str]) -> int:
    """The line that sets the value at a path, or else the table nearest to it."""
    table: list[str] = []
    best, nearest = 0, 1
    for number, line in enumerate(text.splitlines(), 1):
        header = HEADER.fullmatch(line)
        if header is not None:
            names = table = keys_of_table(f"[{header[1]}]")
        elif "=" in line:
            names = table + keys_of_table(f"{line.partition('=')[0]} = 0")
        else:
            continue
        if len(names) > best and list(path[: len(names)]) == names:
            best, nearest = len(names), number
    return nearest


def keys_of_table(toml: str) -> list[str]:
    """The names in a header, or before the equals sign of a line."""
    try:
        value: Any = tomllib.loads(toml)
    except tomllib.TOMLDecodeError:
        return []
    names = []
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        names.append(name)
    return names
