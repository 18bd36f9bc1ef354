"""Notes in the report of a failure, and the choice of an item by a small number."""

import re
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import note

Chosen = TypeVar("Chosen")


class Line:
    """A note below a step in the report of a failure, without empty fields. It is formatted only
    when it is printed.
    """

    def __init__(self, what: object) -> None:
        self.what = what

    def __repr__(self) -> str:
        return "    " + re.sub(
            r"_0{9,}", "_", re.sub(r"(, )?\w+=(None|\(\)|'')", "", str(self.what))
        )


def log(what: object) -> None:
    note(Line(what))


def among(items: Sequence[Chosen], pick: int) -> Chosen:
    return items[pick % len(items)]
