"""How a failure is told, and how a rule chooses by a small number."""

import re
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import note

Chosen = TypeVar("Chosen")


class Line:
    """A line below the step in the story of a failure, without what is nothing; written when it is
    read.
    """

    def __init__(self, what: object) -> None:
        self.what = what

    def __repr__(self) -> str:
        return "    " + re.sub(
            r"_0{9,}", "_", re.sub(r"(, )?\w+=(None|\(\)|'')", "", str(self.what))
        )


def tell(what: object) -> None:
    note(Line(what))


def among(items: Sequence[Chosen], pick: int) -> Chosen:
    return items[pick % len(items)]
