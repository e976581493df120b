"""Expressions of probe definitions: the syntax tree, its parser and its text.

The tree says what was written and nothing about how to get it: :mod:`kgdbx.probes.fetch`
evaluates it at a stop, a compiler turns it into C for probes inside the guest.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TypeAlias, cast

from kgdbx.probes.lexer import RESERVED, Scanner, is_type_name, literal_type

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
    "parse_expression",
    "read_expression",
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

_BINARY = {
    operator: level
    for level, operators in enumerate(
        ("||", "&&", "|", "^", "&", "== != ~", "< <= > >=", "<< >>", "+ -", "* / %"), start=1
    )
    for operator in operators.split()
}
_PREFIX, _POSTFIX = 11, 12
_TEXT_OPERATORS = frozenset(("==", "!=", "~", "&&", "||"))
_MAX_DEPTH = 50
_MAX_NODES = 200

_INFIX = re.compile(r"->|<<|>>|[<>=!]=|&&|\|\||[-+*/%&|^~<>?.\[]")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SYMBOL = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_SPECIAL = re.compile(r"\$([a-z]+(?:_[a-z]+)*)(\d*)(?!\w)", re.ASCII)
_DEREFERENCE = re.compile(r"([-+])(u?)(\d\w*)\(", re.ASCII)
_OFFSET = re.compile(r"([-+])(\d\w*)", re.ASCII)
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


def parse_expression(text: str) -> Expr:
    """Parse a text that is one expression.

    :raises DefinitionError: if it is not one
    """
    scanner = Scanner(text)
    expr = read_expression(scanner)
    if not scanner.at_end():
        raise scanner.expected("an operator or the end")
    return expr


def read_expression(scanner: Scanner) -> Expr:
    """Read the longest expression at the scanner's position, and go past it.

    :raises DefinitionError: if none starts there
    """
    return _Parser(scanner).expression()


class _Parser:
    # Precedence climbing; the levels are C's. Depth and size are bounded, so that no text can
    # exhaust Python's stack here or in those who walk the tree.

    def __init__(self, scanner: Scanner) -> None:
        self.scanner = scanner
        self.depth = self.nodes = 0

    def expression(self) -> Expr:
        condition = self.binary(1)
        column = self.scanner.skip_space()
        if not self.scanner.take_text("?"):
            return condition
        then = self.expression()
        self.scanner.expect(":")
        otherwise = self.expression()
        if is_text(then) != is_text(otherwise):
            raise self.scanner.error("'?:' has a string on one side only", column)
        return Ternary(condition, then, otherwise, column=column)

    def binary(self, level: int) -> Expr:
        left = self.prefix()
        while True:
            column = self.scanner.skip_space()
            match = self.scanner.peek(_INFIX)
            operator = match[0] if match else ""
            if _BINARY.get(operator, 0) < level:
                return left
            self.scanner.position += len(operator)
            right = self.binary(_BINARY[operator] + 1)
            if operator == "~" and not (isinstance(right, String)):
                raise self.scanner.error("'~' compares with a pattern in double quotes", column)
            if operator not in _TEXT_OPERATORS:
                self.refuse_text(operator, column, left, right)
            left = Binary(operator, left, right, column=column)

    def prefix(self) -> Expr:
        self.depth += 1
        self.count()
        expr = self.unary() or self.postfix(self.primary())
        self.depth -= 1
        return expr

    def count(self) -> None:
        self.nodes += 1
        if self.depth > _MAX_DEPTH or self.nodes > _MAX_NODES:
            raise self.scanner.error("the expression is too long")

    def unary(self) -> Expr | None:
        scanner = self.scanner
        column = scanner.skip_space()
        if scanner.peek(_DEREFERENCE):
            return None
        type_name = scanner.type_in_parentheses(cast=True)
        if type_name:
            operand = self.prefix()
            self.refuse_text("cast", column, operand)
            return Cast(type_name, operand, column=column)
        for operator in "-+!~*&":
            if scanner.take_text(operator):
                operand = self.prefix()
                if operator != "!":
                    self.refuse_text(operator, column, operand)
                return Unary(operator, operand, column=column)
        name = scanner.peek(_NAME)
        if name is None or name[0] != "sizeof":
            return None
        scanner.take(_NAME)
        scanner.skip_space()
        type_name = scanner.type_in_parentheses(cast=False)
        if type_name:
            return SizeOfType(type_name, column=column)
        operand = self.prefix()
        self.refuse_text("sizeof", column, operand)
        return SizeOf(operand, column=column)

    def postfix(self, operand: Expr) -> Expr:
        scanner = self.scanner
        while True:
            column = scanner.skip_space()
            arrow = scanner.take_text("->")
            if arrow or scanner.take_text("."):
                scanner.skip_space()
                name = scanner.take(_NAME)
                if name is None:
                    raise scanner.expected("the name of a member")
                self.count()
                self.refuse_text("->" if arrow else ".", column, operand)
                operand = Member(operand, name[0], arrow, column=column)
            elif scanner.take_text("["):
                self.count()
                index = self.expression()
                scanner.expect("]")
                self.refuse_text("[]", column, operand, index)
                operand = Index(operand, index, column=column)
            else:
                return operand

    def primary(self) -> Expr:
        scanner, column = self.scanner, self.scanner.position
        if match := scanner.take(_DEREFERENCE):
            operand = self.expression()
            scanner.expect(")")
            self.refuse_text("dereference", column, operand)
            return Dereference(
                operand, self.offset(match[1], match[3], column), bool(match[2]), column=column
            )
        if scanner.take_text("("):
            expr = self.expression()
            scanner.expect(")")
            return expr
        if scanner.take_text("@"):
            return self.at(column)
        if scanner.take_text("\\"):
            return self.immediate(column)
        if (number := scanner.number()) is not None:
            return Literal(*number, column=column)
        if (code := scanner.character()) is not None:
            return Literal(code, column=column)
        if (text := scanner.string()) is not None:
            return String(text, column=column)
        if (register := scanner.register()) is not None:
            return Register(register, column=column)
        if scanner.text.startswith("$", column, scanner.end):
            return self.special(column)
        name = scanner.peek(_NAME)
        if name is None or name[0] in RESERVED:
            raise scanner.expected("a variable, number, %register, $name or parentheses")
        scanner.take(_NAME)
        return Name(name[0], column=column)

    def special(self, column: int) -> Expr:
        match = self.scanner.take(_SPECIAL)
        name, digits = (match[1], match[2]) if match else ("", "")
        if name not in SPECIALS or (digits and name not in ("arg", "stack")):
            known = " ".join(f"${name}" for name in SPECIALS)
            raise self.scanner.error(f"expected one of {known}", column)
        if name == "arg" and not digits.strip("0"):
            raise self.scanner.error("expected $arg1, $arg2, ...", column)
        if len(digits) > 4:
            raise self.scanner.error(f"the number in '${name}{digits}' is too large", column)
        return Special(name, int(digits) if digits else None, column=column)

    def at(self, column: int) -> Expr:
        number = self.scanner.number()
        if number is not None:
            return Dereference(Literal(*number, column=column + 1), column=column)
        symbol = self.scanner.take(_SYMBOL)
        if symbol is None:
            raise self.scanner.expected("a symbol or an address")
        offset = self.scanner.take(_OFFSET)
        offset_bytes = self.offset(offset[1], offset[2], offset.start()) if offset else 0
        return AtSymbol(symbol[0], offset_bytes, column=column)

    def immediate(self, column: int) -> Expr:
        scanner = self.scanner
        text = scanner.string()
        if text is not None:
            return String(text, column=column)
        negative = scanner.take_text("-")
        if not negative:
            scanner.take_text("+")
        number = scanner.number()
        if number is None:
            raise scanner.expected("a number or a string")
        literal = Literal(*number, column=column)
        return Unary("-", literal, column=column) if negative else literal

    def offset(self, sign: str, digits: str, column: int) -> int:
        value = self.scanner.integer(digits, column + 1)
        if value >= 1 << 63:
            raise self.scanner.error("the offset does not fit into 63 bits", column)
        return -value if sign == "-" else value

    def refuse_text(self, what: str, column: int, *operands: Expr) -> None:
        if any(is_text(operand) for operand in operands):
            message = f"a string takes no '{what}'; compare it with ==, != or ~"
            raise self.scanner.error(message, column)


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
            own = _BINARY[operator]
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
