"""Reads a file of the catalogue. An error names the file, the line and the field."""

import json
import re
import tomllib
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import ConfigurationError
from service.upstreams.catalogue_entry import CatalogueFile

HEADER = re.compile(r"\s*\[([^\[\]].*)\]\s*(#.*)?")
PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def parse_catalogue(text: str, name: str) -> CatalogueFile:
    """The file's models. `name` is the file's name in a ConfigurationError."""
    try:
        tables = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        place = PLACE.search(str(error))
        line = int(place[1]) if place and place[1] else len(text.splitlines())
        reason = PLACE.sub("", str(error))
        raise ConfigurationError(f"{name}, line {line}: {reason}") from None
    try:
        return CatalogueFile.model_validate(tables)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = path_in(tables, first["loc"])
        words = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        value = first["input"] if isinstance(first["input"], str | int | Decimal) else None
        given = "" if value is None else f", not {json.dumps(value, default=str)}"
        raise ConfigurationError(
            f"{name}, line {line_of(text, path)}: {'.'.join(path)}: {words}{given}"
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
    for index, step in enumerate(location):
        if isinstance(tables, dict) and step in tables:
            path, tables = [*path, str(step)], tables[step]
        elif isinstance(tables, list) and isinstance(step, int) and step < len(tables):
            tables = tables[step]
        elif index == len(location) - 1 and isinstance(tables, dict):
            path.append(str(step))  # a field that is missing
    return path


def line_of(text: str, path: Sequence[str]) -> int:
    """The line that sets the value at a path, or else the table nearest to it."""
    table: list[str] = []
    best, found = 0, 1
    for number, line in enumerate(text.splitlines(), 1):
        header = HEADER.fullmatch(line)
        if header is not None:
            names = table = keys_of_table(f"[{header[1]}]")
        elif "=" in line:
            names = table + keys_of_table(f"{line.partition('=')[0]} = 0")
        else:
            continue
        if len(names) > best and list(path[: len(names)]) == names:
            best, found = len(names), number
    return found


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
