"""The fields of a probe definition: ``[NAME=]EXPR[:TYPE]``, what a hit records."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kgdbx.probes.expression import (
    Expr,
    Literal,
    Name,
    Register,
    Special,
    format_expression,
    is_text,
    walk,
)
from kgdbx.probes.expression_parser import read_expression
from kgdbx.probes.lexer import Scanner

__all__ = (
    "FetchType",
    "Field",
    "STACK_DEPTH",
    "add_field",
    "expand_fields",
    "is_whole",
    "read_value",
)

STACK_DEPTH = 16
"""Frames of a ``$kstack`` that does not say how many it wants."""

_MAX_STACK_DEPTH = 127  # PERF_MAX_STACK_DEPTH, include/uapi/linux/perf_event.h
_MAX_ARRAY = 64  # MAX_ARRAY_LEN, kernel/trace/trace_probe.h
_MAX_FIELDS = 128  # MAX_TRACE_ARGS, same file

_NUMBER = re.compile(r"\d\w*", re.ASCII)
_FIELD_NAME = re.compile(r"([A-Za-z_]\w*)=(?!=)", re.ASCII)
_TYPE = re.compile(
    r"(?:([usx])(8|16|32|64)|(char|u?string|symbol)|b(\d+)@(\d+)/(8|16|32|64))(?:\[(\d+)\])?(?!\S)",
    re.ASCII,
)
_WHOLE_FIELD = frozenset(("params", "vars"))
_OWN_FIELD = _WHOLE_FIELD | {"func", "kstack"}
_NEEDED = {
    "arg": "at the function's entry",
    "duration_ns": "in a return probe (r)",
    "retval": "in a return probe (r)",
}


@dataclass(frozen=True, slots=True)
class FetchType:
    """The ``:TYPE`` of a field.

    :ivar base: u, s or x (shown as unsigned, signed, hexadecimal), b (bit field), char, string,
        ustring, symbol (an address, shown as symbol+offset), or kstack (*count* frames at most)
    :ivar size_bytes: size in memory; of one pointer for the strings, of the container for b
    :ivar bit_offset: lowest bit of a bit field
    :ivar bit_width: width of a bit field
    :ivar count: number of elements of an array, otherwise None
    """

    base: str
    size_bytes: int = 8
    bit_offset: int = 0
    bit_width: int = 0
    count: int | None = None

    def __str__(self) -> str:
        if self.base == "kstack":
            return str(self.count)
        array = "" if self.count is None else f"[{self.count}]"
        bits = 8 * self.size_bytes
        if self.base == "b":
            return f"b{self.bit_width}@{self.bit_offset}/{bits}{array}"
        return f"{self.base}{bits if self.base in 'usx' else ''}{array}"

    @property
    def is_string(self) -> bool:
        """Whether the value is text that an address leads to."""
        return self.base in ("string", "ustring")


@dataclass(frozen=True, slots=True)
class Field:
    """One value to record.

    :ivar name: as given, otherwise the canonical text of the expression
    """

    name: str
    expression: Expr
    type: FetchType | None = None

    def __str__(self) -> str:
        text = format_expression(self.expression, spaces=False)
        name = "" if self.name == text else f"{self.name}="
        return name + text + (f":{self.type}" if self.type else "")


def expand_fields(
    fields: Sequence[Field], variables: Mapping[str, Sequence[str]]
) -> tuple[Field, ...]:
    """Replace ``$vars`` and ``$params`` by a field for each variable that has none yet.

    :param variables: the names of the variables under the keys ``vars`` and ``params``
    """
    taken = {each.name for each in fields}
    expanded: list[Field] = []
    for each in fields:
        expression = each.expression
        if not isinstance(expression, Special) or expression.name not in _WHOLE_FIELD:
            expanded.append(each)
            continue
        for name in variables[expression.name]:
            if name not in taken:
                taken.add(name)
                expanded.append(Field(name, Name(name, column=expression.column)))
    return tuple(expanded)


def is_whole(each: Field) -> bool:
    """Whether a field stands for several: ``$vars`` or ``$params``."""
    return _is_special(each.expression, *_WHOLE_FIELD)


def add_field(fields: dict[str, Field], word: Scanner, absent: frozenset[str]) -> None:
    """Read a field, and add it to the others by its name.

    :param word: all that may belong to the field
    :param absent: as for :func:`read_value`
    :raises DefinitionError: if it is no field, or the others leave no room for it
    """
    start = word.position
    each = _field(word, absent)
    if each.name in fields:
        other = f"other={word.text[start : word.end]}"
        raise word.error(f"the name '{each.name}' is already used; write {other}", start)
    if len(fields) == _MAX_FIELDS:
        raise word.error(f"a probe has at most {_MAX_FIELDS} fields", start)
    fields[each.name] = each


def read_value(scanner: Scanner, absent: frozenset[str]) -> Expr:
    """Read the longest expression that has a value where the probe is.

    :param absent: specials without a value there: any of arg, duration_ns and retval
    :raises DefinitionError: if none starts here, or it has one of these, or a field of its own
    """
    return _checked(read_expression(scanner), scanner, absent)


def _field(word: Scanner, absent: frozenset[str]) -> Field:
    name = word.take(_FIELD_NAME)
    column = word.position
    expression = read_expression(word)
    is_stack = _is_special(expression, "kstack")
    if not _is_special(expression, *_OWN_FIELD):
        _checked(expression, word, absent)
    elif _is_special(expression, *_WHOLE_FIELD) and (name or word.position < word.end):
        raise word.error("stands for several fields and takes no name and no type", column)
    fetch_type = None
    if word.take_text(":"):
        fetch_type = _depth(word) if is_stack else _type(word, expression)
    if word.position < word.end:
        raise word.expected("an operator, ':' and a type, or a space")
    label = name[1] if name else format_expression(expression, spaces=False)
    return Field(label, expression, fetch_type)


def _depth(word: Scanner) -> FetchType:
    column = word.position
    match = word.take(_NUMBER)
    frames = word.integer(match[0], column) if match else 0
    if not 1 <= frames <= _MAX_STACK_DEPTH:
        raise word.error(f"a stack has 1 to {_MAX_STACK_DEPTH} frames: $kstack:8", column)
    return FetchType("kstack", 8, count=frames)


def _type(word: Scanner, expression: Expr) -> FetchType:
    column = word.position
    match = word.take(_TYPE)
    if match is None:
        types = "u8..u64 s8..s64 x8..x64 char string ustring symbol b<width>@<offset>/<size>"
        raise word.error(f"expected a type, one of {types}, or type[N]", column)
    number, bits, other, width, offset, container, digits = match.groups()
    count = int(digits[:9]) if digits else None
    if count is not None and not 1 <= count <= _MAX_ARRAY:
        raise word.error(f"an array has 1 to {_MAX_ARRAY} elements", match.start(7))
    if number:
        result = FetchType(number, int(bits) // 8, count=count)
    elif other:
        result = FetchType(other, 1 if other == "char" else 8, count=count)
    else:
        low, wide = int(offset[:9]), int(width[:9])
        if not wide or low + wide > int(container):
            raise word.error(f"the bits do not fit into {container}", column)
        result = FetchType("b", int(container) // 8, low, wide, count)
    if _is_special(expression, "func"):
        raise word.error("$func takes no type", column)
    if is_text(expression) and (not result.is_string or count is not None):
        raise word.error("a string takes the types string and ustring only", column)
    if count is not None and (
        _is_special(expression, "stack") or isinstance(expression, Register | Literal)
    ):
        memory = f"+0({format_expression(expression)}):{result}"
        raise word.error(f"an array is read from memory; write {memory}", column)
    return result


def _checked(expression: Expr, scanner: Scanner, absent: frozenset[str]) -> Expr:
    for node in walk(expression):
        if not isinstance(node, Special):
            continue
        if node.name in absent:
            name = f"{node.name}{node.index or ''}"
            message = f"${name} has a value {_NEEDED[node.name]} only"
        elif node.name in _OWN_FIELD:
            message = f"${node.name} is a field of its own, not part of an expression"
        else:
            continue
        raise scanner.error(message, node.column)
    return expression


def _is_special(expression: Expr, *names: str) -> bool:
    return isinstance(expression, Special) and expression.name in names
