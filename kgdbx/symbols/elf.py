"""Symbols and build ID of an ELF file: vmlinux, or a module's ``.ko``."""

import bisect
import dataclasses
import difflib
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from kgdbx.errors import SymbolError
from kgdbx.symbols.file_cache import cached_by_file

__all__ = ("ELF64_SYM", "ElfSymbols", "Symbol", "build_id_from_notes", "near_names", "read_symbols")

ELF64_SYM = np.dtype(
    {
        "names": ["name", "info", "other", "shndx", "value", "size"],
        "formats": ["<u4", "u1", "u1", "<u2", "<u8", "<u8"],
    }
)
"""``Elf64_Sym``, /usr/include/elf.h."""

_STT_OBJECT, _STT_FUNC = 1, 2
_SHN_LORESERVE = 0xFF00
_NT_GNU_BUILD_ID = 3


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A symbol as it stands in the file.

    :ivar address: link-time address; in a ``.ko`` the offset in its section
    :ivar size_bytes: 0 if the file does not say
    :ivar section: name of the section that holds it
    """

    name: str
    address: int
    size_bytes: int
    is_function: bool
    section: str


class ElfSymbols:
    """The symbol table of one file, read at once.

    :param path: an ELF file with a ``.symtab``
    :raises SymbolError: if it is not, or cannot be read
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                elf = ELFFile(file)
                self.sections = tuple(section.name for section in elf.iter_sections())
                self.section_addresses = {
                    section.name: int(section["sh_addr"]) for section in elf.iter_sections()
                }
                symtab = elf.get_section_by_name(".symtab")
                if symtab is None:
                    raise SymbolError(
                        f"{path} has no symbol table; give the unstripped vmlinux of the "
                        "-dbg package",
                        symbol=str(path),
                    )
                table = np.frombuffer(symtab.data(), dtype=ELF64_SYM)
                strings: bytes = elf.get_section(symtab["sh_link"]).data()
                notes = elf.get_section_by_name(".notes") or elf.get_section_by_name(
                    ".note.gnu.build-id"
                )
                self.build_id = build_id_from_notes(notes.data() if notes else b"")
                self.has_debug_info = elf.get_section_by_name(".debug_info") is not None
        except OSError as e:
            raise SymbolError(f"cannot read {path}: {e.strerror}", symbol=str(path)) from e
        except ELFError as e:
            raise SymbolError(
                f"{path} is not an ELF file ({e}); give vmlinux, not vmlinuz", symbol=str(path)
            ) from e
        kinds = table["info"] & 0xF
        keep = (kinds <= _STT_FUNC) & (table["shndx"] != 0) & (table["name"] != 0)
        keep &= (table["shndx"] < _SHN_LORESERVE) | (table["value"] != 0)
        table = table[keep]
        self._table: npt.NDArray[np.void] = table[np.argsort(table["value"], kind="stable")]
        self._strings = strings
        self._addresses: npt.NDArray[np.uint64] = self._table["value"]

    def __len__(self) -> int:
        return len(self._table)

    @functools.cached_property
    def _rows(self) -> tuple[dict[str, int], dict[str, list[int]]]:
        """First row of each name, and all rows of those names that occur more than once."""
        strings = self._strings
        starts = self._table["name"]
        zeros = np.flatnonzero(np.frombuffer(strings, np.uint8) == 0)
        ends = zeros[np.searchsorted(zeros, starts)]
        slices = zip(starts.tolist(), ends.tolist(), strict=True)
        names = [strings[start:end].decode("utf-8", "replace") for start, end in slices]
        first: dict[str, int] = {}
        repeated: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if first.setdefault(name, row) != row:
                repeated.setdefault(name, [first[name]]).append(row)
        return first, repeated

    @functools.cached_property
    def function_names(self) -> tuple[str, ...]:
        """Sorted names of all functions."""
        functions = set(np.flatnonzero((self._table["info"] & 0xF) == _STT_FUNC).tolist())
        first, repeated = self._rows
        found = {name for name, row in first.items() if row in functions}
        found.update(name for name, rows in repeated.items() if functions.intersection(rows))
        return tuple(sorted(found))

    def names(self) -> Iterator[str]:
        """Names of all symbols."""
        return iter(self._rows[0])

    def lookup(self, name: str) -> tuple[Symbol, ...]:
        """All symbols of one name, by address; empty if there is none."""
        first, repeated = self._rows
        if name not in first:
            return ()
        rows = repeated.get(name, (first[name],))
        return tuple(dict.fromkeys(self._symbol(row) for row in rows))

    def address(self, name: str) -> int:
        """Link-time address of a symbol that occurs once, or of its first.

        :raises SymbolError: if there is no such symbol
        """
        row = self._rows[0].get(name)
        if row is None:
            raise SymbolError(f"{self.path.name} has no symbol {name!r}", symbol=name)
        return int(self._addresses[row])

    def containing(self, address: int) -> Symbol | None:
        """The function or object at a link-time address; functions win."""
        row = bisect.bisect_right(self._addresses, address) - 1
        best: Symbol | None = None
        start = None
        while row >= 0 and (start is None or self._addresses[row] == start):
            symbol = self._symbol(row)
            start = self._addresses[row]
            inside = not symbol.size_bytes or address < symbol.address + symbol.size_bytes
            if inside and (best is None or symbol.is_function > best.is_function):
                best = symbol
            row -= 1
        return best

    def next_address(self, address: int) -> int | None:
        """The least symbol address above *address*: where a function without a size ends."""
        row = bisect.bisect_right(self._addresses, address)
        return int(self._addresses[row]) if row < len(self._addresses) else None

    def read(self, address: int, size_bytes: int) -> bytes:
        """Bytes of the file at a link-time address; fewer at a section's end.

        :raises SymbolError: if no section of the file holds the address
        """
        with self.path.open("rb") as file:
            for section in ELFFile(file).iter_sections():
                start, size = int(section["sh_addr"]), int(section["sh_size"])
                if start and start <= address < start + size and section["sh_type"] != "SHT_NOBITS":
                    file.seek(int(section["sh_offset"]) + address - start)
                    return file.read(min(size_bytes, start + size - address))
        raise SymbolError(f"{self.path.name} holds nothing at {address:#x}", symbol=hex(address))

    def _symbol(self, row: int) -> Symbol:
        entry = self._table[row]
        start = int(entry["name"])
        name = self._strings[start : self._strings.index(b"\0", start)].decode("utf-8", "replace")
        shndx = int(entry["shndx"])
        section = self.sections[shndx] if shndx < len(self.sections) else ""
        kind = int(entry["info"]) & 0xF
        return Symbol(name, int(entry["value"]), int(entry["size"]), kind == _STT_FUNC, section)


