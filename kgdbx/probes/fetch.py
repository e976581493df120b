"""Evaluate the expressions of a probe definition at a stop.

Expressions and fields are turned into closures once, when the probe is registered; a hit only
calls them. Integers follow C because drgn's objects do.
"""

import fnmatch
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import drgn

from kgdbx.errors import MemoryFault, ProbeError, SymbolError
from kgdbx.probes.definition import STACK_DEPTH, FetchType, Field
from kgdbx.probes.expression import (
    AtSymbol,
    Binary,
    Cast,
    Dereference,
    Expr,
    Index,
    Literal,
    Member,
    Name,
    Register,
    SizeOf,
    SizeOfType,
    Special,
    String,
    Ternary,
    Unary,
    format_expression,
    is_text,
)

__all__ = (
    "FieldValue",
    "Hex",
    "KernelStack",
    "MAX_STRING_BYTES",
    "Scope",
    "Unreadable",
    "compile_condition",
    "compile_fields",
    "converter",
    "decode_text",
    "evaluate",
    "locate",
    "plain_value",
)

MAX_STRING_BYTES = 256
"""Longest string that is read; a longer one is cut there and ends in ``...``."""

_KERNEL_HALF = 1 << 63
_MASK = (1 << 64) - 1
_PAGE_BYTES = 4096


class Hex(int):
    """An integer to show in hexadecimal: an address, a register, a field of type ``xN``."""

    __slots__ = ()

    def __str__(self) -> str:
        return hex(self)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In place of a value that could not be had; the other fields of the hit are not affected.

    :ivar address: guest-virtual address that could not be read; None for another reason
    """

    address: int | None
    reason: str = "fault"

    def __str__(self) -> str:
        return f"({self.reason})"


class KernelStack(list["FieldValue"]):
    """Where the calls in progress are, innermost first: as ``symbol+0x0/0x2c``, or addresses."""


FieldValue: TypeAlias = "int | str | bytes | list[FieldValue] | Unreadable"


class Scope(Protocol):
    """Where a probe was hit: what the names in its expressions stand for."""

    @property
    def program(self) -> drgn.Program:
        """Types, constants and memory of the kernel."""

    def variable(self, name: str) -> drgn.Object:
        """A parameter or local variable.

        :raises LookupError: if none of this name is in scope
        """

    def symbol(self, name: str) -> drgn.Object:
        """A function or global variable, as a reference with its address.

        :raises LookupError: if the kernel has none of this name
        """

    def register(self, name: str) -> int:
        """Unsigned value of a register, by its name in ``struct pt_regs``."""

    def special(self, name: str, index: int | None) -> drgn.Object | int | str:
        """Value of ``$name`` or ``$nameN``; see :data:`~kgdbx.probes.expression.SPECIALS`."""

    def func(self) -> str:
        """Name of the probed function."""

    def kstack(self, depth: int) -> list[str]:
        """The innermost *depth* frames of the kernel's stack, as symbols with offsets."""

    def read_kernel(self, address: int, size_bytes: int) -> bytes:
        """Read at a guest-virtual address.

        :raises MemoryFault: if it cannot be read
        """

    def read_user(self, address: int, size_bytes: int) -> bytes:
        """Read at an address of the current process.

        :raises MemoryFault: if it cannot be read
        """


def evaluate(expr: Expr, scope: Scope) -> drgn.Object | str:
    """Value of an expression: a string if :func:`~kgdbx.probes.expression.is_text`, else an object.

    Integers and pointers have been read; an aggregate is a reference.

    :raises MemoryFault: if memory cannot be read
    :raises SymbolError: if a name means nothing, or a variable was optimized out
    :raises ProbeError: if C does not allow it, such as a member of an integer
    """
    prepared = _compile(expr)

    def read(scope: Scope) -> drgn.Object | str:
        value = prepared(scope)
        if isinstance(value, str) or _resolve(value.type_)[0] in (*_AGGREGATES, *_SIZELESS):
            return value
        return value.read_()

    return _guarded(expr, read)(scope)


