"""The program `darkroom`: its commands. A command imports heavy modules when it runs."""

import os
from collections.abc import Callable
from typing import Annotated

import typer

from service import VERSION
from service.cli import (
    backup,
    completion,
    doctor_command,
    event_commands,
    file_commands,
    money_commands,
    restore,
    sandbox_commands,
    serve,
    task_commands,
)
from service.cli.completion import COMPLETING
from service.cli.place import Local, Url, choose, selectable
from service.cli.task_acts import ACTS, BULK
from service.cli.verbs import GROUPS, TASKS

program = typer.Typer(
    no_args_is_help=True,
    add_completion=COMPLETING in os.environ,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
command: Callable[..., None]
for command in (serve.serve, serve.worker):
    program.command()(command)
program.command(cls=sandbox_commands.SandboxCommand)(sandbox_commands.sandbox)
program.command()(selectable(task_commands.submit))
program.command("tasks")(selectable(TASKS.command()))
for command in (
    *(task_commands.task, event_commands.events, event_commands.listen),
    *(money_commands.models, money_commands.estimate, money_commands.usage),
):
    program.command()(selectable(command))
for command in (
    *(backup.backup, restore.restore, serve.migrate, doctor_command.doctor),
    *(completion.completion, serve.openapi, serve.asyncapi),
):
    program.command()(command)
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
