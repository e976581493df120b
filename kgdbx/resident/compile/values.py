"""What an expression becomes in C: an integer, or a place in memory, each with its drgn type."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import drgn

from kgdbx.errors import KgdbxError, ProbeError, SymbolError
from kgdbx.probes.evaluate import EXPRESSION_ERRORS
from kgdbx.probes.expression import Expr, format_expression
from kgdbx.probes.value import underlying_type

__all__ = (
    "MODEL_ADDRESS",
    "NotResident",
    "Place",
    "Scalar",
    "Value",
    "constant",
    "convert",
    "foreign_errors",
    "place_of",
    "scalar_of",
    "value_of",
)

MODEL_ADDRESS = 1 << 40
"""Where the reference objects that stand for types lie; their memory is never read."""

_MASK = (1 << 64) - 1
_FOREIGN = (*EXPRESSION_ERRORS, drgn.FaultError, drgn.ObjectAbsentError)


class NotResident(KgdbxError):
    """Why a definition must run on the stop tier."""


@contextlib.contextmanager
def foreign_errors(expr: Expr) -> Iterator[None]:
    """While the block lowers an expression: what drgn or the kernel's names have against it.

    :raises NotResident: in place of that
    """
    try:
        yield
    except (*_FOREIGN, SymbolError, ProbeError) as e:
        reason = e.args[0] if e.args else type(e).__name__
        raise NotResident(f"cannot evaluate '{format_expression(expr)}': {reason}") from e


@dataclass(frozen=True, slots=True)
class Scalar:
    """How a machine looks at an integer, a boolean, an enumeration or a pointer.

    :ivar bits: 1 to 64; other than 8, 16, 32 and 64 for a bit field
    """

    bits: int
    signed: bool
    boolean: bool = False

    @property
    def storage_bits(self) -> int:
        """Size in bits of the C type that holds it."""
        return next(bits for bits in (8, 16, 32, 64) if bits >= self.bits)

    @property
    def size_bytes(self) -> int:
        """Size in bytes of the C type that holds it."""
        return self.storage_bits // 8

    @property
    def unsigned_type(self) -> str:
        """The unsigned C type of the same size."""
        return f"u{self.storage_bits}"

    @property
    def c_type(self) -> str:
        """The C type that holds it."""
        return f"{'s' if self.signed else 'u'}{self.storage_bits}"

    def holds(self, other: "Scalar") -> bool:
        """Whether every value of another one is a value of this one."""
        if self.signed == other.signed:
            return self.bits >= other.bits
        return self.signed and self.bits > other.bits


@dataclass(frozen=True, slots=True)
class Value:
    """An integer or a pointer.

    :ivar model: an object of its type; its very value if *is_constant*
    :ivar text: a C expression without side effects, of the C type of its :class:`Scalar`
    :ivar direct_bytes: how much a pointer leads to that can be read without a fault
    :ivar choices: what ``?:`` chose from, if that is values of different types
    """

    model: drgn.Object
    text: str
    is_constant: bool = False
    direct_bytes: int = 0
    choices: tuple["Value", ...] = ()

    @property
    def scalar(self) -> Scalar:
        """Its representation."""
        return scalar_of(self.model)


@dataclass(frozen=True, slots=True)
class Place:
    """Something in memory, which has not been read.

    :ivar model: a reference of its type at :data:`MODEL_ADDRESS`
    :ivar base: C expression of an address, integer or pointer
    :ivar offset_bytes: from *base*
    :ivar direct: range of offsets from *base* that can be read without a fault
    :ivar space: ``kernel``, ``user``, or ``any`` if the address tells
    :ivar absolute: value of *base* if it is known
    :ivar is_copy: it was in registers, and has no address in the kernel
    """

    model: drgn.Object
    base: str
    offset_bytes: int = 0
    direct: range = range(0)
    space: str = "any"
    absolute: int | None = None
    is_copy: bool = False

    @property
    def kind(self) -> drgn.TypeKind:
        """Kind of its type, typedefs resolved."""
        return underlying_type(self.model.type_).kind

    @property
    def address(self) -> str:
        """C expression of type u64.

        :raises TypeError: if it has none
        """
        if self.is_copy:
            raise TypeError("what is passed in registers has no address")
        if self.absolute is not None:
            return f"{(self.absolute + self.offset_bytes) & _MASK:#x}UL"
        if self.offset_bytes:
            return f"((u64)({self.base}) + {self.offset_bytes & _MASK:#x}UL)"
        return f"(u64)({self.base})"

    def is_direct(self, size_bytes: int) -> bool:
        """Whether its first bytes can be read without a fault."""
        at = self.offset_bytes
        return self.direct.start <= at and at + size_bytes <= self.direct.stop


def scalar_of(model: drgn.Object) -> Scalar:
    """Representation of an object.

    :raises NotResident: if it does not fit into a register
    """
    type_ = underlying_type(model.type_)
    if type_.kind is drgn.TypeKind.ENUM and type_.type is not None:
        type_ = underlying_type(type_.type)
    if type_.kind is drgn.TypeKind.POINTER:
        return Scalar(64, False)
    if type_.kind in (drgn.TypeKind.INT, drgn.TypeKind.BOOL):
        bits = model.bit_field_size_ or 8 * type_.size
        if bits <= 64:
            boolean = type_.kind is drgn.TypeKind.BOOL
            return Scalar(bits, not boolean and type_.is_signed, boolean)
    raise NotResident(f"a value of type '{model.type_.type_name()}' does not fit into a register")


def convert(text: str, to: Scalar) -> str:
    """A C expression converted as C converts integers."""
    if to.boolean:
        return f"(u8)(({text}) != 0)"
    spare = to.storage_bits - to.bits
    if not spare:
        return f"({to.c_type})({text})"
    shifted = f"({to.unsigned_type})({text}) << {spare}"
    return f"(({to.c_type})({shifted}) >> {spare})"


def value_of(model: drgn.Object, text: str, *, direct_bytes: int = 0) -> Value:
    """A value that is only known when the probe is hit.

    :param model: any object of its type
    """
    # Its number means nothing, but operations on it must not fail: no zero to divide by.
    one = drgn.Object(model.prog_, model.type_, 1, bit_field_size=model.bit_field_size_)
    return Value(one, text, direct_bytes=direct_bytes)


def constant(value: drgn.Object) -> Value:
    """A value that is known now."""
    scalar = scalar_of(value)
    number = int(value.value_()) & ((1 << scalar.storage_bits) - 1)
    return Value(value, f"(({scalar.c_type}){number:#x}UL)", is_constant=True)


def place_of(program: drgn.Program, type_: drgn.Type, base: str, *, direct_bytes: int = 0) -> Place:
    """A place of a type at an address."""
    model = drgn.Object(program, type_, address=MODEL_ADDRESS)
    return Place(model, base, direct=range(direct_bytes))