def compile_condition(expr: Expr) -> Callable[[Scope], bool]:
    """Prepare a condition; the function that is returned raises as :func:`evaluate` does."""
    return _guarded(expr, _truth(expr))


def compile_fields(fields: Sequence[Field]) -> Callable[[Scope], dict[str, FieldValue]]:
    """Prepare fields; the function that is returned gives the value of each by its name.

    A field that fails is :class:`Unreadable`. ``$vars`` and ``$params`` have to be expanded
    before, see :func:`~kgdbx.probes.definition.expand_fields`.
    """
    fetchers = [(each.name, _guarded(each.expression, _fetcher(each))) for each in fields]

    def fetch(scope: Scope) -> dict[str, FieldValue]:
        values: dict[str, FieldValue] = {}
        for name, fetcher in fetchers:
            try:
                values[name] = fetcher(scope)
            except MemoryFault as e:
                values[name] = Unreadable(e.address)
            except (SymbolError, ProbeError) as e:
                values[name] = Unreadable(None, str(e))
        return values

    return fetch


def locate(expr: Expr, scope: Scope) -> tuple[int, int | None]:
    """Address and size of the memory that an expression stands for; for a data watch.

    A variable or member gives its own memory; a number or ``&x`` that which it points to.

    :return: guest-virtual address, and size in bytes or None if the type does not tell
    :raises: as :func:`evaluate`
    """

    def find(scope: Scope) -> tuple[int, int | None]:
        if isinstance(expr, AtSymbol | Dereference):
            return _address(expr)(scope), None
        value = _compile(expr)(scope)
        if isinstance(value, str):
            raise TypeError("a string has no memory")
        if value.address_ is not None:
            return value.address_, drgn.sizeof(value)
        kind, underlying = _resolve(value.type_)
        if kind is not drgn.TypeKind.POINTER:
            return int(value) & _MASK, None
        target = underlying.type
        return int(value), None if _resolve(target)[0] in _SIZELESS else drgn.sizeof(target)

    return _guarded(expr, find)(scope)


_T = TypeVar("_T")
_Value: TypeAlias = drgn.Object | str
_SIZELESS = (drgn.TypeKind.VOID, drgn.TypeKind.FUNCTION)
_AGGREGATES = (drgn.TypeKind.ARRAY, drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS)
_POINTERS = (drgn.TypeKind.POINTER, drgn.TypeKind.ARRAY, drgn.TypeKind.FUNCTION)
_CHARS = (drgn.PrimitiveType.C_CHAR, drgn.PrimitiveType.C_SIGNED_CHAR)
_FOREIGN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    drgn.OutOfBoundsError,
)
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ARITHMETIC: dict[str, Callable[[drgn.Object, drgn.Object], drgn.Object]] = {
    "|": operator.or_,
    "^": operator.xor,
    "&": operator.and_,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
}
_UNARY: dict[str, Callable[[drgn.Object], drgn.Object]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
    "*": lambda value: value[0],
    "&": lambda value: value.address_of_(),
}


def _guarded(expr: Expr, function: Callable[[Scope], _T]) -> Callable[[Scope], _T]:
    # The border: no exception of drgn and no error in an operand leaves as itself.
    def guarded(scope: Scope) -> _T:
        try:
            return function(scope)
        except drgn.FaultError as e:
            raise MemoryFault(e.address, 1) from e
        except drgn.ObjectAbsentError as e:
            text = format_expression(expr)
            raise SymbolError(f"'{text}' is optimized out here", symbol=text) from e
        except _FOREIGN as e:
            reason = e.args[0] if e.args else type(e).__name__
            raise ProbeError(f"cannot evaluate '{format_expression(expr)}': {reason}") from e

    return guarded


def _compile(expr: Expr) -> Callable[[Scope], _Value]:
    return _text(expr) if is_text(expr) else _object(expr)


