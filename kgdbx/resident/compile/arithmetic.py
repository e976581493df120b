"""C's operators on lowered integers and pointers, with drgn's results: they wrap, never trap."""

from collections.abc import Callable
from typing import Any, TypeVar

import drgn

from kgdbx.probes.operators import ARITHMETIC, COMPARISONS, POINTERS
from kgdbx.probes.value import underlying_type
from kgdbx.resident.compile.code import DIVISION_BY_ZERO, NEGATIVE_SHIFT, Code
from kgdbx.resident.compile.values import (
    NotResident,
    Scalar,
    Value,
    constant,
    convert,
    scalar_of,
    value_of,
)

__all__ = (
    "arithmetic",
    "compare",
    "difference",
    "refuse_choice",
    "unify",
)

_T = TypeVar("_T")


def arithmetic(code: Code, sign: str, left: Value, right: Value) -> Value:
    """``left sign right``.

    :raises TypeError: if C has no such operation on these types
    """
    refuse_choice(left, right)
    function = ARITHMETIC[sign]
    model, left, right = _combined(function, left, right, sign not in "+-")
    if left.is_constant and right.is_constant:
        return constant(model)
    if underlying_type(model.type_).kind is drgn.TypeKind.POINTER:
        return _moved_pointer(sign, model, left, right)
    scalar = scalar_of(model)
    if sign in ("<<", ">>"):
        return value_of(model, _shift(code, sign, scalar, left, right))
    if sign in "/%":
        return value_of(model, _divide(code, sign, scalar, left, right))
    kind = scalar.unsigned_type
    texts = [f"({kind}){convert(each.text, scalar)}" for each in (left, right)]
    return value_of(model, convert(f"{texts[0]} {sign} {texts[1]}", scalar))


def compare(sign: str, left: Value, right: Value) -> str:
    """C expression that is 1 or 0.

    :raises TypeError: if the types cannot be compared
    """
    _, left, right = _combined(COMPARISONS[sign], left, right, True)
    if _is_pointer(left) or _is_pointer(right):
        return f"({left.text} {sign} {right.text})"
    if left.choices or right.choices:
        _check_choices(left, right)
    scalar = scalar_of(left.model + right.model)
    return f"({convert(left.text, scalar)} {sign} {convert(right.text, scalar)})"


def difference(code: Code, left: Value, right: Value) -> Value:
    """``left - right`` of two pointers, in elements.

    :raises TypeError: if they point to different types
    """
    refuse_choice(left, right)
    model = left.model - right.model
    if left.is_constant and right.is_constant:
        return constant(model)
    size = _element_bytes(left)
    texts = [code.variable("u64", each.text) for each in (left, right)]
    ahead, behind = (f"({a} - {b}) / {size}" for a, b in (texts, texts[::-1]))
    text = f"(s64)({texts[0]} >= {texts[1]} ? {ahead} : 0 - {behind})"
    return value_of(model, text)


def unify(first: Value, second: Value) -> drgn.Object | None:
    """A model for what is either of two values; None if no C type holds both."""
    if _is_pointer(first) or _is_pointer(second):
        return _unify_pointers(first, second)
    one, other = +first.model, +second.model
    if scalar_of(one) == scalar_of(other):
        return one
    common = one + other
    scalar = scalar_of(common)
    return common if _fits(first, scalar) and _fits(second, scalar) else None


def refuse_choice(*operands: Value) -> None:
    """Refuse to calculate with what ``?:`` chose: at a stop the value keeps its own type.

    :raises NotResident: if that could make a difference
    """
    if any(each.choices for each in operands):
        raise NotResident("the result of '?:' is of two types; convert it with a cast")


def _check_choices(left: Value, right: Value) -> None:
    # Whatever was chosen, no comparison converts a number into another one.
    for one in (left, *left.choices):
        for other in (right, *right.choices):
            common = scalar_of(one.model + other.model)
            if not (_fits(one, common) and _fits(other, common)):
                refuse_choice(left, right)


