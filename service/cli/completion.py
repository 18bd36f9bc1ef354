"""`darkroom completion`: words of the command line for a shell."""

import os
import sys
from typing import Annotated

import typer

from service.cli.output import Json, put_result

COMPLETING = "_DARKROOM_COMPLETE"  # set by the shell that asks for words
SHELLS = ("bash", "zsh", "fish")


def completion(
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish.", metavar="SHELL")],
    as_json: Json = False,
) -> None:
    """Print the script that completes commands and options in a shell."""
    if shell not in SHELLS:
        raise typer.BadParameter(f"{shell!r} is none of {', '.join(SHELLS)}", param_hint="SHELL")
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "service"],
        env={**os.environ, COMPLETING: f"source_{shell}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    put_result({"shell": shell, "script": done.stdout}, as_json, done.stdout.rstrip())