def _object(expr: Expr) -> Callable[[Scope], drgn.Object]:
    match expr:
        case Literal(value, type_name):
            return _once(lambda program: drgn.Object(program, type_name, value))
        case SizeOfType(type_name):
            size = _once(lambda program: drgn.sizeof(program.type(type_name)))
            return lambda scope: _unsigned_long(scope, size(scope))
        case Name(name):
            return lambda scope: _lookup(scope, name)
        case Register(name):
            return lambda scope: _unsigned_long(scope, scope.register(name))
        case Special():
            return _special(expr)
        case Member(operand, name):
            base = _object(operand)
            return lambda scope: base(scope).member_(name)
        case Index(operand, index):
            base, number = _object(operand), _object(index)
            return lambda scope: base(scope)[number(scope)]
        case Cast(type_name, operand):
            base, to = _object(operand), _once(lambda program: program.type(type_name))
            return lambda scope: drgn.cast(to(scope), base(scope))
        case SizeOf(operand):
            base = _object(operand)
            return lambda scope: _unsigned_long(scope, drgn.sizeof(base(scope)))
        case Dereference() | AtSymbol():
            memory = _memory(expr, 8)
            return lambda scope: _unsigned_long(scope, int.from_bytes(memory(scope), "little"))
        case Ternary(condition, then, otherwise):
            test, if_true, if_false = _truth(condition), _object(then), _object(otherwise)
            return lambda scope: if_true(scope) if test(scope) else if_false(scope)
        case Unary(sign, operand) if sign != "!":
            base, change = _object(operand), _UNARY[sign]
            return lambda scope: change(base(scope))
        case Binary(sign, left, right) if sign in _ARITHMETIC:
            first, second, combine = _object(left), _object(right), _ARITHMETIC[sign]
            if sign in "+-":
                return lambda scope: combine(first(scope), second(scope))
            return lambda scope: _with_integers(combine, first(scope), second(scope))
        case Unary() | Binary():
            test = _truth(expr)
            return lambda scope: drgn.Object(scope.program, "int", int(test(scope)))
        case String():
            raise TypeError("a string is no object")


def _truth(expr: Expr) -> Callable[[Scope], bool]:
    match expr:
        case Unary("!", operand):
            test = _truth(operand)
            return lambda scope: not test(scope)
        case Binary("&&", left, right):
            before, after = _truth(left), _truth(right)
            return lambda scope: before(scope) and after(scope)
        case Binary("||", left, right):
            before, after = _truth(left), _truth(right)
            return lambda scope: before(scope) or after(scope)
        case Binary("~", left, String(pattern)):
            text, matches = _text(left), re.compile(fnmatch.translate(pattern)).match
            return lambda scope: matches(text(scope)) is not None
        case Binary(sign, left, right) if sign in _COMPARISONS:
            compare = _COMPARISONS[sign]
            if is_text(left) or is_text(right):
                one, other = _text(left), _text(right)
                return lambda scope: compare(one(scope), other(scope))
            first, second = _object(left), _object(right)
            return lambda scope: _with_integers(compare, first(scope), second(scope))
    value = _compile(expr)
    return lambda scope: bool(value(scope))


def _text(expr: Expr) -> Callable[[Scope], str]:
    match expr:
        case String(value):
            return lambda scope: value
        case Special("comm"):
            return _comm
        case Ternary(condition, then, otherwise) if is_text(expr):
            test, if_true, if_false = _truth(condition), _text(then), _text(otherwise)
            return lambda scope: if_true(scope) if test(scope) else if_false(scope)
    return _string(expr, user=False)


def _comm(scope: Scope) -> str:
    comm = scope.special("comm", None)
    return decode_text(comm.string_()) if isinstance(comm, drgn.Object) else str(comm)


def _string(expr: Expr, *, user: bool) -> Callable[[Scope], str]:
    if isinstance(expr, Dereference | AtSymbol):
        address, user = _address(expr), user or (isinstance(expr, Dereference) and expr.user)
        return lambda scope: _read_string(scope, address(scope), user)
    value = _object(expr)

    def read(scope: Scope) -> str:
        pointer = value(scope)
        if _resolve(pointer.type_)[0] is drgn.TypeKind.ARRAY:
            return decode_text(pointer.string_())
        return _read_string(scope, int(pointer), user)

    return read


