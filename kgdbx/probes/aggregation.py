"""What a probe sums up, in bpftrace's words: ``@NAME[KEY, ...] = hist(EXPR)``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kgdbx.probes.expression import Expr, format_expression, is_text
from kgdbx.probes.field import Field, add_field, is_whole, read_value
from kgdbx.probes.lexer import Scanner, split_words

__all__ = ("Aggregation", "FUNCTIONS", "is_aggregation", "read_aggregation")

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

_MAX_KEYS = 8
_MAX_STEPS = 1000  # of lhist, as in bpftrace

_BEGINNING = re.compile(
    r"@(?P<name>[A-Za-z_]\w*)?[ \t]*(?:\[(?P<keys>.*?)\])?[ \t]*=[ \t]*(?P<function>[a-z]+)\(",
    re.ASCII,
)
_SIGNED = re.compile(r"-?(?:0x[0-9a-fA-F]+|[1-9]\d*|0)", re.ASCII)


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
    keys: tuple[Field, ...]
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


def is_aggregation(scanner: Scanner) -> bool:
    """Whether an aggregation begins at the scanner's position, and not a field."""
    return scanner.peek(_BEGINNING) is not None


def read_aggregation(scanner: Scanner, absent: frozenset[str]) -> Aggregation:
    """Read the aggregation at the scanner's position, and go past it.

    :param absent: as for :func:`~kgdbx.probes.field.read_value`
    :raises DefinitionError: if it is none
    """
    match = scanner.take(_BEGINNING)
    if match is None:
        raise scanner.expected("@NAME[KEY, ...] = FUNCTION(EXPR)")
    keys = _keys(scanner, match, absent)
    function = match["function"]
    if function not in FUNCTIONS:
        known = " ".join(FUNCTIONS)
        raise scanner.error(f"expected one of {known}", match.start("function"))
    words = split_words(scanner.text, match.end() - 1)
    close = words[0][1] - 1 if words else match.end()
    if scanner.text[close : close + 1] != ")" or close < match.end():
        raise scanner.error("this parenthesis is not closed", match.end() - 1)
    value, steps = _summed(scanner, function, (match.end(), close), absent)
    scanner.position = close + 1
    return Aggregation(match["name"] or "", tuple(keys.values()), function, value, steps)


def _keys(scanner: Scanner, match: re.Match[str], absent: frozenset[str]) -> dict[str, Field]:
    keys: dict[str, Field] = {}
    if match["keys"] is not None:
        for start, end in _split_list(scanner.text, *match.span("keys")):
            add_field(keys, Scanner(scanner.text, start, end), absent)
    if len(keys) > _MAX_KEYS:
        raise scanner.error(f"a map has at most {_MAX_KEYS} keys", match.start("keys"))
    if whole := [key for key in keys.values() if is_whole(key)]:
        raise scanner.error(f"{whole[0].name} is no key", match.start("keys"))
    return keys


def _summed(
    scanner: Scanner, function: str, span: tuple[int, int], absent: frozenset[str]
) -> tuple[Expr | None, tuple[int, int, int] | None]:
    # What stands in the parentheses of a map's function.
    start = span[0]
    items = [each for each in _split_list(scanner.text, *span) if each[0] < each[1]]
    wanted = {"count": 0, "lhist": 4}.get(function, 1)
    if len(items) != wanted:
        forms = {"count": "count()", "lhist": "lhist(EXPR, MIN, MAX, STEP)"}
        form = forms.get(function, f"{function}(EXPR)")
        raise scanner.error(f"expected {form}", start)
    if not items:
        return None, None
    word = Scanner(scanner.text, *items[0])
    value = read_value(word, absent)
    if word.position < word.end:
        raise word.expected("an operator or ')'")
    if is_text(value):
        raise scanner.error("a string is no number; make it a key", items[0][0])
    if function != "lhist":
        return value, None
    least, most, step = (_signed(scanner, *item) for item in items[1:])
    if step <= 0 or most <= least or (most - least) % step:
        raise scanner.error("STEP has to divide MAX - MIN, and MAX be above MIN", start)
    if (most - least) // step > _MAX_STEPS:
        raise scanner.error(f"a histogram has at most {_MAX_STEPS} steps", start)
    return value, (least, most, step)


def _signed(scanner: Scanner, start: int, end: int) -> int:
    match = _SIGNED.fullmatch(scanner.text, start, end)
    if match is None:
        raise scanner.error("expected a number", start)
    return int(match[0], 0)


def _split_list(text: str, start: int, end: int) -> list[tuple[int, int]]:
    # Start and end of what commas outside of parentheses, brackets and quotes separate.
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
