"""Evaluate the expressions of a probe definition at a stop.

Expressions are turned into closures once, when the probe is registered; a hit only calls them.
Integers follow C because drgn's objects do.
"""

import fnmatch
import re
from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

import drgn

from kgdbx.errors import MemoryFault, ProbeError, SymbolError
from kgdbx.probes import expression as syntax
from kgdbx.probes.operators import ARITHMETIC, COMPARISONS, UNARY, pointer, with_integers
from kgdbx.probes.value import AGGREGATES, MAX_STRING_BYTES, decode_text, underlying_type

__all__ = (
    "EXPRESSION_ERRORS",
    "Scope",
    "compile_condition",
    "compile_memory",
    "compile_object",
    "compile_string",
    "compile_text",
    "evaluate",
    "guarded",
    "locate",
    "read_string",
)

_T = TypeVar("_T")
_Value: TypeAlias = drgn.Object | str
_KERNEL_HALF = 1 << 63
_MASK = (1 << 64) - 1
_PAGE_BYTES = 4096
_SIZELESS = (drgn.TypeKind.VOID, drgn.TypeKind.FUNCTION)
EXPRESSION_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    drgn.OutOfBoundsError,
)
"""What drgn and Python raise for an expression that means nothing."""


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


def evaluate(expr: syntax.Expr, scope: Scope) -> drgn.Object | str:
    """Value of an expression: a string if :func:`~kgdbx.probes.expression.is_text`, else an object.

    Integers and pointers have been read; an aggregate is a reference.

    :raises MemoryFault: if memory cannot be read
    :raises SymbolError: if a name means nothing, or a variable was optimized out
    :raises ProbeError: if C does not allow it, such as a member of an integer
    """
    prepared = _compile(expr)

    def read(scope: Scope) -> drgn.Object | str:
        value = prepared(scope)
        if isinstance(value, str) or underlying_type(value.type_).kind in (*AGGREGATES, *_SIZELESS):
            return value
        return value.read_()

    return guarded(expr, read)(scope)


def compile_condition(expr: syntax.Expr) -> Callable[[Scope], bool]:
    """Prepare a condition; the function that is returned raises as :func:`evaluate` does."""
    return guarded(expr, _truth(expr))


def locate(expr: syntax.Expr, scope: Scope) -> tuple[int, int | None]:
    """Address and size of the memory that an expression stands for; for a data watch.

    A variable or member gives its own memory; a number or ``&x`` that which it points to.

    :return: guest-virtual address, and size in bytes or None if the type does not tell
    :raises: as :func:`evaluate`
    """

    def find(scope: Scope) -> tuple[int, int | None]:
        if isinstance(expr, syntax.AtSymbol | syntax.Dereference):
            return _address(expr)(scope), None
        value = _compile(expr)(scope)
        if isinstance(value, str):
            raise TypeError("a string has no memory")
        if value.address_ is not None:
            return value.address_, drgn.sizeof(value)
        type_ = underlying_type(value.type_)
        if type_.kind is not drgn.TypeKind.POINTER:
            return int(value) & _MASK, None
        is_sizeless = underlying_type(type_.type).kind in _SIZELESS
        return int(value), None if is_sizeless else drgn.sizeof(type_.type)

    return guarded(expr, find)(scope)


def guarded(expr: syntax.Expr, function: Callable[[Scope], _T]) -> Callable[[Scope], _T]:
    """Have a function that evaluates *expr* raise as :func:`evaluate` does.

    It is the border: no exception of drgn and no error in an operand leaves as itself.
    """

    def guarded(scope: Scope) -> _T:
        try:
            return function(scope)
        except drgn.FaultError as e:
            raise MemoryFault(e.address, 1) from e
        except drgn.ObjectAbsentError as e:
            text = syntax.format_expression(expr)
            raise SymbolError(f"'{text}' is optimized out here", symbol=text) from e
        except EXPRESSION_ERRORS as e:
            reason = e.args[0] if e.args else type(e).__name__
            raise ProbeError(f"cannot evaluate '{syntax.format_expression(expr)}': {reason}") from e

    return guarded


def _compile(expr: syntax.Expr) -> Callable[[Scope], _Value]:
    return compile_text(expr) if syntax.is_text(expr) else compile_object(expr)


def compile_object(expr: syntax.Expr) -> Callable[[Scope], drgn.Object]:
    """Prepare an expression that is no string."""
    match expr:
        case syntax.Literal(value, type_name):
            return _once(lambda program: drgn.Object(program, type_name, value))
        case syntax.SizeOfType(type_name):
            size = _once(lambda program: drgn.sizeof(program.type(type_name)))
            return lambda scope: _unsigned_long(scope, size(scope))
        case syntax.Name(name):
            return lambda scope: _lookup(scope, name)
        case syntax.Register(name):
            return lambda scope: _unsigned_long(scope, scope.register(name))
        case syntax.Special():
            return _special(expr)
        case syntax.Member(operand, name):
            base = compile_object(operand)
            return lambda scope: base(scope).member_(name)
        case syntax.Index(operand, index):
            base, number = compile_object(operand), compile_object(index)
            return lambda scope: base(scope)[number(scope)]
        case syntax.Cast(type_name, operand):
            base, to = compile_object(operand), _once(lambda program: program.type(type_name))
            return lambda scope: drgn.cast(to(scope), base(scope))
        case syntax.SizeOf(operand):
            base = compile_object(operand)
            return lambda scope: _unsigned_long(scope, drgn.sizeof(base(scope)))
        case syntax.Dereference() | syntax.AtSymbol():
            memory = compile_memory(expr, 8)
            return lambda scope: _unsigned_long(scope, int.from_bytes(memory(scope), "little"))
        case syntax.Ternary(condition, then, otherwise):
            test, first, second = _truth(condition), compile_object(then), compile_object(otherwise)
            return lambda scope: first(scope) if test(scope) else second(scope)
        case syntax.Unary(sign, operand) if sign != "!":
            base, change = compile_object(operand), UNARY[sign]
            return lambda scope: change(base(scope))
        case syntax.Binary(sign, left, right) if sign in ARITHMETIC:
            first, second, combine = compile_object(left), compile_object(right), ARITHMETIC[sign]
            if sign in "+-":
                return lambda scope: combine(first(scope), second(scope))
            return lambda scope: with_integers(combine, first(scope), second(scope))
        case syntax.Unary() | syntax.Binary():
            test = _truth(expr)
            return lambda scope: drgn.Object(scope.program, "int", int(test(scope)))
        case syntax.String():
            raise TypeError("a string is no object")


