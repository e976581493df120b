"""DWARF entries of an ELF file: what drgn has no function for.

drgn reads types and finds lines; it does not say where the compiler put the bodies of inlined
functions, nor the addresses of a line. A kernel has 170 MB of entries, so nothing here reads them
all: a name's offset in ``.debug_str`` is searched in the bytes of ``.debug_info``, and only units
with a hit are parsed.
"""

import bisect
import functools
import itertools
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from elftools.common.exceptions import ELFError
from elftools.dwarf.enums import ENUM_DW_AT, ENUM_DW_RLE, ENUM_DW_TAG
from elftools.elf.elffile import ELFFile

from kgdbx.errors import SymbolError
from kgdbx.symbols.dwarf_data import (
    FORM,
    FORM_SIZES,
    ULEB_FORMS,
    find_all,
    read_sleb,
    read_string,
    read_uleb,
    write_uleb,
)
from kgdbx.symbols.line_table import LineHeader, read_line_header

__all__ = ("ATTRIBUTE", "DebugFile", "Entry", "TAG", "Unit")

ATTRIBUTE: dict[str, int] = ENUM_DW_AT
TAG: dict[str, int] = ENUM_DW_TAG

_NAME, _SIBLING = ATTRIBUTE["DW_AT_name"], ATTRIBUTE["DW_AT_sibling"]
_LOW_PC, _HIGH_PC = ATTRIBUTE["DW_AT_low_pc"], ATTRIBUTE["DW_AT_high_pc"]
_RANGES, _ENTRY_PC = ATTRIBUTE["DW_AT_ranges"], ATTRIBUTE["DW_AT_entry_pc"]
_ABSTRACT_ORIGIN = ATTRIBUTE["DW_AT_abstract_origin"]
_STMT_LIST = ATTRIBUTE["DW_AT_stmt_list"]
_SUBPROGRAM = TAG["DW_TAG_subprogram"]

_LOCAL_REFERENCES = {FORM[f"ref{kind}"] for kind in ("1", "2", "4", "8", "_udata")}
_ADDR, _STRING, _STRP, _LINE_STRP = (FORM[n] for n in ("addr", "string", "strp", "line_strp"))
_SDATA, _IMPLICIT_CONST, _INDIRECT = (FORM[n] for n in ("sdata", "implicit_const", "indirect"))
_BLOCKS = {FORM["block1"]: 1, FORM["block2"]: 2, FORM["block4"]: 4}
_ULEB_BLOCKS = {FORM["block"], FORM["exprloc"]}

# gcc puts a name into .debug_info itself when that is not longer than an offset into .debug_str
_LONGEST_INLINE_NAME = 3
_FEW_WORDS = 8

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


class _Abbreviation(NamedTuple):
    tag: int
    has_children: bool
    attributes: tuple[tuple[int, int, int], ...]  # name, form, implicit constant
    size: int  # of the attributes in bytes; -1 if it varies
    sibling: int  # offset of a 4-byte DW_AT_sibling; -1 if there is none or it varies
    name: int  # offset of DW_AT_name; -1 likewise
    name_form: int


class Entry(NamedTuple):
    """A debugging information entry.

    :ivar tag: one of :data:`TAG`
    :ivar name: its ``DW_AT_name``
    :ivar numbers: constants, addresses and offsets by attribute; references count from the start
        of ``.debug_info``
    :ivar forms: how each attribute is stored
    """

    tag: int
    name: str
    numbers: dict[int, int]
    forms: dict[int, int]


