"""From C text to bytes at an address in the guest: gcc compiles, pyelftools reads, we relocate.

The relocations that such code needs are few; see "Relocation Types" in the x86-64 psABI.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from kgdbx.errors import ProbeError

__all__ = (
    "CFLAGS",
    "CompileError",
    "LinkError",
    "Linked",
    "Object",
    "compile_file",
    "compile_unit",
)

CFLAGS = (
    "-O2",
    "-std=gnu11",
    "-mcmodel=kernel",
    "-fno-pic",
    "-fno-pie",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-mpreferred-stack-boundary=3",
    "-fcf-protection=none",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-strict-aliasing",
    "-fno-jump-tables",
    # Of two equal handlers one would become a call of the other, with a stack frame in between.
    "-fno-ipa-icf",
    "-ffreestanding",
    "-fno-builtin",
    "-Wall",
    "-Wno-unused-function",
    "-Wno-psabi",
)
"""How the kernel's own code is compiled, as far as code that joins it must be."""

_COMPILE_S = 120.0
_ALIGN_BYTES = 16
_RELOCATIONS = {1: (8, False), 2: (4, True), 4: (4, True), 10: (4, False), 11: (4, False)}
_R_X86_64_32 = 10


class CompileError(ProbeError):
    """gcc refused; the message has its words, with file and line."""


class LinkError(ProbeError):
    """A symbol that the kernel does not have, or code that cannot be placed."""


@dataclass(frozen=True)
class Linked:
    """Bytes ready to be written.

    :ivar code: for executable memory
    :ivar data: for writable memory, apart from the code: TCG translates a page anew that is written
    :ivar symbols: addresses by name
    """

    code: bytes
    data: bytes
    symbols: Mapping[str, int]


class Object:
    """A compiled unit whose sections were laid out one behind the other.

    :ivar code_bytes: size of text and read-only data
    :ivar data_bytes: size of data and bss
    """

    def __init__(self, path: Path) -> None:
        self._offsets: dict[int, tuple[str, int]] = {}
        self._image = {"code": bytearray(), "data": bytearray()}
        self._symbols: list[tuple[str, object, int, bool]] = []
        self._relocations: list[tuple[int, int, int, int, int]] = []
        with path.open("rb") as file:
            self._read(ELFFile(file))
        self.code_bytes = len(self._image["code"])
        self.data_bytes = len(self._image["data"])

    def _read(self, elf: ELFFile) -> None:
        for index, section in enumerate(elf.iter_sections()):
            flags = section["sh_flags"]
            if not flags & 2 or section["sh_size"] == 0:  # SHF_ALLOC
                continue
            part = "data" if flags & 1 else "code"  # SHF_WRITE
            image = self._image[part]
            image += bytes(-len(image) % max(_ALIGN_BYTES, section["sh_addralign"]))
            self._offsets[index] = (part, len(image))
            is_bss = section["sh_type"] == "SHT_NOBITS"
            image += bytes(section["sh_size"]) if is_bss else section.data()
        table = elf.get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        for symbol in table.iter_symbols():
            is_weak = symbol["st_info"]["bind"] == "STB_WEAK"
            self._symbols.append((symbol.name, symbol["st_shndx"], symbol["st_value"], is_weak))
        for section in elf.iter_sections():
            if isinstance(section, RelocationSection) and section["sh_info"] in self._offsets:
                for entry in section.iter_relocations():
                    self._relocations.append(
                        (
                            section["sh_info"],
                            entry["r_offset"],
                            entry["r_info_type"],
                            entry["r_info_sym"],
                            entry["r_addend"],
                        )
                    )

    @property
    def undefined(self) -> tuple[str, ...]:
        """Symbols that must come from elsewhere."""
        return tuple(name for name, place, _, _ in self._symbols if place == "SHN_UNDEF" and name)

    @property
    def defined(self) -> frozenset[str]:
        """Names of what is in the unit."""
        return frozenset(self.addresses(0, 0))

    def addresses(self, code: int, data: int) -> dict[str, int]:
        """Where what is in the unit will be.

        :param code: guest-virtual address for the code
        :param data: and for the data
        """
        bases = {"code": code, "data": data}
        found: dict[str, int] = {}
        for name, place, value, _ in self._symbols:
            if name and isinstance(place, int) and place in self._offsets:
                part, offset = self._offsets[place]
                found[name] = bases[part] + offset + value
        return found

    def link(self, code: int, data: int, resolve: Callable[[str], int | None]) -> Linked:
        """Relocate to addresses.

        :param code: guest-virtual address for the code
        :param data: and for the data
        :param resolve: address of a symbol that the unit does not define
        :raises LinkError: for unknown symbols, all of them named, or one out of reach
        """
        bases = {"code": code, "data": data}
        values: list[int] = []
        missing: list[str] = []
        for name, place, value, is_weak in self._symbols:
            if place == "SHN_UNDEF":
                found = resolve(name) if name else 0
                if found is None and not is_weak:
                    missing.append(name)
                values.append(found or 0)
            elif place == "SHN_ABS":
                values.append(value)
            elif isinstance(place, int) and place in self._offsets:
                part, offset = self._offsets[place]
                values.append(bases[part] + offset + value)
            else:
                values.append(0)
        if missing:
            raise LinkError(f"the kernel has no symbol {', '.join(missing)}")
        images = {part: bytearray(image) for part, image in self._image.items()}
        for section, offset, kind, index, addend in self._relocations:
            part, start = self._offsets[section]
            at = bases[part] + start + offset
            value = values[index] + addend
            name = self._symbols[index][0]
            images[part][start + offset : start + offset + _RELOCATIONS.get(kind, (8, 0))[0]] = (
                _relocated(kind, value, at, name)
            )
        symbols = self.addresses(code, data)
        return Linked(bytes(images["code"]), bytes(images["data"]), symbols)


