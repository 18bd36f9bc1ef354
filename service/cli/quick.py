"""What makes a command of the program start quickly.

typer builds the parameters of all commands before it runs one, and an adapter of pydantic for each
parameter of the command, even if the line does not give it. Both take as long as a request.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import typer

TEXTS = (str, list[str])


def command_of(program: typer.Typer, words: Sequence[str]) -> Any:
    """The program with the command or the group that the first word names, or with all of them."""
    first = words[0] if words else ""
    part = copy(program)
    part.registered_commands = [
        info
        for info in program.registered_commands
        if first == (info.name or getattr(info.callback, "__name__", ""))
    ]
    part.registered_groups = [info for info in program.registered_groups if info.name == first]
    matches = part.registered_commands or part.registered_groups
    command = typer.main.get_command(part if matches else program)
    make_quick(command)
    return command


def make_quick(command: Any, parent: typer.Context | None = None) -> None:
    context = typer.Context(command, parent=parent, **command.context_settings)
    for parameter in command.get_params(context):  # with that of --help
        if (usual := getattr(parameter, "get_runtime_param", None)) is not None:  # typer 0.29
            parameter.get_runtime_param = partial(Conversion, usual)
    for inner in getattr(command, "commands", {}).values():
        make_quick(inner, context)


@dataclass(frozen=True, slots=True)
class Conversion:
    """Stands for typer's conversion of a parameter. Text, defaults and missing values stay."""

    usual: Callable[[], Any]

    def coerce(self, value: Any, *, param: Any, ctx: Any) -> Any:
        multiple = param.multiple or param.nargs == -1
        if value is None:
            return () if multiple else None
        if param.type_descriptor.annotation in TEXTS:
            return list(value) if multiple else value
        if value == param.default:
            return value
        return self.usual().coerce(value, param=param, ctx=ctx)