def _fetcher(each: Field) -> Callable[[Scope], FieldValue]:
    expr, to = each.expression, each.type
    if isinstance(expr, Special) and expr.name == "kstack":
        depth = to.count if to and to.count else STACK_DEPTH
        return lambda scope: KernelStack(scope.kstack(depth))
    if isinstance(expr, Special) and expr.name == "func":
        return lambda scope: scope.func()
    if to is None:
        return _untyped(expr)
    if is_text(expr):
        return _text(expr)
    user = to.base == "ustring" or (isinstance(expr, Dereference) and expr.user)
    if to.is_string and to.count is None:
        return _string(expr, user=user)
    convert = converter(to, user)
    if to.count is not None:
        size, memory = to.size_bytes, _memory(expr, to.size_bytes * to.count)

        def elements(scope: Scope) -> FieldValue:
            data = memory(scope)
            chunks = (data[at : at + size] for at in range(0, len(data), size))
            return [convert(scope, int.from_bytes(chunk, "little")) for chunk in chunks]

        return elements
    if isinstance(expr, Dereference | AtSymbol):
        memory = _memory(expr, to.size_bytes)
        return lambda scope: convert(scope, int.from_bytes(memory(scope), "little"))
    value = _object(expr)
    return lambda scope: convert(scope, int(value(scope)))


def converter(to: FetchType, user: bool = False) -> Callable[[Scope, int], FieldValue]:
    """A function that makes the value of a typed field of the number that was read for it.

    :param user: a string is in user memory, wherever its address points
    """
    bits = 8 * to.size_bytes
    mask, sign = (1 << bits) - 1, 1 << (bits - 1)
    match to.base:
        case "s":
            return lambda scope, value: ((value & mask) ^ sign) - sign
        case "x":
            return lambda scope, value: Hex(value & mask)
        case "b":
            mask = (1 << to.bit_width) - 1
            return lambda scope, value: (value >> to.bit_offset) & mask
        case "char":
            return lambda scope, value: chr(value & mask)
        case "symbol":
            return lambda scope, value: _symbol_name(scope, value & mask)
        case "string" | "ustring":
            return lambda scope, value: _read_string(scope, value, user)
    return lambda scope, value: value & mask


def _untyped(expr: Expr) -> Callable[[Scope], FieldValue]:
    if is_text(expr):
        return _text(expr)
    value = _object(expr)
    if isinstance(expr, Register | Dereference | AtSymbol) or (
        isinstance(expr, Special) and expr.name == "stack"
    ):
        return lambda scope: Hex(int(value(scope)))
    return lambda scope: plain_value(value(scope))


def plain_value(value: drgn.Object) -> FieldValue:
    """Value of a field without a type.

    :raises TypeError: if it cannot be shown, such as a floating-point number
    """
    kind, underlying = _resolve(value.type_)
    if kind is drgn.TypeKind.POINTER:
        return Hex(int(value))
    if kind is drgn.TypeKind.FUNCTION:
        return Hex(int(value.address_ or 0))
    if kind is drgn.TypeKind.ARRAY:
        element = _resolve(underlying.type)[1]
        if element.primitive in _CHARS:
            return decode_text(value.string_())
        if element.primitive is drgn.PrimitiveType.C_UNSIGNED_CHAR:
            raw: bytes = value.to_bytes_()
            return raw
        return [plain_value(each) for each in value]
    if kind in _AGGREGATES:
        text = value.format_(type_name=False, member_type_names=False, symbolize=False)
        return " ".join(text.split())
    if kind is drgn.TypeKind.FLOAT or kind is drgn.TypeKind.VOID:
        raise TypeError(f"a value of type '{value.type_.type_name()}' cannot be shown")
    number: int = value.value_()
    return int(number)


def _address(expr: Dereference | AtSymbol) -> Callable[[Scope], int]:
    offset = expr.offset_bytes
    if isinstance(expr, Dereference):
        base = _object(expr.operand)
        return lambda scope: (_pointer(base(scope)) + offset) & _MASK
    symbol = expr.symbol
    return lambda scope: (_pointer(scope.symbol(symbol).address_of_()) + offset) & _MASK