def _fits(value: Value, scalar: Scalar) -> bool:
    if not value.is_constant:
        return scalar.holds(value.scalar)
    low = -(1 << (scalar.bits - 1)) if scalar.signed else 0
    return low <= int(value.model.value_()) < low + (1 << scalar.bits)


def _unify_pointers(first: Value, second: Value) -> drgn.Object | None:
    types = [each.model.type_ for each in (first, second)]
    if any(underlying_type(type_).kind is not drgn.TypeKind.POINTER for type_ in types):
        return None
    if types[0].type_name() == types[1].type_name():
        return first.model
    if underlying_type(underlying_type(types[1]).type).kind is drgn.TypeKind.VOID:
        return first.model
    return (
        second.model
        if underlying_type(underlying_type(types[0]).type).kind is drgn.TypeKind.VOID
        else None
    )


def _combined(
    function: Callable[[Any, Any], _T], left: Value, right: Value, mix: bool
) -> tuple[_T, Value, Value]:
    # Unlike C and drgn, a pointer may be compared, masked and so on with an integer.
    try:
        return function(left.model, right.model), left, right
    except TypeError:
        if not mix:
            raise
        left, right = _integer(left), _integer(right)
        return function(left.model, right.model), left, right


def _integer(value: Value) -> Value:
    if not _is_pointer(value):
        return value
    program = value.model.prog_
    if value.is_constant:
        return constant(drgn.Object(program, "unsigned long", int(value.model)))
    return value_of(drgn.Object(program, "unsigned long", 1), value.text)


def _is_pointer(value: Value) -> bool:
    return underlying_type(value.model.type_).kind in POINTERS


def _element_bytes(pointer: Value) -> int:
    element = underlying_type(pointer.model.type_).type
    return 1 if underlying_type(element).kind is drgn.TypeKind.VOID else drgn.sizeof(element)


def _moved_pointer(sign: str, model: drgn.Object, left: Value, right: Value) -> Value:
    pointer, number = (left, right) if _is_pointer(left) else (right, left)
    size = _element_bytes(pointer)
    return value_of(model, f"({pointer.text} {sign} (u64){number.text} * {size:#x}UL)")


def _shift(code: Code, sign: str, scalar: Scalar, left: Value, right: Value) -> str:
    # Shifting by more than the width gives what shifting bit by bit would.
    value, kind = convert(left.text, scalar), scalar.unsigned_type
    right = code.hold(right)
    if right.scalar.signed and not right.is_constant:
        code.fail_if(f"{right.text} < 0", NEGATIVE_SHIFT)
    count, most = f"(u64){right.text}", scalar.bits - 1
    if sign == ">>" and scalar.signed:
        return convert(f"{value} >> ({count} > {most} ? {most} : {count})", scalar)
    shifted = convert(f"({kind}){value} {sign} ({count} & {scalar.storage_bits - 1})", scalar)
    return f"({count} > {most} ? ({scalar.c_type})0 : {shifted})"


def _divide(code: Code, sign: str, scalar: Scalar, left: Value, right: Value) -> str:
    value = convert(left.text, scalar)
    if right.is_constant:
        by = convert(right.text, scalar)
        can_overflow = scalar.signed and int(right.model) == -1
    else:
        by = code.variable(scalar.c_type, convert(right.text, scalar))
        code.fail_if(f"!{by}", DIVISION_BY_ZERO)
        can_overflow = scalar.signed
    quotient = f"{value} {sign} {by}"
    if can_overflow:
        # The machine traps at the lowest number divided by -1.
        negated = f"0 - ({scalar.unsigned_type}){value}" if sign == "/" else "0"
        quotient = f"{by} == -1 ? {convert(negated, scalar)} : {convert(quotient, scalar)}"
    return convert(quotient, scalar)
