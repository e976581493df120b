"""One compilation unit of DWARF entries: functions, their names and where their code is."""

import functools
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from kgdbx.errors import SymbolError
from kgdbx.symbols.dwarf_abbreviation import read_abbreviations
from kgdbx.symbols.dwarf_data import (
    ATTRIBUTE,
    FORM,
    FORM_SIZES,
    TAG,
    ULEB_FORMS,
    read_sleb,
    read_string,
    read_uleb,
    write_uleb,
)
from kgdbx.symbols.dwarf_ranges import read_ranges
from kgdbx.symbols.line_table import LineHeader, read_line_header

if TYPE_CHECKING:
    from kgdbx.symbols.dwarf import DebugFile

__all__ = ("Entry", "Unit")

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


class Unit:
    """One compilation unit. Positions count from its start.

    :ivar start: its offset in ``.debug_info``
    :ivar data: its bytes
    """

    def __init__(self, debug: "DebugFile", start: int, data: bytes) -> None:
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
        self._abbreviations = read_abbreviations(debug.sections[".debug_abbrev"], abbreviations)

    @functools.cached_property
    def root(self) -> Entry:
        """The entry of the unit itself."""
        return self.entry(self._first)

    @functools.cached_property
    def line_header(self) -> LineHeader | None:
        """The head of its line number program, if it has one."""
        offset = self.root.numbers.get(_STMT_LIST)
        return (
            None
            if offset is None
            else read_line_header(
                self.debug.sections.string, self.debug.sections[".debug_line"], offset
            )
        )

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
            return list(read_ranges(self.debug.sections, self.version, offset, base))
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
                return self.debug.sections.string(".debug_str", value), at + size
            if form == _LINE_STRP:
                return self.debug.sections.string(".debug_line_str", value), at + size
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