def compile_unit(source: str, *, flags: tuple[str, ...] = (), name: str = "probe.c") -> Object:
    """Compile C text with the host's gcc.

    :param flags: behind :data:`CFLAGS`
    :param name: what messages call the text; ``#line`` in it may say otherwise
    :raises CompileError: if gcc is missing, or refuses
    """
    with tempfile.TemporaryDirectory(prefix="kgdbx-") as directory:
        path = Path(directory) / name
        path.write_text(source, encoding="utf-8")
        return _compile(name, flags, Path(directory), directory)


def compile_file(path: Path, *, flags: tuple[str, ...] = ()) -> Object:
    """Compile a C file; messages call it by *path*.

    :param flags: behind :data:`CFLAGS`
    :raises CompileError: if gcc is missing, or refuses
    """
    with tempfile.TemporaryDirectory(prefix="kgdbx-") as directory:
        return _compile(str(path), flags, Path(directory), None)


def _compile(source: str, flags: tuple[str, ...], scratch: Path, cwd: str | None) -> Object:
    output = scratch / "unit.o"
    command = ("gcc", *CFLAGS, *flags, "-c", "-o", str(output), source)
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILE_S,
            check=False,
        )
    except FileNotFoundError as e:
        raise CompileError("gcc is not installed; probes inside the guest need it") from e
    except subprocess.TimeoutExpired as e:
        raise CompileError(f"gcc has not ended after {_COMPILE_S:g} s") from e
    if done.returncode:
        lines = re.sub(r"^(compilation terminated\.|In file included.*)\n?", "", done.stderr)
        raise CompileError(f"gcc refuses it:\n{lines.rstrip()}")
    return Object(output)


def _relocated(kind: int, value: int, at: int, name: str) -> bytes:
    if kind not in _RELOCATIONS:
        raise LinkError(f"relocation type {kind} against {name!r} is not supported in a handler")
    size, relative = _RELOCATIONS[kind]
    if relative:
        value -= at
    bits = 8 * size
    signed = value - (1 << 64) if value >= 1 << 63 else value
    fits = (
        0 <= value < 1 << bits
        if kind == _R_X86_64_32
        else size == 8 or -(1 << bits - 1) <= signed < 1 << bits - 1
    )
    if not fits:
        raise LinkError(f"{name!r} at {value & (1 << 64) - 1:#x} is out of reach")
    return (signed & (1 << bits) - 1).to_bytes(size, "little")
