"""From expressions to C with the meaning that :mod:`kgdbx.probes.evaluate` gives them at a stop.

drgn decides what types there are: each operation is also done on a model, an object of the
operand's type, and has the type of what comes out.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import drgn

from kgdbx.probes import expression as syntax
from kgdbx.probes.operators import ARITHMETIC, COMPARISONS
from kgdbx.probes.value import underlying_type
from kgdbx.resident.compile.arithmetic import (
    arithmetic,
    compare,
    difference,
    refuse_choice,
    unify,
)
from kgdbx.resident.compile.code import Code
from kgdbx.resident.compile.names import Names
from kgdbx.resident.compile.text import matches, not_empty, same_text
from kgdbx.resident.compile.values import (
    MODEL_ADDRESS,
    NotResident,
    Place,
    Value,
    constant,
    convert,
    scalar_of,
    value_of,
)

__all__ = ("Lowering",)

_MASK = (1 << 64) - 1
_SIGNS: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
}
_ADDRESSES = (drgn.TypeKind.ARRAY, drgn.TypeKind.FUNCTION)


class Lowering:
    """Expressions at one point as C; their statements go to *code*.

    All of it raises :class:`~kgdbx.resident.compile.values.NotResident`, and what drgn raises for
    an operation that C does not have.
    """

    def __init__(self, names: Names, code: Code) -> None:
        self.names = names
        self.code = code
        self.program = names.program

    def operand(self, expr: syntax.Expr) -> Value | Place:
        """What an expression stands for; memory that it names has not been read."""
        match expr:
            case syntax.Literal(value, type_name):
                return constant(drgn.Object(self.program, type_name, value))
            case syntax.SizeOfType(type_name):
                return self._size(drgn.sizeof(self.program.type(type_name)))
            case syntax.SizeOf(operand):
                # Only its type counts; nothing of it is read.
                found = self.code.discard(lambda: self.operand(operand))
                return self._size(drgn.sizeof(found.model))
            case syntax.Name(name):
                return self.names.lookup(name, self.code)
            case syntax.Register(name):
                return self.names.register(name)
            case syntax.Special(name, index):
                return self.names.special(name, index, self.code)
            case syntax.Member(operand, name):
                return self._member(self.operand(operand), name)
            case syntax.Index(operand, index):
                return self._element(self.operand(operand), self.value(index))
            case syntax.Cast(type_name, operand):
                return self._cast(self.program.type(type_name), self._decayed(operand))
            case syntax.Dereference() | syntax.AtSymbol():
                return self.memory(expr)
            case syntax.Ternary(condition, then, otherwise):
                return self._choice(condition, then, otherwise)
            case syntax.Unary("*", operand):
                return self._element(self.operand(operand), None)
            case syntax.Unary("&", operand):
                return self._address_of(self.operand(operand))
            case syntax.Unary(sign, operand) if sign in _SIGNS:
                return self._signed(sign, self._decayed(operand))
            case syntax.Binary(sign, left, right) if sign in ARITHMETIC:
                return self._binary(sign, self._decayed(left), self._decayed(right))
            case syntax.Unary() | syntax.Binary():
                return value_of(drgn.Object(self.program, "int", 1), f"(s32)({self.truth(expr)})")
            case syntax.String():
                raise TypeError("a string is no object")

    def value(self, expr: syntax.Expr) -> Value:
        """An integer or a pointer, read if it is in memory."""
        return self.loaded(self.operand(expr))

    def loaded(self, found: Value | Place) -> Value:
        """The same, read if it is in memory."""
        if isinstance(found, Value):
            return found
        scalar = scalar_of(found.model)
        return value_of(found.model, self.code.load(found, scalar))

    def pointer(self, found: Value | Place) -> str:
        """What something points to, as u64: an aggregate or function stands for its address."""
        if isinstance(found, Place) and (
            found.kind in _ADDRESSES or found.kind in (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION)
        ):
            return found.address
        return f"(u64){self.loaded(found).text}"

    def memory(self, expr: syntax.Dereference | syntax.AtSymbol) -> Place:
        """The memory that is named by an address, an unsigned long there."""
        type_ = self.program.type("unsigned long")
        offset = expr.offset_bytes
        if isinstance(expr, syntax.AtSymbol):
            found = self.names.symbol(expr.symbol)
            return self.names.global_place(expr.symbol, found, type_, offset)
        base = self.operand(expr.operand)
        model = drgn.Object(self.program, type_, address=MODEL_ADDRESS)
        space = "user" if expr.user else "any"
        known = _known_address(base)
        return Place(model, self.pointer(base), offset, space=space, absolute=known)

    def target(self, expr: syntax.Expr) -> Place:
        """The memory that an expression leads to: for a field that is an array."""
        if isinstance(expr, syntax.Dereference | syntax.AtSymbol):
            return self.memory(expr)
        found = self.operand(expr)
        if isinstance(found, Place) and found.is_copy:
            return found
        if isinstance(found, Place) and underlying_type(found.model.type_).kind not in (
            drgn.TypeKind.INT,
            drgn.TypeKind.POINTER,
            drgn.TypeKind.ENUM,
            drgn.TypeKind.BOOL,
        ):
            return found
        model = drgn.Object(self.program, "unsigned long", address=MODEL_ADDRESS)
        return Place(model, self.pointer(found), absolute=_known_address(found))

    def truth(self, expr: syntax.Expr) -> str:
        """C expression that is 1 or 0."""
        match expr:
            case syntax.Unary("!", operand):
                return f"!({self.truth(operand)})"
            case syntax.Binary("&&" | "||" as sign, left, right):
                return self._either(sign, left, right)
            case syntax.Binary("~", left, syntax.String(pattern)):
                return matches(self, left, pattern)
            case syntax.Binary(sign, left, right) if sign in COMPARISONS:
                if syntax.is_text(left) or syntax.is_text(right):
                    equal = same_text(self, left, right)
                    return equal if sign == "==" else f"!({equal})"
                first, second = self._decayed(left), self._decayed(right)
                return compare(sign, first, second)
        if syntax.is_text(expr):
            return not_empty(self, expr)
        found = self._decayed(expr)
        bool(found.model)  # raises if it has none
        return f"({found.text} != 0)"

    def _size(self, size_bytes: int) -> Value:
        return constant(drgn.Object(self.program, "unsigned long", size_bytes))

    def _decayed(self, expr: syntax.Expr) -> Value:
        # An operand of C's operators: arrays and functions become their addresses. The model stays
        # what it was, so that drgn sees the true type.
        found = self.operand(expr)
        if isinstance(found, Place) and found.kind in _ADDRESSES:
            return Value(found.model, found.address)
        return self.loaded(found)

    def _member(self, base: Value | Place, name: str) -> Place:
        if isinstance(base, Place) and base.kind is drgn.TypeKind.POINTER:
            base = self.loaded(base)
        if isinstance(base, Value):
            model = drgn.Object(self.program, base.model.type_, MODEL_ADDRESS)
            found, start = model.member_(name), _pointed(base)
        else:
            found, start = base.model.member_(name), base
        return self._moved(start, found)

    def _moved(self, start: Place, found: drgn.Object) -> Place:
        # Found as a reference near MODEL_ADDRESS.
        assert found.address_ is not None
        model = drgn.Object(
            self.program,
            found.type_,
            address=MODEL_ADDRESS,
            bit_offset=found.bit_offset_,
            bit_field_size=found.bit_field_size_,
        )
        offset = found.address_ - MODEL_ADDRESS
        return replace(start, model=model, offset_bytes=start.offset_bytes + offset)

    def _element(self, base: Value | Place, index: Value | None) -> Place:
        if isinstance(base, Place) and base.kind is not drgn.TypeKind.ARRAY:
            base = self.loaded(base)
        if isinstance(base, Value):
            model = drgn.Object(self.program, base.model.type_, MODEL_ADDRESS)
            start = _pointed(base)
        else:
            model, start = base.model, base
        if index is None or index.is_constant:
            return self._moved(start, model[0 if index is None else index.model])
        if start.is_copy:
            raise NotResident("an array that was passed in registers takes constant indexes only")
        element = model[index.model]
        size = drgn.sizeof(element)
        model = drgn.Object(self.program, element.type_, address=MODEL_ADDRESS)
        text = f"{start.address} + (u64){index.text} * {size:#x}UL"
        return Place(model, self.code.variable("u64", text), space=start.space)

    def _address_of(self, found: Value | Place) -> Value:
        if isinstance(found, Value):
            raise ValueError("cannot take address of value")
        pointer = found.model.address_of_()
        known = _known_place(found)
        if known is not None:
            return constant(drgn.Object(self.program, pointer.type_, known))
        direct = found.direct.stop - found.offset_bytes if found.is_direct(1) else 0
        return value_of(pointer, found.address, direct_bytes=direct)

    def _cast(self, to: drgn.Type, found: Value) -> Value:
        model = drgn.cast(to, found.model)
        if found.is_constant:
            return constant(model)
        scalar = scalar_of(model)
        keep = underlying_type(to).kind is drgn.TypeKind.POINTER
        direct = found.direct_bytes if keep else 0
        return value_of(model, convert(found.text, scalar), direct_bytes=direct)

    def _signed(self, sign: str, found: Value) -> Value:
        refuse_choice(found)
        model = _SIGNS[sign](found.model)
        if found.is_constant:
            return constant(model)
        scalar = scalar_of(model)
        wide = f"({scalar.unsigned_type}){convert(found.text, scalar)}"
        text = {"-": f"0 - {wide}", "+": wide, "~": f"~{wide}"}[sign]
        return value_of(model, convert(text, scalar))

    def _binary(self, sign: str, left: Value, right: Value) -> Value:
        if sign == "-" and _is_address(left) and _is_address(right):
            return difference(self.code, left, right)
        return arithmetic(self.code, sign, left, right)

    def _either(self, sign: str, left: syntax.Expr, right: syntax.Expr) -> str:
        first = self.truth(left)
        second, lines = self.code.capture(lambda: self.truth(right))
        if not lines:
            return f"({first} {sign} {second})"
        result = self.code.variable("s32", first)
        self.code.line(f"if ({result}) {{" if sign == "&&" else f"if (!{result}) {{")
        self.code.lines += lines
        self.code.line(f"{result} = {second}; }}")
        return result

    def _choice(self, condition: syntax.Expr, then: syntax.Expr, otherwise: syntax.Expr) -> Value:
        test = self.truth(condition)
        first, before = self.code.capture(lambda: self._decayed(then))
        second, after = self.code.capture(lambda: self._decayed(otherwise))
        model = unify(first, second)
        if model is None:
            text = syntax.format_expression(syntax.Ternary(condition, then, otherwise))
            raise NotResident(f"'{text}' has values of two types")
        scalar = scalar_of(model)
        texts = convert(first.text, scalar), convert(second.text, scalar)
        if not before and not after:
            text = convert(f"{test} ? {texts[0]} : {texts[1]}", scalar)
        else:
            text = self.code.variable(scalar.c_type)
            self.code.line(f"if ({test}) {{")
            self.code.lines += before
            self.code.line(f"{text} = {texts[0]}; }} else {{")
            self.code.lines += after
            self.code.line(f"{text} = {texts[1]}; }}")
        return replace(value_of(model, text), choices=_choices(first, second))


def _choices(first: Value, second: Value) -> tuple[Value, ...]:
    nested = first.choices + second.choices
    if not nested and first.model.type_.type_name() == second.model.type_.type_name():
        return ()
    if not nested and not (_is_address(first) or _is_address(second)):
        promoted = [scalar_of(+each.model) for each in (first, second)]
        if promoted[0] == promoted[1]:
            return ()
    return (first, second, *nested)


def _pointed(pointer: Value) -> Place:
    # The type is that of the pointer: the caller gives it another one.
    absolute = int(pointer.model) if pointer.is_constant else None
    direct = range(pointer.direct_bytes)
    return Place(pointer.model, pointer.text, direct=direct, absolute=absolute)


def _is_address(value: Value) -> bool:
    return underlying_type(value.model.type_).kind in (drgn.TypeKind.POINTER, drgn.TypeKind.ARRAY)


def _known_place(found: Place) -> int | None:
    if found.absolute is None:
        return None
    return (found.absolute + found.offset_bytes) & _MASK


def _known_address(found: Value | Place) -> int | None:
    if isinstance(found, Value):
        return int(found.model) & _MASK if found.is_constant else None
    return _known_place(found) if found.kind in _ADDRESSES else None
