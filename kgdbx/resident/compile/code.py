"""C statements in the making: temporaries, reads that may fail, and what happens then."""

from collections.abc import Callable
from typing import TypeVar

from kgdbx.resident.compile.values import Place, Scalar, Value

__all__ = ("Code", "DIVISION_BY_ZERO", "FAILURES", "NEGATIVE_SHIFT", "peek")

DIVISION_BY_ZERO, NEGATIVE_SHIFT = 0xD1ED0000_00000001, 0xD1ED0000_00000002
FAILURES = {
    DIVISION_BY_ZERO: "division by zero",
    NEGATIVE_SHIFT: "negative shift count",
}
"""What a failed field keeps in place of an address, for other reasons than memory.

These addresses are not canonical, so that no pointer to memory is one of them.
"""

_KERNEL_HALF = 1 << 63
_MAX_INLINE_BYTES = 64
_WORDS = (1, 2, 4, 8)

_T = TypeVar("_T")


class Code:
    """Statements of one C function, or of one field in it.

    ``at`` is a variable of theirs: the address that is read, for the one who reports a failure.

    :param failure: the statement to run when a read fails, such as ``return -1``
    :param reports: whether it uses ``at``
    """

    def __init__(self, failure: str, *, reports: bool = True) -> None:
        self.lines: list[str] = []
        self.can_fail = False
        self.calls_kernel = False
        self._failure = failure
        self._reports = reports
        self._count = 0

    def line(self, text: str) -> None:
        """Append a statement."""
        self.lines.append(text)

    def name(self) -> str:
        """A new name."""
        self._count += 1
        return f"t{self._count}"

    def variable(self, c_type: str, value: str = "") -> str:
        """Declare a variable.

        :return: its name
        """
        name = self.name()
        self.line(f"{c_type} {name} = {value};" if value else f"{c_type} {name};")
        return name

    def hold(self, value: Value) -> Value:
        """The same value, evaluated once."""
        if value.is_constant:
            return value
        name = self.variable(value.scalar.c_type, value.text)
        return Value(value.model, name, direct_bytes=value.direct_bytes)

    def capture(self, make: Callable[[], _T]) -> tuple[_T, list[str]]:
        """What *make* gives, and the statements that it made, which are taken out."""
        kept, self.lines = self.lines, []
        try:
            return make(), self.lines
        finally:
            self.lines = kept

    def discard(self, make: Callable[[], _T]) -> _T:
        """What *make* gives, without its statements."""
        can_fail, calls_kernel = self.can_fail, self.calls_kernel
        result, _ = self.capture(make)
        self.can_fail, self.calls_kernel = can_fail, calls_kernel
        return result

    def fail_if(self, condition: str, reason: int) -> None:
        """Fail for another reason than memory, one of :data:`FAILURES`."""
        self.can_fail = True
        note = f"at = {reason:#x}UL; " if self._reports else ""
        self.line(f"if (unlikely({condition})) {{ {note}{self._failure}; }}")

    def read(self, to: str, place: Place, size_bytes: int) -> None:
        """Copy memory.

        :param to: C expression of the address to copy it to
        """
        if place.is_direct(size_bytes) and size_bytes <= _MAX_INLINE_BYTES:
            self.line(f"__builtin_memcpy({to}, {_pointer(place)}, {size_bytes});")
            return
        self._may_fault(place, "!read_{}(" + f"{to}, at, {size_bytes})")

    def string(self, to: str, place: Place, size_bytes: int) -> str:
        """Copy a string of at most *size_bytes* with its end.

        :return: name of the variable with the length: that of the string and its end, *size_bytes*
            if it is longer
        """
        length = self.variable("s64")
        self._may_fault(place, f"({length} = string_{{}}({to}, at, {size_bytes})) < 0")
        return length

    def load(self, place: Place, scalar: Scalar) -> str:
        """Read an integer.

        :return: C expression of its type
        """
        bit = place.model.bit_offset_ or 0
        size = (bit + scalar.bits + 7) // 8
        if place.is_direct(size) and size in _WORDS:
            text = peek(_pointer(place), size)
        elif size in _WORDS:
            text = self.variable(f"u{8 * size}")
            self.read(f"&{text}", place, size)
        else:
            text = self.variable("u64", "0")
            self.read(f"&{text}", place, size)
        if scalar.bits == scalar.storage_bits and not bit:
            return f"({scalar.c_type})({text} != 0)" if scalar.boolean else _cast(text, scalar)
        left = 64 - scalar.bits - bit
        kind = "s64" if scalar.signed else "u64"
        return _cast(f"(({kind})((u64){text} << {left}) >> {64 - scalar.bits})", scalar)

    def _may_fault(self, place: Place, test: str) -> None:
        self.can_fail = self.calls_kernel = True
        self.line(f"at = {place.address};")
        space = place.space
        if space == "any" and place.absolute is not None:
            address = (place.absolute + place.offset_bytes) % (1 << 64)
            space = "kernel" if address >= _KERNEL_HALF else "user"
        if space == "any":
            failed = f"(s64)at < 0 ? {test.format('kernel')} : {test.format('user')}"
        else:
            failed = test.format(space)
        self.line(f"if (unlikely({failed})) {self._failure};")


def peek(pointer: str, size_bytes: int) -> str:
    """C expression for an unsigned integer at a pointer of any type and alignment.

    :param size_bytes: 1, 2, 4 or 8
    """
    if size_bytes == 1:
        return f"*({pointer})"
    kind = f"u{8 * size_bytes}"
    return f"({{ {kind} w; __builtin_memcpy(&w, {pointer}, {size_bytes}); w; }})"


def _pointer(place: Place) -> str:
    pointer = f"(const u8 *)({place.base})"
    return f"{pointer} + {place.offset_bytes}" if place.offset_bytes else pointer


def _cast(text: str, scalar: Scalar) -> str:
    return f"({scalar.c_type})({text})"
