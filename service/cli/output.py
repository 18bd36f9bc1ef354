"""What commands print: JSON for programs, columns for people; never a control character that came
from somebody else.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def plain(text: object) -> str:
    """One line that a terminal takes for text and nothing else."""
    return "".join(char if char.isprintable() else " " for char in str(text)).strip()


def terminal() -> bool:
    return sys.stdout.isatty()


def put(line: str) -> None:
    """A line, out at once: somebody may read it from a pipe and wait."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def put_json(value: object) -> None:
    """One document a line; JSON's escapes keep it plain."""
    put(
        json.dumps(
            value,
            ensure_ascii=not sys.stdout.encoding.lower().startswith("utf"),
            separators=(",", ":"),
        )
    )


def put_fields(fields: Mapping[str, Any]) -> None:
    """`name  value` lines of what is known; a nested value as JSON."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        if value not in (None, "", [], {}):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            put(f"{name:<{width}}  {plain(text)}")


def put_table(rows: Sequence[Mapping[str, Any]], *columns: str) -> None:
    """Columns under their names; the last may be long."""
    table = [
        columns,
        *(
            [plain("-" if row.get(name) in (None, "") else row[name]) for name in columns]
            for row in rows
        ),
    ]
    widths = [max(len(line[place]) for line in table) for place in range(len(columns) - 1)] + [0]
    for line in table:
        put(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def remark(text: str) -> None:
    """A word to whoever sits at the terminal, beside the output."""
    if sys.stderr.isatty():
        sys.stderr.write(text + "\n")
