"""The exit codes of the program: 0 on success, 2 on bad usage, which typer finds, 1 with one line
on standard error on failure, and 130 when interrupted.
"""

import io
import os
import sys

import typer

from service.cli import program
from service.cli.api_client import CommandFailed, Interrupted
from service.cli.output import plain
from service.cli.place import CHOSEN, Choice
from service.cli.quick import command_of
from service.errors import DarkroomError
from service.strict_json import JSON, compact_json

FAILED, INTERRUPTED = 1, 130


def main() -> None:
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
        sys.exit(FAILED)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the end of the program: one line, no traceback
        text = compact_json(failure(error)) if as_json else f"darkroom: {complaint(error)}"
        sys.stderr.write(text + "\n")
        failed = INTERRUPTED if isinstance(error, Interrupted) else FAILED
        sys.exit(getattr(error, "exit_code", failed))


def failure(error: Exception) -> JSON:
    """The error in the form of the API's errors."""
    names = ("code", "message", "type", "param", "request_id", "task_id")
    code = "bad_usage" if hasattr(error, "exit_code") else getattr(error, "code", "failed")
    own = {"code": code, "message": complaint(error), "type": "command_error"}
    given = error.error if isinstance(error, CommandFailed) else {}
    return {"error": dict.fromkeys(names) | own | given}


def complaint(error: Exception) -> str:
    if isinstance(error, DarkroomError):
        return plain(error)
    if hasattr(error, "format_message"):  # bad usage
        return plain(error.format_message())
    if isinstance(error, OSError):
        return plain(f"{error.filename}: {error.strerror}" if error.filename else error)
    return plain(f"a defect of this program: {type(error).__name__}: {error}")