@cached_by_file
def read_symbols(path: Path) -> ElfSymbols:
    """The symbols of a file, read once a process as long as it stays the same file.

    :raises SymbolError: as :class:`ElfSymbols`
    """
    return ElfSymbols(path)


def build_id_from_notes(notes: bytes) -> str:
    """The GNU build ID in a note section, in hex; empty if it has none."""
    offset = 0
    while offset + 12 <= len(notes):
        name_size, desc_size, kind = (
            int.from_bytes(notes[offset + n : offset + n + 4], "little") for n in (0, 4, 8)
        )
        name = notes[offset + 12 : offset + 12 + name_size]
        start = offset + 12 + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and name == b"GNU\0":
            return notes[start : start + desc_size].hex()
        offset = start + (desc_size + 3 & ~3)
    return ""


def near_names(name: str, names: Iterator[str] | tuple[str, ...], most: int = 5) -> tuple[str, ...]:
    """Names that a user may have meant, best first."""
    lowered = name.lower()
    pool = [n for n in names if abs(len(n) - len(name)) <= 8 and not n.startswith("__pfx_")]
    close = difflib.get_close_matches(name, pool, n=most, cutoff=0.7)
    related = sorted((n for n in pool if lowered in n.lower()), key=len)
    return tuple(dict.fromkeys([*close, *related]))[:most]
