"""x86-64 registers: their names, their place in the stub's ``g`` packet, and a CPU's values."""

import copy
import dataclasses
import functools
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, MutableMapping, Sequence

from kgdbx.errors import ProtocolError

__all__ = (
    "ARGUMENT_REGISTERS",
    "DEFAULT_LAYOUT",
    "GENERAL_REGISTERS",
    "PT_REGS_NAMES",
    "RegisterLayout",
    "Registers",
)

ARGUMENT_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
"""Integer arguments of a C function in order: System V AMD64 ABI, section 3.2.3."""

GENERAL_REGISTERS = (
    ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp")
    + tuple(f"r{n}" for n in range(8, 16))
    + ("rip",)
)
"""Integer registers, in the order of a ``g`` packet."""

PT_REGS_NAMES = {
    "ax": "rax",
    "bx": "rbx",
    "cx": "rcx",
    "dx": "rdx",
    "si": "rsi",
    "di": "rdi",
    "bp": "rbp",
    "sp": "rsp",
    "ip": "rip",
    "flags": "eflags",
}
"""Names of ``struct pt_regs`` (arch/x86/include/asm/ptrace.h) to those of gdb."""


@dataclasses.dataclass(frozen=True)
class RegisterLayout:
    """Where each register lies in a ``g`` packet.

    :ivar names: register names in the stub's numbering: the index is the number for ``p``/``P``
    :ivar sizes_bytes: size of each register
    """

    names: tuple[str, ...]
    sizes_bytes: tuple[int, ...]

    @functools.cached_property
    def offsets_bytes(self) -> tuple[int, ...]:
        """Offset of each register in the packet."""
        offsets, offset = [], 0
        for size in self.sizes_bytes:
            offsets.append(offset)
            offset += size
        return tuple(offsets)

    @functools.cached_property
    def number(self) -> dict[str, int]:
        """Register name to stub number."""
        return {name: index for index, name in enumerate(self.names)}

    def unpack(self, packet: bytes) -> MutableMapping[str, int]:
        """Values of all registers that the packet holds; a shorter packet holds fewer.

        The general registers are decoded at once, the others when they are asked for.
        """
        return _PacketValues(self, packet)

    @classmethod
    def from_target_xml(cls, documents: Sequence[str]) -> "RegisterLayout":
        """Read gdb target descriptions ("Target Descriptions" in the gdb manual).

        :param documents: the feature documents in order of their register numbers
        :raises ProtocolError: if a document is not a target description
        """
        names: list[str] = []
        sizes: list[int] = []
        for document in documents:
            if "<!ENTITY" in document:
                raise ProtocolError("the stub's target description declares XML entities")
            try:
                root = ElementTree.fromstring(document)
            except ElementTree.ParseError as e:
                raise ProtocolError(f"the stub's target description is not XML: {e}") from e
            for reg in root.iter("reg"):
                try:
                    number = int(reg.get("regnum", len(names)))
                    size = int(reg.attrib["bitsize"]) // 8
                    name = reg.attrib["name"]
                except (KeyError, ValueError) as e:
                    raise ProtocolError(f"bad <reg> in the stub's target description: {e}") from e
                if number != len(names) or not 0 < size <= 1024:
                    raise ProtocolError(f"register {name!r} is out of order in the description")
                names.append(name)
                sizes.append(size)
        if not names:
            raise ProtocolError("the stub's target description has no registers")
        return cls(tuple(names), tuple(sizes))


_GENERAL_STRUCT = struct.Struct(f"<{len(GENERAL_REGISTERS)}Q")