def _truth(expr: syntax.Expr) -> Callable[[Scope], bool]:
    match expr:
        case syntax.Unary("!", operand):
            test = _truth(operand)
            return lambda scope: not test(scope)
        case syntax.Binary("&&", left, right):
            before, after = _truth(left), _truth(right)
            return lambda scope: before(scope) and after(scope)
        case syntax.Binary("||", left, right):
            before, after = _truth(left), _truth(right)
            return lambda scope: before(scope) or after(scope)
        case syntax.Binary("~", left, syntax.String(pattern)):
            text, matches = compile_text(left), re.compile(fnmatch.translate(pattern)).match
            return lambda scope: matches(text(scope)) is not None
        case syntax.Binary(sign, left, right) if sign in COMPARISONS:
            compare = COMPARISONS[sign]
            if syntax.is_text(left) or syntax.is_text(right):
                one, other = compile_text(left), compile_text(right)
                return lambda scope: compare(one(scope), other(scope))
            first, second = compile_object(left), compile_object(right)
            return lambda scope: with_integers(compare, first(scope), second(scope))
    value = _compile(expr)
    return lambda scope: bool(value(scope))


def compile_text(expr: syntax.Expr) -> Callable[[Scope], str]:
    """Prepare an expression that is a string, or read as one."""
    match expr:
        case syntax.String(value):
            return lambda scope: value
        case syntax.Special("comm"):
            return _comm
        case syntax.Ternary(condition, then, otherwise) if syntax.is_text(expr):
            test, if_true, if_false = _truth(condition), compile_text(then), compile_text(otherwise)
            return lambda scope: if_true(scope) if test(scope) else if_false(scope)
    return compile_string(expr, user=False)


def _comm(scope: Scope) -> str:
    comm = scope.special("comm", None)
    return decode_text(comm.string_()) if isinstance(comm, drgn.Object) else str(comm)


def compile_string(expr: syntax.Expr, *, user: bool) -> Callable[[Scope], str]:
    """Prepare the string that an expression points to; *user*: in user memory in any case."""
    if isinstance(expr, syntax.Dereference | syntax.AtSymbol):
        address, user = _address(expr), user or (isinstance(expr, syntax.Dereference) and expr.user)
        return lambda scope: read_string(scope, address(scope), user)
    value = compile_object(expr)

    def read(scope: Scope) -> str:
        start = value(scope)
        if underlying_type(start.type_).kind is drgn.TypeKind.ARRAY:
            return decode_text(start.string_())
        return read_string(scope, int(start), user)

    return read


def _address(expr: syntax.Dereference | syntax.AtSymbol) -> Callable[[Scope], int]:
    offset = expr.offset_bytes
    if isinstance(expr, syntax.Dereference):
        base = compile_object(expr.operand)
        return lambda scope: (pointer(base(scope)) + offset) & _MASK
    symbol = expr.symbol
    return lambda scope: (pointer(scope.symbol(symbol).address_of_()) + offset) & _MASK


def compile_memory(expr: syntax.Expr, size_bytes: int) -> Callable[[Scope], bytes]:
    """Prepare the memory that an expression stands for or points to."""
    if isinstance(expr, syntax.Dereference | syntax.AtSymbol):
        address = _address(expr)
        if isinstance(expr, syntax.Dereference) and expr.user:
            return lambda scope: scope.read_user(address(scope), size_bytes)
        return lambda scope: scope.read_kernel(address(scope), size_bytes)
    value = compile_object(expr)

    def read(scope: Scope) -> bytes:
        place = value(scope)
        if place.address_ is None and underlying_type(place.type_).kind in AGGREGATES:
            whole: bytes = place.to_bytes_()  # held in registers
            return whole[:size_bytes]
        start = pointer(place)
        return (scope.read_kernel if start >= _KERNEL_HALF else scope.read_user)(start, size_bytes)

    return read


def read_string(scope: Scope, address: int, user: bool) -> str:
    """The string at an address: the current process's if *user* or if it is not the kernel's.

    :raises MemoryFault: if it cannot be read
    """
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


def _lookup(scope: Scope, name: str) -> drgn.Object:
    for find in (scope.variable, scope.symbol, scope.program.constant):
        try:
            return find(name)
        except LookupError:
            continue
    if name == "NULL":
        return drgn.NULL(scope.program, "void *")
    raise SymbolError(f"no variable, symbol or constant '{name}' here", symbol=name)


def _special(expr: syntax.Special) -> Callable[[Scope], drgn.Object]:
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


def _once(make: Callable[[drgn.Program], _T]) -> Callable[[Scope], _T]:
    # What depends on the program only is made at the first hit.
    made: list[tuple[drgn.Program, _T]] = []

    def get(scope: Scope) -> _T:
        program = scope.program
        if not made or made[0][0] is not program:
            made[:] = [(program, make(program))]
        return made[0][1]

    return get
