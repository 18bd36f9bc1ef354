"""The program `darkroom`: its commands, and its exit codes on errors.

Client commands find a service as `place` says. A command imports heavy modules when it runs.
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
    completion,
    doctor_command,
    file_commands,
    listen_command,
    money_commands,
    restore,
    sandbox_commands,
    serve,
    task_commands,
)
from service.cli.api_client import CommandFailed, Interrupted
from service.cli.completion import COMPLETING
from service.cli.output import plain
from service.cli.place import CHOSEN, Choice, Local, Url, choose, selectable
from service.cli.quick import command_of
from service.cli.task_acts import ACTS, BULK
from service.cli.verbs import GROUPS, TASKS
from service.errors import DarkroomError
from service.strict_json import JSON, compact_json

program = typer.Typer(
    no_args_is_help=True,
    add_completion=COMPLETING in os.environ,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
program.command()(serve.serve)
program.command()(serve.worker)
program.command(cls=sandbox_commands.SandboxCommand)(sandbox_commands.sandbox)
program.command()(selectable(task_commands.submit))
program.command("tasks")(selectable(TASKS.command()))
program.command()(selectable(task_commands.task))
program.command()(selectable(task_commands.events))
program.command()(selectable(listen_command.listen))
program.command()(selectable(catalogue_commands.models))
program.command()(selectable(catalogue_commands.estimate))
program.command()(selectable(money_commands.usage))
program.command()(backup.backup)
program.command()(restore.restore)
program.command()(serve.migrate)
program.command()(doctor_command.doctor)
program.command()(completion.completion)
program.command()(serve.openapi)
program.command()(serve.asyncapi)
for word, verb in ACTS.items():
    program.command(word)(selectable(verb.command()))
BULK_GROUP = ("Acts on many rows by a filter: counts first, and acts with --yes.", BULK)
for name, (help, verbs) in {**GROUPS, "bulk": BULK_GROUP}.items():
    group = typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)
    for word, verb in verbs.items():
        group.command(word)(selectable(verb.command()))
    if name == "files":
        group.command("upload")(selectable(file_commands.upload_files))
    program.add_typer(group, name=name)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"darkroom {VERSION}")
        raise typer.Exit


@program.callback()
def about_darkroom(
    version: Annotated[  # noqa: ARG001 - its callback acts
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    at_url: Url = None,
    at_local: Local = False,
) -> None:
    """Submit image tasks and forget them: Darkroom proves callbacks, saves images and delivers
    events.
    """
    choose(at_url, at_local)


def main() -> None:
    """Runs the program. It exits with 0, with 2 on bad usage, with 1 and one line on standard error
    on failure, and with 130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal's encoding may lack a character
    as_json = "--json" in sys.argv
    CHOSEN.set(Choice())
    try:
        try:
            # With --json, usage errors come here too.
            command = command_of(program, sys.argv[1:])
            code = command(prog_name="darkroom", standalone_mode=not as_json)
        finally:
            sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except BrokenPipeError:
        # The reader has gone. The interpreter flushes standard output once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the end of the program: one line, no traceback
        text = compact_json(failure(error)) if as_json else f"darkroom: {complaint(error)}"
        sys.stderr.write(text + "\n")
        sys.exit(130 if isinstance(error, Interrupted) else getattr(error, "exit_code", 1))


def failure(error: Exception) -> JSON:
    """The error in the form of the API's errors."""
    names = ("code", "message", "type", "param", "request_id", "task_id")
    code = "bad_usage" if hasattr(error, "exit_code") else getattr(error, "code", "failed")
    own = {"code": code, "message": complaint(error), "type": "command_error"}
    given = error.error if isinstance(error, CommandFailed) else {}
    return {"error": dict.fromkeys(names) | own | given}


def complaint(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, DarkroomError):
        return plain(error)
    if hasattr(error, "format_message"):  # bad usage
        return plain(error.format_message())
    if isinstance(error, OSError):
        return plain(f"{error.filename}: {error.strerror}" if error.filename else error)
    return plain(f"a defect of this program: {type(error).__name__}: {error}")
