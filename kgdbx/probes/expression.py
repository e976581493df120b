"""Expressions of probe definitions: the syntax tree and its text.

:mod:`kgdbx.probes.expression_parser` reads it. The tree says what was written and nothing about
how to get it: :mod:`kgdbx.probes.evaluate` evaluates it at a stop, a compiler turns it into C for
probes inside the guest.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TypeAlias, cast

from kgdbx.probes.lexer import is_type_name, literal_type

__all__ = (
    "AtSymbol",
    "Binary",
    "Cast",
    "Dereference",
    "Expr",
    "Index",
    "Literal",
    "Member",
    "Name",
    "PRECEDENCE",
    "Register",
    "SPECIALS",
    "SizeOf",
    "SizeOfType",
    "Special",
    "String",
    "Ternary",
    "Unary",
    "format_expression",
    "is_text",
    "walk",
)

SPECIALS = {
    "arg": "argument of the function, counted from 1",
    "comm": "name of the current task, a string",
    "cpu": "number of the CPU",
    "duration_ns": "nanoseconds since the call; only in return probes inside the kernel",
    "func": "name of the probed function; only as a whole field",
    "kstack": "the kernel's call stack, innermost first; only as a whole field",
    "params": "every parameter of the function; only as a whole field",
    "pid": "thread ID of the current task",
    "retval": "return value; only in return probes",
    "stack": "stack pointer, or with a number the 8-byte entry there, counted from 0",
    "task": "the current task, struct task_struct *",
    "tgid": "process ID of the current task",
    "vars": "every variable that is visible at the probe; only as a whole field",
}
"""What may follow ``$``."""


@dataclass(frozen=True, slots=True)
class _Node:
    # 0-based column in the definition's text; not part of equality
    column: int = field(default=0, kw_only=True, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Literal(_Node):
    """Non-negative integer; *type_name* is int, unsigned int, long or unsigned long."""

    value: int
    type_name: str = "int"


@dataclass(frozen=True, slots=True)
class String(_Node):
    """``"text"``, to be compared with; the quotes and escapes are gone."""

    value: str


@dataclass(frozen=True, slots=True)
class Name(_Node):
    """A variable in scope, else a kernel symbol, else an enumerator."""

    name: str


@dataclass(frozen=True, slots=True)
class Register(_Node):
    """``%di`` or ``%rdi``: unsigned long; *name* is the short one, as in ``struct pt_regs``."""

    name: str


@dataclass(frozen=True, slots=True)
class Special(_Node):
    """``$name`` or ``$nameN``; see :data:`SPECIALS`."""

    name: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Unary(_Node):
    """C's prefix ``- + ! ~ * &``."""

    operator: str
    operand: "Expr"


@dataclass(frozen=True, slots=True)
class Binary(_Node):
    """C's operators on integers and pointers, and ``text ~ "glob"``."""

    operator: str
    left: "Expr"
    right: "Expr"


@dataclass(frozen=True, slots=True)
class Ternary(_Node):
    """``condition ? then : otherwise``."""

    condition: "Expr"
    then: "Expr"
    otherwise: "Expr"


@dataclass(frozen=True, slots=True)
class Member(_Node):
    """``operand.name``, or ``operand->name`` if *arrow*; each works on structs and pointers."""

    operand: "Expr"
    name: str
    arrow: bool = False


@dataclass(frozen=True, slots=True)
class Index(_Node):
    """``operand[index]``."""

    operand: "Expr"
    index: "Expr"


@dataclass(frozen=True, slots=True)
class Cast(_Node):
    """``(type_name)operand``."""

    type_name: str
    operand: "Expr"


@dataclass(frozen=True, slots=True)
class SizeOf(_Node):
    """``sizeof(operand)`` in bytes: unsigned long; the operand is not read."""

    operand: "Expr"


@dataclass(frozen=True, slots=True)
class SizeOfType(_Node):
    """``sizeof(type_name)`` in bytes: unsigned long."""

    type_name: str


@dataclass(frozen=True, slots=True)
class Dereference(_Node):
    """``+OFFSET(operand)``, or ``+uOFFSET(operand)`` if *user*: memory at operand + offset.

    Arithmetic on the operand is in bytes, whatever its type. The memory is an unsigned long
    unless the field has a type. ``@ADDRESS`` is ``+0(ADDRESS)``.
    """

    operand: "Expr"
    offset_bytes: int = 0
    user: bool = False


@dataclass(frozen=True, slots=True)
class AtSymbol(_Node):
    """``@SYMBOL+OFFSET``: kernel memory there, an unsigned long unless the field has a type."""

    symbol: str
    offset_bytes: int = 0