class _PacketValues(MutableMapping[str, int]):
    # A g packet has some seventy registers, and a hit needs two or three of them.
    def __init__(self, layout: RegisterLayout, packet: bytes) -> None:
        self._layout = layout
        self._packet = packet
        self._known: dict[str, int] = {}
        names = layout.names
        if (
            len(packet) >= _GENERAL_STRUCT.size
            and names[: len(GENERAL_REGISTERS)] == GENERAL_REGISTERS
        ):
            self._known = dict(
                zip(GENERAL_REGISTERS, _GENERAL_STRUCT.unpack_from(packet), strict=True)
            )

    def __getitem__(self, name: str) -> int:
        value = self._known.get(name)
        if value is None:
            start, end = self._span(name)
            if end > len(self._packet):
                raise KeyError(name)
            value = self._known[name] = int.from_bytes(self._packet[start:end], "little")
        return value

    def __setitem__(self, name: str, value: int) -> None:
        self._known[name] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError("a register cannot be deleted")

    def __contains__(self, name: object) -> bool:
        if name in self._known:
            return True
        return name in self._layout.number and self._span(str(name))[1] <= len(self._packet)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._layout.names if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __copy__(self) -> "_PacketValues":
        other = _PacketValues(self._layout, self._packet)
        other._known = dict(self._known)
        return other

    def _span(self, name: str) -> tuple[int, int]:
        number = self._layout.number[name]
        start = self._layout.offsets_bytes[number]
        return start, start + self._layout.sizes_bytes[number]


DEFAULT_LAYOUT = RegisterLayout(
    GENERAL_REGISTERS + ("eflags", "cs", "ss", "ds", "es", "fs", "gs"), (8,) * 17 + (4,) * 7
)
"""What a stub without a target description sends (``dbg_reg_def``, arch/x86/kernel/kgdb.c)."""


class Registers:
    """The registers of one vCPU at a stop, readable and writable by either family of names.

    ``regs.rdi`` and ``regs.di`` are one register. A write is kept here until the target writes
    the changed registers back (:meth:`kgdbx.target.base.Target.write_registers`).

    :param values: unsigned values by gdb's names
    """

    __slots__ = ("_dirty", "_values")
    _dirty: set[str]
    _values: MutableMapping[str, int]

    def __init__(self, values: MutableMapping[str, int]) -> None:
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_dirty", set())

    def __getattr__(self, name: str) -> int:
        values: MutableMapping[str, int] = object.__getattribute__(self, "_values")
        try:
            return values[PT_REGS_NAMES.get(name, name)]
        except KeyError:
            raise AttributeError(f"register {name!r} is not available at this stop") from None

    def __setattr__(self, name: str, value: int) -> None:
        name = PT_REGS_NAMES.get(name, name)
        if name not in self._values:
            raise AttributeError(f"register {name!r} is not available at this stop")
        bits = 32 if name == "eflags" else 64
        self._values[name] = int(value) & ((1 << bits) - 1)
        self._dirty.add(name)

    def __getitem__(self, name: str) -> int:
        try:
            return int(getattr(self, name))
        except AttributeError as e:
            raise KeyError(str(e)) from None

    def __setitem__(self, name: str, value: int) -> None:
        setattr(self, name, value)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and PT_REGS_NAMES.get(name, name) in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __dir__(self) -> list[str]:
        return sorted({*self._values, *PT_REGS_NAMES, "changed", "argument"})

    def argument(self, index: int) -> int:
        """Value of an integer argument register.

        :param index: 0 to 5
        """
        return int(getattr(self, ARGUMENT_REGISTERS[index]))

    @property
    def changed(self) -> dict[str, int]:
        """Registers written since the last stop, by gdb's names."""
        return {name: self._values[name] for name in self._dirty}

    def copy(self) -> "Registers":
        """An independent copy that counts nothing as changed."""
        return Registers(copy.copy(self._values))

    def restore(self, saved: "Registers") -> None:
        """Take back every general register and the flags of *saved*; what differs is a write."""
        for name in (*GENERAL_REGISTERS, "eflags"):
            if name in saved and saved[name] != self._values.get(name):
                setattr(self, name, saved[name])

    def __repr__(self) -> str:
        return (
            f"<Registers rip={self._values.get('rip', 0):#x} rsp={self._values.get('rsp', 0):#x}>"
        )
