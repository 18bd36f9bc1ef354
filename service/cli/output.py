"""The output of commands: JSON for programs, fields and columns for people."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from service.strict_json import compact_json

Text = str | None
Texts = list[str] | None


def option(help: str, *names: str, **settings: Any) -> Any:
    """An option of a command. Without names it is called like its parameter."""
    return typer.Option(*names, help=help, **settings)


Json = Annotated[bool, option("Machine-readable output.", "--json")]


def plain(text: object) -> str:
    """The text as one line of printable characters."""
    return "".join(char if char.isprintable() else " " for char in str(text)).strip()


def put(line: str) -> None:
    """Prints a line and flushes it: a program may read it from a pipe while this one runs."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def put_json(value: object) -> None:
    """Prints a JSON document on one line. JSON escapes control characters."""
    unicode = sys.stdout.encoding.lower().startswith("utf")
    put(compact_json(value) if unicode else json.dumps(value, separators=(",", ":")))


def put_fields(fields: Mapping[str, Any]) -> None:
    """Prints `name  value` lines without the empty values. The fields of an object follow its name
    and a dot, and the items of a list its name and their place. A list of texts is one line.
    """
    lines = dict(flat(fields))
    width = max(map(len, lines), default=0)
    for name, text in lines.items():
        put(f"{name:<{width}}  {plain(text)}")


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, list) and not any(isinstance(each, list | dict) for each in value):
        value = ", ".join(map(word, value))
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from flat(each, f"{name}.{inner}" if name else str(inner))
    elif value not in (None, ""):
        yield name, word(value)


def word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def put_table(rows: Sequence[Mapping[str, Any]], *columns: str) -> None:
    """Prints columns under their names. The last column is not padded."""
    table = [list(columns)]
    for row in rows:
        values = (row.get(name) for name in columns)
        table.append(["-" if value in (None, "") else plain(value) for value in values])
    widths = [max(len(line[index]) for line in table) for index in range(len(columns) - 1)] + [0]
    for line in table:
        cells = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)]
        put("  ".join(cells).rstrip())


def show(document: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        put_json(document)
    else:
        put_fields(document)


def put_result(document: object, as_json: bool, *lines: str) -> None:
    """Prints the document as JSON, or else these lines."""
    if as_json:
        put_json(document)
        return
    for line in lines:
        put(line)


def remark(text: str) -> None:
    """Prints a line on standard error if that is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(text + "\n")
