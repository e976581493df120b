"""Where a C function finds its parameters when it is entered.

Source: System V Application Binary Interface, AMD64 Architecture Processor Supplement, section
3.2.3 ("Parameter Passing"), as far as kernel code uses it: the kernel is built without SSE.

.. warning::
    A compiler may give a static function another convention; gcc then adds ``.isra``,
    ``.constprop`` or ``.part`` to its name. Debug info's location lists tell, this file cannot.
"""

import dataclasses
import enum
from collections.abc import Iterable

from kgdbx.arch.registers import ARGUMENT_REGISTERS

__all__ = ("Location", "Parameter", "ParameterKind", "locate_parameters")


class ParameterKind(enum.Enum):
    """How the ABI looks at a parameter's type."""

    INTEGER = "integer"  # integers of up to 16 bytes, enumerations, booleans, pointers
    STRUCT = "struct"  # structures and unions whose members are all of these
    FLOAT = "float"  # anything that would be in a vector register
    MEMORY = "memory"  # packed with unaligned members, long double: always on the stack


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """What the ABI has to know about a parameter's type.

    :ivar size_bytes: ``sizeof`` the type
    :ivar alignment_bytes: ``_Alignof`` the type; above 8 for ``__int128`` and aligned structures
    """

    size_bytes: int
    kind: ParameterKind = ParameterKind.INTEGER
    alignment_bytes: int = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """Where a parameter is at the function's first instruction: in registers or on the stack.

    Bits beyond the parameter's size are garbage, in registers and on the stack alike.

    :ivar registers: lowest eight bytes first; empty on the stack
    :ivar stack_offset_bytes: distance from ``rsp``, which points to the return address; None in
        registers
    """

    registers: tuple[str, ...] = ()
    stack_offset_bytes: int | None = None


# The first parameter on the stack lies above the return address.
_FIRST_STACK_OFFSET = 8


def locate_parameters(
    parameters: Iterable[Parameter], *, returns_memory: bool = False
) -> list[Location | None]:
    """Where each parameter is at the function's first instruction.

    :param returns_memory: the function returns a structure of more than 16 bytes, so that ``rdi``
        holds the address of the room for it
    :return: one entry a parameter: None for one that is in a vector register or has no size
    """
    free = list(ARGUMENT_REGISTERS[returns_memory:])
    stack_offset = _FIRST_STACK_OFFSET
    locations: list[Location | None] = []
    for parameter in parameters:
        if parameter.kind is ParameterKind.FLOAT or parameter.size_bytes == 0:
            locations.append(None)
            continue
        words = -(-parameter.size_bytes // 8)
        # All of it in registers or none of it; later ones may still take what is left.
        if parameter.kind is not ParameterKind.MEMORY and words <= min(2, len(free)):
            locations.append(Location(registers=tuple(free[:words])))
            del free[:words]
            continue
        alignment = max(8, parameter.alignment_bytes)
        # Aligned as seen from above the return address.
        stack_offset += -(stack_offset - _FIRST_STACK_OFFSET) % alignment
        locations.append(Location(stack_offset_bytes=stack_offset))
        stack_offset += 8 * words
    return locations