Expr: TypeAlias = (
    Literal
    | String
    | Name
    | Register
    | Special
    | Unary
    | Binary
    | Ternary
    | Member
    | Index
    | Cast
    | SizeOf
    | SizeOfType
    | Dereference
    | AtSymbol
)

PRECEDENCE = {
    operator: level
    for level, operators in enumerate(
        ("||", "&&", "|", "^", "&", "== != ~", "< <= > >=", "<< >>", "+ -", "* / %"), start=1
    )
    for operator in operators.split()
}
"""How strongly each binary operator binds, as in C; those of 10 bind most."""

_PREFIX, _POSTFIX = 11, 12
_ESCAPED = re.compile(r'[\x00-\x1f\x7f"\\]')


def walk(expr: Expr) -> Iterator[Expr]:
    """Every node of an expression, each before its operands."""
    yield expr
    for each in fields(expr):
        value = getattr(expr, each.name)
        if isinstance(value, _Node):
            yield from walk(cast(Expr, value))


def is_text(expr: Expr) -> bool:
    """Whether the value is a string; everything else is an integer, a pointer or an aggregate.

    A comparison with a string reads the other side as one, like the field type ``string``.
    """
    if isinstance(expr, Ternary):
        return is_text(expr.then) and is_text(expr.otherwise)
    return isinstance(expr, String) or (isinstance(expr, Special) and expr.name == "comm")


def format_expression(expr: Expr, *, spaces: bool = True) -> str:
    """Canonical text, which parses to an equal tree.

    :param spaces: around binary operators; without, the text can stand as a field
    """
    return _format(expr, 0, " " if spaces else "")


def _format(expr: Expr, level: int, gap: str) -> str:
    # level: least binding power that needs no parentheses here; 0 for the outermost
    def operand(inner: Expr, inner_level: int) -> str:
        text = _format(inner, inner_level, gap)
        return f"({text})" if isinstance(inner, AtSymbol) else text

    own = _POSTFIX
    match expr:
        case Literal(value, type_name):
            text = _literal(value, type_name)
        case String(value):
            text = '"' + _ESCAPED.sub(lambda match: f"\\x{ord(match[0]):02x}", value) + '"'
        case Name(name):
            text = name
        case Register(name):
            text = f"%{name}"
        case Special(name, index):
            text = f"${name}" if index is None else f"${name}{index}"
        case Unary(operator, inner):
            text, own = operator + operand(inner, _PREFIX), _PREFIX
        case Binary(operator, left, right):
            own = PRECEDENCE[operator]
            ending = operand(right, own + 1)
            if operator == ending[0] == "&" and not gap:
                ending = f"({ending})"
            text = operand(left, own) + gap + operator + gap + ending
        case Ternary(condition, then, otherwise):
            parts = (operand(condition, 1), "?", operand(then, 0), ":", operand(otherwise, 0))
            text, own = gap.join(parts), 0
        case Member(inner, name, arrow):
            text = operand(inner, _POSTFIX) + ("->" if arrow else ".") + name
        case Index(inner, index):
            text = f"{operand(inner, _POSTFIX)}[{operand(index, 0)}]"
        case Cast(type_name, inner):
            ending, own = operand(inner, _PREFIX), _PREFIX
            is_clear = " " in type_name or is_type_name(type_name) or ending[0] not in "-+~*&%!"
            if not is_clear or ending.startswith("&&"):
                ending = f"({ending})"  # otherwise (type) would be a variable
            text = f"({type_name}){ending}"
        case SizeOf(inner):
            text, own = operand(inner, 0), _PREFIX
            is_type = isinstance(inner, Name) and is_type_name(inner.name)
            text = f"sizeof(({text}))" if is_type else f"sizeof({text})"
        case SizeOfType(type_name):
            text, own = f"sizeof({type_name})", _PREFIX
        case Dereference(Literal(value, type_name), 0, False):
            text = "@" + _literal(value, type_name)
        case Dereference(inner, offset, user):
            sign = "-" if offset < 0 else "+"
            text = f"{sign}{'u' * user}{abs(offset)}({operand(inner, 0)})"
        case AtSymbol(symbol, offset):
            text = f"@{symbol}{offset:+d}" if offset else f"@{symbol}"
    return f"({text})" if own < level else text


def _literal(value: int, type_name: str) -> str:
    digits = hex(value) if value > 9999 else str(value)
    for suffix in ("", "U", "L", "UL"):
        if literal_type(value, value <= 9999, "U" in suffix, "L" in suffix) == type_name:
            return digits + suffix
    return digits
