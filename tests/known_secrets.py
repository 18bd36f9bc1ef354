"""The secrets that the tests and the services of their process make, and where processes write."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress

# Of each secret, the parts that a line cannot have by chance.
PART = re.compile(r"[A-Za-z0-9_+-]{11,}")
KNOWN: set[str] = set()
NAMED = re.compile(r"DARKROOM_\w*(KEY|TOKEN|PASSWORD)")
# What these commands are for is to show a secret. Only their standard error is searched.
SHOWING = {"keys", "endpoints", "listen"}
OUTPUTS: dict[str, int] = {}  # the files of processes, and how much of each was checked


def texts_of(value: object) -> Iterator[str]:
    """The texts in a value, also in a text that is JSON. The names of fields are none of them."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_of(each)


def know(*secrets: object) -> None:
    """No line may have any of these from now on."""
    for text in texts_of(secrets):
        KNOWN.update(PART.findall(text))


def know_settings(settings: Mapping[str, str]) -> None:
    """The variables that hold secrets."""
    know(*(value for name, value in settings.items() if NAMED.fullmatch(name)))


def watch(*files: str) -> None:
    """Checks the files to which a process writes at the end of each test."""
    for file in files:
        OUTPUTS.setdefault(file, 0)
