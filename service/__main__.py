"""The program `darkroom`, and `python -m service`."""

import os
import sys
from pathlib import Path

HELP = Path(__file__).with_name("help.txt")
HELP_WIDTH = 80  # no page of help is wider


def main() -> None:
    """Runs the program. Its first page of help is a file: to make it takes all commands."""
    if sys.argv[1:] in (["--help"], ["-h"]) and columns() >= HELP_WIDTH:
        os.write(sys.stdout.fileno(), HELP.read_bytes())
        return
    from service.cli import exit_codes

    exit_codes.main()


def columns() -> int:
    """Of the terminal. Without a terminal, those of the file."""
    width = os.environ.get("COLUMNS", "")
    try:
        return int(width) if width.isdecimal() else os.get_terminal_size(1).columns or HELP_WIDTH
    except OSError:
        return HELP_WIDTH


if __name__ == "__main__":
    main()
