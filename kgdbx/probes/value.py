"""What a field of an event holds, and how it is made of an object of the kernel."""

from dataclasses import dataclass
from typing import TypeAlias

import drgn

__all__ = (
    "AGGREGATES",
    "FieldValue",
    "Hex",
    "KernelStack",
    "MAX_STRING_BYTES",
    "Unreadable",
    "decode_text",
    "plain_value",
    "underlying_type",
)

MAX_STRING_BYTES = 256
"""Longest string that is read; a longer one is cut there and ends in ``...``."""

AGGREGATES = (drgn.TypeKind.ARRAY, drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS)
"""Kinds of types whose values have parts."""

_CHARS = (drgn.PrimitiveType.C_CHAR, drgn.PrimitiveType.C_SIGNED_CHAR)


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


def plain_value(value: drgn.Object) -> FieldValue:
    """Value of a field without a type.

    :raises TypeError: if it cannot be shown, such as a floating-point number
    """
    underlying = underlying_type(value.type_)
    kind = underlying.kind
    if kind is drgn.TypeKind.POINTER:
        return Hex(int(value))
    if kind is drgn.TypeKind.FUNCTION:
        return Hex(int(value.address_ or 0))
    if kind is drgn.TypeKind.ARRAY:
        element = underlying_type(underlying.type)
        if element.primitive in _CHARS:
            return decode_text(value.string_())
        if element.primitive is drgn.PrimitiveType.C_UNSIGNED_CHAR:
            raw: bytes = value.to_bytes_()
            return raw
        return [plain_value(each) for each in value]
    if kind in AGGREGATES:
        text = value.format_(type_name=False, member_type_names=False, symbolize=False)
        return " ".join(text.split())
    if kind is drgn.TypeKind.FLOAT or kind is drgn.TypeKind.VOID:
        raise TypeError(f"a value of type '{value.type_.type_name()}' cannot be shown")
    number: int = value.value_()
    return int(number)


def decode_text(data: bytes) -> str:
    """Text of a string of the kernel; bytes that are not UTF-8 are shown as ``\\xff``."""
    return data.decode("utf-8", "backslashreplace")


def underlying_type(type_: drgn.Type) -> drgn.Type:
    """What a type is a typedef of; itself if it is none."""
    while type_.kind is drgn.TypeKind.TYPEDEF:
        type_ = type_.type
    return type_
