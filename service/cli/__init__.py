"""The program `darkroom`: its commands, and its exit codes on errors.

Client commands find a service by DARKROOM_URL and DARKROOM_API_KEY. A command imports heavy modules
when it runs.
"""

import io
import os
import sys
from typing import Annotated

import typer

from service import VERSION
from service.cli import (
    backup,
    catalogue_commands,
    file_commands,
    money_commands,
    restore,
    sandbox_commands,
    serve,
    task_commands,
)
from service.cli.output import plain
from service.cli.verbs import GROUPS, TASKS
from service.errors import DarkroomError

program = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
program.command()(serve.serve)
program.command()(serve.worker)
program.command(cls=sandbox_commands.SandboxCommand)(sandbox_commands.sandbox)
program.command()(task_commands.submit)
program.command("tasks")(TASKS.command())
program.command()(task_commands.task)
program.command()(task_commands.events)
program.command()(catalogue_commands.models)
program.command()(catalogue_commands.estimate)
program.command()(money_commands.usage)
program.command()(backup.backup)
program.command()(restore.restore)
program.command()(serve.migrate)
program.command()(serve.openapi)
program.command()(serve.asyncapi)
for name, (help, verbs) in GROUPS.items():
    group = typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)
    for word, verb in verbs.items():
        group.command(word)(verb.command())
    if name == "files":
        group.command("upload")(file_commands.upload_files)
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
    """Submit image tasks and forget them: Darkroom proves callbacks, saves images and delivers
    events.
    """


def main() -> None:
    """Runs the program. It exits with 0, with 2 on bad usage, with 1 and one line on standard error
    on failure, and with 130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal's encoding may lack a character
    try:
        try:
            program(prog_name="darkroom")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone. The interpreter flushes standard output once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the end of the program: one line, no traceback
        sys.stderr.write(f"darkroom: {complaint(error)}\n")
        sys.exit(1)


def complaint(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, DarkroomError):
        return plain(error)
    if isinstance(error, OSError):
        return plain(f"{error.filename}: {error.strerror}" if error.filename else error)
    return plain(f"a defect of this program: {type(error).__name__}: {error}")