class DebugFile:
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
        self._starts = list(self._unit_starts())

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
        self.info = self._sections[".debug_info"]

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

    def _unit_starts(self) -> Iterator[int]:
        start = 0
        while start < len(self.info):
            yield start
            (length,) = struct.unpack_from("<I", self.info, start)
            if length >= 0xFFFFFFF0:
                raise SymbolError(
                    f"{self.path} has 64-bit DWARF, which is not supported", symbol=str(self.path)
                )
            start += 4 + length

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

    def unit(self, start: int) -> "Unit":
        """The unit that starts at an offset in ``.debug_info``."""
        (length,) = struct.unpack_from("<I", self.info, start)
        return Unit(self, start, bytes(self.info[start : start + 4 + length]))

    def units_at(self, offsets: Iterable[int]) -> Iterator[tuple["Unit", list[int]]]:
        """Units that hold any of the offsets in ``.debug_info``, with their offsets in the unit."""

        def start(offset: int) -> int:
            return self._starts[bisect.bisect_right(self._starts, offset) - 1]

        for begin, group in itertools.groupby(sorted(offsets), key=start):
            yield self.unit(begin), [offset - begin for offset in group]

    def unit_containing(self, address: int) -> "Unit | None":
        """The unit whose code holds an address."""
        for start, low, high in self._address_ranges:
            if low <= address < high:
                return self.unit(start)
        # not every compiler writes .debug_aranges
        for unit in map(self.unit, self._starts):
            if any(low <= address < high for low, high in unit.ranges(unit.root)):
                return unit
        return None

    @functools.cached_property
    def _address_ranges(self) -> list[tuple[int, int, int]]:
        data = self._sections[".debug_aranges"]
        found, start = [], 0
        while start < len(data):
            length, _, unit = struct.unpack_from("<IHI", data, start)
            pairs = data[start + 16 : start + 4 + length]
            pairs = pairs[: len(pairs) // 16 * 16]
            found += [(unit, low, low + size) for low, size in struct.iter_unpack("<QQ", pairs)]
            start += 4 + length
        return found

    def name_offsets(self, name: str) -> list[int]:
        """Offsets in ``.debug_info`` where a name may stand, some of them by chance."""
        text = name.encode() + b"\0"
        # The linker lets a string share the end of a longer one: do_open is also in x86_do_open.
        offsets = self.find_words(find_all(bytes(self._sections[".debug_str"]), text))
        if len(name) <= _LONGEST_INLINE_NAME:
            offsets += find_all(bytes(self.info), text)
        return offsets

    def find_words(self, words: Iterable[int]) -> list[int]:
        """Offsets in ``.debug_info`` of any of the 32-bit numbers, at any alignment."""
        wanted = list(words)
        if not wanted:
            return []
        patterns = [struct.pack("<I", word) for word in wanted]
        if len(wanted) <= _FEW_WORDS and not any(map(_overlaps_itself, patterns)):
            # Ten times faster for one word: a search for a rare byte of it.
            return [
                match.start()
                for pattern in patterns
                for match in re.finditer(re.escape(pattern), self.info)
            ]
        known = np.zeros(max(wanted) + 2, dtype=np.bool_)
        known[wanted] = True
        found: list[int] = []
        for shift in range(4):
            numbers = np.frombuffer(
                self.info, dtype="<u4", offset=shift, count=(len(self.info) - shift) // 4
            )
            step = 1 << 20  # what the CPU's cache holds
            for first in range(0, len(numbers), step):
                chunk = np.minimum(numbers[first : first + step], len(known) - 1)
                found += ((np.flatnonzero(known[chunk]) + first) * 4 + shift).tolist()
        return found

    def may_refer_across_units(self) -> bool:
        """Whether some DW_AT_abstract_origin may be a DW_FORM_ref_addr."""
        pair = bytes((_ABSTRACT_ORIGIN, FORM["ref_addr"]))
        return pair in bytes(self._sections[".debug_abbrev"])

    def string(self, section: str, offset: int) -> str:
        """The NUL-terminated string at an offset in a section."""
        return read_string(self._sections[section], offset)[0]

    def abbreviations(self, offset: int) -> dict[int, _Abbreviation]:
        data = self._sections[".debug_abbrev"]
        table = {}
        while data[offset]:
            code, offset = read_uleb(data, offset)
            tag, offset = read_uleb(data, offset)
            has_children = bool(data[offset])
            offset += 1
            attributes = []
            while True:
                name, offset = read_uleb(data, offset)
                form, offset = read_uleb(data, offset)
                constant = 0
                if form == _IMPLICIT_CONST:
                    constant, offset = read_sleb(data, offset)
                if not form:
                    break
                attributes.append((name, form, constant))
            table[code] = _abbreviation(tag, has_children, attributes)
        return table

    def ranges(self, version: int, offset: int, base: int) -> Iterator[tuple[int, int]]:
        """The address ranges at an offset in the version's range section."""
        if version >= 5:
            yield from self._rnglist(offset, base)
            return
        for low, high in struct.iter_unpack("<QQ", self._sections[".debug_ranges"][offset:]):
            if not low and not high:
                return
            if low == (1 << 64) - 1:
                base = high
            else:
                yield base + low, base + high

    def _rnglist(self, offset: int, base: int) -> Iterator[tuple[int, int]]:
        data = self._sections[".debug_rnglists"]
        while kind := data[offset]:
            offset += 1
            if kind == ENUM_DW_RLE["DW_RLE_base_address"]:
                (base,) = struct.unpack_from("<Q", data, offset)
                offset += 8
            elif kind == ENUM_DW_RLE["DW_RLE_offset_pair"]:
                low, offset = read_uleb(data, offset)
                high, offset = read_uleb(data, offset)
                yield base + low, base + high
            elif kind == ENUM_DW_RLE["DW_RLE_start_end"]:
                yield struct.unpack_from("<QQ", data, offset)
                offset += 16
            elif kind == ENUM_DW_RLE["DW_RLE_start_length"]:
                (low,) = struct.unpack_from("<Q", data, offset)
                size, offset = read_uleb(data, offset + 8)
                yield low, low + size
            else:
                raise SymbolError(f"{self.path.name} has an unknown range list entry {kind}")

    def line_header(self, offset: int) -> LineHeader:
        """The head of the line number program at an offset in ``.debug_line``."""
        return read_line_header(self.string, self._sections[".debug_line"], offset)


class Unit:
    """One compilation unit. Positions count from its start.

    :ivar start: its offset in ``.debug_info``
    :ivar data: its bytes
    """

    def __init__(self, debug: DebugFile, start: int, data: bytes) -> None:
        self.debug = debug
        self.start = start
        self.data = data
        (self.version,) = struct.unpack_from("<H", data, 4)
        if not 3 <= self.version <= 5:
            raise SymbolError(f"{debug.path.name} has DWARF {self.version}, which is not supported")
        if self.version >= 5:
            kind, _, abbreviations = struct.unpack_from("<BBI", data, 6)
            # the header of type units and of skeletons goes on
            self._first = 12 + {2: 12, 4: 8, 5: 8, 6: 12}.get(kind, 0)
        else:
            (abbreviations,) = struct.unpack_from("<I", data, 6)
            self._first = 11
        self._abbreviations = debug.abbreviations(abbreviations)

    @functools.cached_property
    def root(self) -> Entry:
        """The entry of the unit itself."""
        return self.entry(self._first)

    @functools.cached_property
    def line_header(self) -> LineHeader | None:
        """The head of its line number program, if it has one."""
        offset = self.root.numbers.get(_STMT_LIST)
        return None if offset is None else self.debug.line_header(offset)

    def file(self, number: int | None) -> str:
        """The file of this number; empty if there is none."""
        header = self.line_header
        if number is None or header is None or number >= len(header.files):
            return ""
        return header.files[number]

    def walk(self, enter: Callable[[int, int], bool]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Position, tag and ancestors' positions of entries, in file order.

        :param enter: whether the entries between two positions are wanted; not asked where the
            file gives no way around them
        """
        data, table = self.data, self._abbreviations
        at = self._first
        parents: tuple[int, ...] = ()
        while at < len(data):
            position = at
            code = data[at]
            at += 1
            if code & 0x80:
                code, at = read_uleb(data, position)
            if not code:
                parents = parents[:-1]
                continue
            abbreviation = table[code]
            yield position, abbreviation.tag, parents
            sibling = 0
            if abbreviation.sibling >= 0:
                (sibling,) = struct.unpack_from("<I", data, at + abbreviation.sibling)
            if abbreviation.size >= 0:
                at += abbreviation.size
            else:
                for name, form, _ in abbreviation.attributes:
                    value, at = self._value(form, at)
                    if name == _SIBLING and isinstance(value, int):
                        sibling = value - self.start
            if abbreviation.has_children:
                if sibling and not enter(position, sibling):
                    at = sibling
                else:
                    parents = (*parents, position)

    def functions(self) -> Iterator[Entry]:
        """The functions that the unit names, defines or inlines."""
        for position, tag, parents in self.walk(lambda start, end: start == self._first):
            if tag == _SUBPROGRAM and len(parents) == 1:
                yield self.entry(position)

    def functions_named(self, name: str, hits: list[int]) -> set[int]:
        """Offsets in ``.debug_info`` of functions whose ``DW_AT_name`` is at one of *hits*.

        A position inside of another entry may be among them, by chance.
        """
        names = [
            (write_uleb(code), abbreviation.name, abbreviation.name_form)
            for code, abbreviation in self._abbreviations.items()
            if abbreviation.tag == _SUBPROGRAM and abbreviation.name >= 0
        ]
        return {
            self.start + hit - offset - len(code)
            for hit in hits
            for code, offset, form in names
            if self.data.startswith(code, max(0, hit - offset - len(code)))
            and (form == _STRP or self.data.startswith(name.encode() + b"\0", hit))
        }

    def entry(self, position: int) -> Entry:
        """The entry at a position."""
        code, at = read_uleb(self.data, position)
        abbreviation = self._abbreviations[code]
        name, numbers, forms = "", {}, {}
        for attribute, form, constant in abbreviation.attributes:
            value, at = self._value(form, at)
            if isinstance(value, int):
                numbers[attribute] = constant if form == _IMPLICIT_CONST else value
                forms[attribute] = form
            elif attribute == _NAME:
                name = value
        return Entry(abbreviation.tag, name, numbers, forms)

    def origin(self, entry: Entry) -> Entry:
        """The entry that carries the name and declaration of a function: itself or its origin."""
        while (reference := entry.numbers.get(_ABSTRACT_ORIGIN)) is not None:
            if self.start <= reference < self.start + len(self.data):
                entry = self.entry(reference - self.start)
            else:
                ((unit, (position,)),) = self.debug.units_at([reference])
                return unit.origin(unit.entry(position))
        return entry

    def function_name(self, entry: Entry) -> str:
        """The name of a function."""
        return self.origin(entry).name

    def ranges(self, entry: Entry) -> list[tuple[int, int]]:
        """First and end address of the parts of an entry's code; empty if it has none."""
        offset, low = entry.numbers.get(_RANGES), entry.numbers.get(_LOW_PC)
        if offset is not None:
            base = self.root.numbers.get(_LOW_PC, 0)
            return list(self.debug.ranges(self.version, offset, base))
        if low is None:
            return []
        high = entry.numbers.get(_HIGH_PC, 0)
        return [(low, high if entry.forms.get(_HIGH_PC) == _ADDR else low + high)]

    def entry_address(self, entry: Entry) -> int | None:
        """Where an entry's code is entered; None if it has no code."""
        address = entry.numbers.get(_ENTRY_PC)
        if address is not None and entry.forms[_ENTRY_PC] == _ADDR:
            return address
        ranges = self.ranges(entry)
        return ranges[0][0] + (address or 0) if ranges else None

    def _value(self, form: int, at: int) -> tuple[int | str, int]:
        """The value of a form, and where it ends; blocks are 0."""
        data = self.data
        size = FORM_SIZES.get(form)
        if size is not None:
            # an attribute of no size is a flag
            value = int.from_bytes(data[at : at + size], "little") if size else 1
            if form == _STRP:
                return self.debug.string(".debug_str", value), at + size
            if form == _LINE_STRP:
                return self.debug.string(".debug_line_str", value), at + size
            return value + (self.start if form in _LOCAL_REFERENCES else 0), at + size
        if form == _STRING:
            return read_string(data, at)
        if form in ULEB_FORMS:
            value, at = read_uleb(data, at)
            return value + (self.start if form in _LOCAL_REFERENCES else 0), at
        if form == _SDATA:
            return read_sleb(data, at)
        if form in _BLOCKS:
            size = _BLOCKS[form]
            return 0, at + size + int.from_bytes(data[at : at + size], "little")
        if form in _ULEB_BLOCKS:
            size, at = read_uleb(data, at)
            return 0, at + size
        if form == _INDIRECT:
            form, at = read_uleb(data, at)
            return self._value(form, at)
        raise SymbolError(
            f"{self.debug.path.name} has DWARF form {form:#x}, which is not supported"
        )


def _abbreviation(
    tag: int, has_children: bool, attributes: list[tuple[int, int, int]]
) -> _Abbreviation:
    size, sibling, name, name_form = 0, -1, -1, 0
    for attribute, form, _ in attributes:
        if attribute == _SIBLING and form == FORM["ref4"]:
            sibling = size
        if attribute == _NAME:
            name, name_form = size, form
        if form not in FORM_SIZES:
            size = -1
            break
        size += FORM_SIZES[form]
    return _Abbreviation(tag, has_children, tuple(attributes), size, sibling, name, name_form)


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


def _overlaps_itself(pattern: bytes) -> bool:
    # Whether one match can begin inside of another, where a regular expression misses it.
    return any(pattern.endswith(pattern[:size]) for size in range(1, len(pattern)))
