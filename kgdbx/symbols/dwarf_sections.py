"""The DWARF sections of an ELF file, with the relocations of a ``.ko`` applied."""

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from kgdbx.errors import SymbolError
from kgdbx.symbols.dwarf_data import read_string

__all__ = ("DebugSections",)

# In a .ko every section starts at 0. Here section n starts at n << 40, so that addresses tell
# their section.
_SECTION_SHIFT = 40
_SHF_ALLOC, _SHF_COMPRESSED = 0x2, 0x800
_R_X86_64_64, _R_X86_64_32 = 1, 10
_RELA = np.dtype([("offset", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
_SYM = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("shndx", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)
_SECTIONS = (
    ".debug_abbrev",
    ".debug_aranges",
    ".debug_info",
    ".debug_line",
    ".debug_line_str",
    ".debug_ranges",
    ".debug_rnglists",
    ".debug_str",
)


class DebugSections:
    """The DWARF sections of one file, mapped; relocated if it is a ``.ko``.

    :param path: vmlinux, or a module's ``.ko`` with debug information
    :raises SymbolError: if it has none, or of a kind that is not supported
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._load(ELFFile(file), mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        except OSError as e:
            raise SymbolError(f"cannot read {path}: {e.strerror}", symbol=str(path)) from e
        except (ELFError, ValueError) as e:
            raise SymbolError(f"{path} is not an ELF file ({e})", symbol=str(path)) from e

    def __getitem__(self, name: str) -> memoryview:
        """The bytes of a section such as ``.debug_info``; none if the file does not have it."""
        return self._sections[name]

    def string(self, section: str, offset: int) -> str:
        """The NUL-terminated string at an offset in a section."""
        return read_string(self._sections[section], offset)[0]

    def split_address(self, address: int) -> tuple[str, int]:
        """Section name and offset of an address in a ``.ko``; no name and itself elsewhere."""
        if not self._relocatable:
            return "", address
        section = self._section_names[address >> _SECTION_SHIFT]
        return section, address & (1 << _SECTION_SHIFT) - 1

    def join_address(self, section: str, offset: int) -> int:
        """The reverse of :meth:`split_address`.

        :raises SymbolError: if the file is a ``.ko`` without such a section
        """
        if not self._relocatable:
            return offset
        if not section or section not in self._section_names:
            raise SymbolError(
                f"{self.path.name} has no section {section!r}; an address in a .ko needs one",
                symbol=section,
            )
        return (self._section_names.index(section) << _SECTION_SHIFT) + offset

    def _load(self, elf: ELFFile, image: mmap.mmap) -> None:
        if elf["e_machine"] != "EM_X86_64":
            raise SymbolError(f"{self.path} is not for x86-64", symbol=str(self.path))
        if elf.get_section_by_name(".debug_info") is None:
            raise SymbolError(
                f"{self.path} has no debug information; install the kernel's -dbg package",
                symbol=str(self.path),
            )
        if elf.get_section_by_name(".debug_str_offsets") is not None:
            raise SymbolError(
                f"{self.path} has indexed or split DWARF 5 (clang's), which is not supported; "
                "build with CONFIG_DEBUG_INFO_DWARF4",
                symbol=str(self.path),
            )
        self._relocatable = elf["e_type"] == "ET_REL"
        self._section_names = tuple(section.name for section in elf.iter_sections())
        symbols = self._section_values(elf) if self._relocatable else None
        self._sections: dict[str, memoryview] = {}
        for name in _SECTIONS:
            section = elf.get_section_by_name(name)
            if section is None:
                data = memoryview(b"")
            elif section["sh_flags"] & _SHF_COMPRESSED:
                data = memoryview(section.data())
            else:
                data = memoryview(image)[section["sh_offset"] :][: section["sh_size"]]
            # vmlinux may have .rela sections too (--emit-relocs), which are already applied
            rela = elf.get_section_by_name(f".rela{name}")
            if symbols is not None and rela is not None:
                data = _relocate(data, np.frombuffer(rela.data(), dtype=_RELA), symbols)
            self._sections[name] = data

    def _section_values(self, elf: ELFFile) -> npt.NDArray[np.uint64]:
        """Values of the symbols, where section n starts at n << 40."""
        symtab = elf.get_section_by_name(".symtab")
        table = np.frombuffer(symtab.data() if symtab else b"", dtype=_SYM)
        bases = np.zeros(1 << 16, dtype=np.uint64)
        for index, section in enumerate(elf.iter_sections()):
            if section["sh_flags"] & _SHF_ALLOC:
                bases[index] = index << _SECTION_SHIFT
        values: npt.NDArray[np.uint64] = table["value"] + bases[table["shndx"]]
        return values


def _relocate(
    data: memoryview, relocations: npt.NDArray[np.void], symbols: npt.NDArray[np.uint64]
) -> memoryview:
    """A copy with the relocations of a .ko's debug section applied."""
    image = np.frombuffer(data, dtype=np.uint8).copy()
    addends = relocations["addend"].astype(np.uint64)
    values = symbols[relocations["symbol"]] + addends
    for kind, size in ((_R_X86_64_64, 8), (_R_X86_64_32, 4)):
        chosen = relocations["type"] == kind
        for byte in range(size):
            places = relocations["offset"][chosen] + np.uint64(byte)
            image[places] = (values[chosen] >> np.uint64(8 * byte)).astype(np.uint8)
    return memoryview(image.tobytes())
