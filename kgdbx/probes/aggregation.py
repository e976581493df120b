"""What a probe sums up, in bpftrace's words: ``@NAME[KEY, ...] = hist(EXPR)``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kgdbx.probes.expression import Expr, format_expression

if TYPE_CHECKING:
    from kgdbx.probes.definition import Field

__all__ = ("AGGREGATION", "Aggregation", "FUNCTIONS", "MAX_KEYS", "split_list")

FUNCTIONS = {
    "count": "how often",
    "sum": "total",
    "min": "least",
    "max": "greatest",
    "avg": "mean",
    "hist": "histogram by powers of two",
    "lhist": "histogram of equal steps: lhist(EXPR, MIN, MAX, STEP)",
}
"""Functions of a map, and what they tell."""

MAX_KEYS = 8
"""Most keys of a map."""

AGGREGATION = re.compile(
    r"@(?P<name>[A-Za-z_]\w*)?[ \t]*(?:\[(?P<keys>.*?)\])?[ \t]*=[ \t]*(?P<function>[a-z]+)\(",
    re.ASCII,
)
"""The beginning of one, up to the parenthesis of its function."""


@dataclass(frozen=True, slots=True)
class Aggregation:
    """A map and what goes into it.

    :ivar name: without ``@``, may be empty; all probes with one name fill one map
    :ivar keys: what hits are told apart by
    :ivar function: one of :data:`FUNCTIONS`
    :ivar value: what it is of; None for count
    :ivar steps: of lhist: least value, end and width of its steps
    """

    name: str
    keys: tuple["Field", ...]
    function: str
    value: Expr | None = None
    steps: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        return "".join(self._parts())

    def _parts(self) -> Iterator[str]:
        yield f"@{self.name}"
        if self.keys:
            yield f"[{','.join(map(str, self.keys))}]"
        value = "" if self.value is None else format_expression(self.value, spaces=False)
        steps = "".join(f",{number}" for number in self.steps or ())
        yield f"={self.function}({value}{steps})"


def split_list(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Split at commas outside of parentheses, brackets and quotes.

    :return: start and end of each item, without the white space around it
    """
    items: list[tuple[int, int]] = []
    begin, depth, quote, at = start, 0, "", start
    while at < end:
        character = text[at]
        if quote:
            at += character == "\\"
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character == "," and not depth:
            items.append((begin, at))
            begin = at + 1
        else:
            depth = max(0, depth + (character in "([") - (character in ")]"))
        at += 1
    items.append((begin, end))
    return [_stripped(text, *item) for item in items]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start] in " \t":
        start += 1
    while start < end and text[end - 1] in " \t":
        end -= 1
    return start, end
