"""C's operators on objects of the kernel, as a stop evaluates them."""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import drgn

from kgdbx.probes.value import AGGREGATES, underlying_type

__all__ = ("ARITHMETIC", "COMPARISONS", "POINTERS", "UNARY", "pointer", "with_integers")

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
"""Whether two objects compare so."""

ARITHMETIC: dict[str, Callable[[drgn.Object, drgn.Object], drgn.Object]] = {
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
"""Binary operators with C's promotions, which are drgn's."""

UNARY: dict[str, Callable[[drgn.Object], drgn.Object]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
    "*": lambda value: value[0],
    "&": lambda value: value.address_of_(),
}
"""Prefix operators, but for ``!``."""

POINTERS = (drgn.TypeKind.POINTER, drgn.TypeKind.ARRAY, drgn.TypeKind.FUNCTION)
"""Types whose values are addresses where they are calculated with."""

_T = TypeVar("_T")
_MASK = (1 << 64) - 1


def with_integers(
    function: Callable[[drgn.Object, drgn.Object], _T], left: drgn.Object, right: drgn.Object
) -> _T:
    """Apply a binary operator; unlike in C, a pointer may be compared with an integer, masked, ...

    :raises TypeError: if an operand is neither
    """
    try:
        return function(left, right)
    except TypeError:
        return function(_integer(left), _integer(right))


def pointer(value: drgn.Object) -> int:
    """Where a value points to: aggregates and functions stand for their own address."""
    kind = underlying_type(value.type_).kind
    if kind in AGGREGATES or kind is drgn.TypeKind.FUNCTION:
        value = value.address_of_()
    return int(value) & _MASK


def _integer(value: drgn.Object) -> drgn.Object:
    if underlying_type(value.type_).kind not in POINTERS:
        return value
    return drgn.Object(value.prog_, "unsigned long", pointer(value))
