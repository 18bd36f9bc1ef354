"""The program `darkroom`: every command in one table, and what becomes of errors.

Client commands find a service by DARKROOM_URL and DARKROOM_API_KEY. What is heavy is imported by
the command that needs it.
"""

import io
import os
import sys
from typing import Annotated

import typer

from service import VERSION
from service.cli import (
    backup,
    endpoint_commands,
    event_commands,
    key_commands,
    replay_commands,
    restore,
    serve,
    task_commands,
)
from service.cli.output import plain
from service.errors import DarkroomError

program = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    serve.serve,
    serve.worker,
    serve.sandbox,
    task_commands.submit,
    task_commands.tasks,
    task_commands.task,
    event_commands.events,
    backup.backup,
    restore.restore,
    serve.migrate,
    serve.openapi,
    serve.asyncapi,
):
    program.command(cls=serve.SandboxCommand if command is serve.sandbox else None)(command)

GROUPS = {
    "endpoints": ("Who is told of events.", endpoint_commands.ENDPOINTS),
    "deliveries": ("What endpoints were sent, with every attempt.", endpoint_commands.DELIVERIES),
    "replay": ("Send an endpoint its events again.", replay_commands.REPLAYS),
    "keys": ("API keys: made, listed, revoked.", key_commands.KEYS),
}
for name, (about, commands) in GROUPS.items():
    group = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None)
    for word, act in commands.items():
        group.command(word)(act)
    program.add_typer(group, name=name)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"darkroom {VERSION}")
        raise typer.Exit


@program.callback()
def about_darkroom(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Submit image tasks and forget them: callbacks are proved, pictures saved, events
    delivered.
    """


def main() -> None:
    """Runs the program. Exit codes: 0, 2 on bad usage, 1 with one line on standard error, 130 when
    interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a prompt may hold what the terminal's encoding does not
    try:
        try:
            program(prog_name="darkroom")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # nobody reads: the exit's own flush must not say so
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the end of the program: one line, no traceback
        sys.stderr.write(f"darkroom: {complaint(error)}\n")
        sys.exit(1)


def complaint(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, DarkroomError):
        return plain(error)
    if isinstance(error, OSError):
        return plain(f"{error.filename}: {error.strerror}" if error.filename else error)
    return plain(f"a defect of this program: {type(error).__name__}: {error}")