def _memory(expr: Expr, size_bytes: int) -> Callable[[Scope], bytes]:
    if isinstance(expr, Dereference | AtSymbol):
        address = _address(expr)
        if isinstance(expr, Dereference) and expr.user:
            return lambda scope: scope.read_user(address(scope), size_bytes)
        return lambda scope: scope.read_kernel(address(scope), size_bytes)
    value = _object(expr)

    def read(scope: Scope) -> bytes:
        place = value(scope)
        if place.address_ is None and _resolve(place.type_)[0] in _AGGREGATES:
            whole: bytes = place.to_bytes_()  # held in registers
            return whole[:size_bytes]
        start = _pointer(place)
        return (scope.read_kernel if start >= _KERNEL_HALF else scope.read_user)(start, size_bytes)

    return read


def _pointer(value: drgn.Object) -> int:
    # What a value points to: aggregates and functions stand for their own address.
    kind = _resolve(value.type_)[0]
    if kind in _AGGREGATES or kind is drgn.TypeKind.FUNCTION:
        value = value.address_of_()
    return int(value) & _MASK


def _read_string(scope: Scope, address: int, user: bool) -> str:
    address &= _MASK
    read = scope.read_user if user or address < _KERNEL_HALF else scope.read_kernel
    data = b""
    while len(data) < MAX_STRING_BYTES:
        at = address + len(data)
        chunk = read(at, min(MAX_STRING_BYTES - len(data), _PAGE_BYTES - at % _PAGE_BYTES))
        text, end, _ = chunk.partition(b"\0")
        data += text
        if end:
            return decode_text(data)
    return decode_text(data) + "..."


def decode_text(data: bytes) -> str:
    """Text of a string of the kernel; bytes that are not UTF-8 are shown as ``\\xff``."""
    return data.decode("utf-8", "backslashreplace")


def _symbol_name(scope: Scope, address: int) -> str:
    try:
        symbol = scope.program.symbol(address)
    except LookupError:
        return hex(address)
    return f"{symbol.name}+{address - symbol.address:#x}/{symbol.size:#x}"


def _lookup(scope: Scope, name: str) -> drgn.Object:
    for find in (scope.variable, scope.symbol, scope.program.constant):
        try:
            return find(name)
        except LookupError:
            continue
    if name == "NULL":
        return drgn.NULL(scope.program, "void *")
    raise SymbolError(f"no variable, symbol or constant '{name}' here", symbol=name)


def _special(expr: Special) -> Callable[[Scope], drgn.Object]:
    name, index = expr.name, expr.index
    is_word = name in ("arg", "stack")

    def value(scope: Scope) -> drgn.Object:
        found = scope.special(name, index)
        if isinstance(found, drgn.Object):
            return found
        if isinstance(found, str):
            raise TypeError(f"${name} is a string")
        return _unsigned_long(scope, found) if is_word else drgn.Object(scope.program, value=found)

    return value


def _unsigned_long(scope: Scope, value: int) -> drgn.Object:
    return drgn.Object(scope.program, "unsigned long", value)


def _with_integers(
    function: Callable[[drgn.Object, drgn.Object], _T], left: drgn.Object, right: drgn.Object
) -> _T:
    # Unlike C and drgn, a pointer may be compared, masked and so on with an integer.
    try:
        return function(left, right)
    except TypeError:
        return function(_integer(left), _integer(right))


def _integer(value: drgn.Object) -> drgn.Object:
    if _resolve(value.type_)[0] not in _POINTERS:
        return value
    return drgn.Object(value.prog_, "unsigned long", _pointer(value))


def _resolve(type_: drgn.Type) -> tuple[drgn.TypeKind, drgn.Type]:
    while type_.kind is drgn.TypeKind.TYPEDEF:
        type_ = type_.type
    return type_.kind, type_


def _once(make: Callable[[drgn.Program], _T]) -> Callable[[Scope], _T]:
    # What depends on the program only is made at the first hit.
    made: list[tuple[drgn.Program, _T]] = []

    def get(scope: Scope) -> _T:
        program = scope.program
        if not made or made[0][0] is not program:
            made[:] = [(program, make(program))]
        return made[0][1]

    return get
