"""Source lines to addresses, and back.

drgn finds the line of an address; the addresses of a line are read from the line number program of
the function's unit here, with ``is_stmt``, as perf probe and gdb do.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import drgn

from kgdbx.errors import SymbolError
from kgdbx.symbols.dwarf import DebugFile
from kgdbx.symbols.dwarf_data import ATTRIBUTE, TAG
from kgdbx.symbols.dwarf_unit import Entry, Unit
from kgdbx.symbols.line_table import line_starts, rows

__all__ = (
    "Declaration",
    "LineAddresses",
    "address_line",
    "function_declaration",
    "line_addresses",
    "offset_lines",
)

_DECL_FILE, _DECL_LINE = ATTRIBUTE["DW_AT_decl_file"], ATTRIBUTE["DW_AT_decl_line"]
_DECLARATION = ATTRIBUTE["DW_AT_declaration"]
_CALL_FILE, _CALL_LINE = ATTRIBUTE["DW_AT_call_file"], ATTRIBUTE["DW_AT_call_line"]
_INLINED = TAG["DW_TAG_inlined_subroutine"]


class Declaration(NamedTuple):
    """Where a function is written.

    :ivar line: 1-based line that holds its name
    """

    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class LineAddresses:
    """Where the code of a line of a function starts.

    :ivar file: source file of the function
    :ivar function_line: 1-based line of the file that holds the function's name
    :ivar line: lines after that: the line asked for, or the next one that has code
    :ivar addresses: sorted; in a ``.ko`` offsets in the function's section
    """

    file: str
    function_line: int
    line: int
    addresses: tuple[int, ...]


def address_line(program: drgn.Program, address: int) -> tuple[str, int] | None:
    """Source file and 1-based line of an address, in an inlined function the latter's.

    :param address: address in the running kernel
    :return: None if the debug information does not say
    """
    try:
        location = program.source_location(address)[0]
    except LookupError:
        return None
    return (location.filename, location.line) if location.line else None


def offset_lines(debug: DebugFile, section: str, offset: int) -> tuple[tuple[str, int], ...]:
    """Source files and 1-based lines of a place in a module's file; it need not be loaded.

    :param offset: from the start of the section
    :return: the line itself, then where each function that was inlined around it is called
    :raises SymbolError: if there is no such section
    """
    address = debug.sections.join_address(section, offset)
    unit = debug.unit_containing(address)
    if unit is None or unit.line_header is None:
        return ()
    lines: list[tuple[str, int]] = []
    for position, tag, _ in unit.walk(lambda start, end: True):
        if tag != _INLINED:
            continue
        entry = unit.entry(position)
        if any(low <= address < high for low, high in unit.ranges(entry)):
            lines.insert(0, (unit.file(entry.numbers.get(_CALL_FILE)), entry.numbers[_CALL_LINE]))
    before = None
    for row in rows(unit.line_header):
        if before is not None and before.address <= address < row.address:
            return (unit.file(before.file), before.line), *lines
        before = None if row.end_sequence else row
    return tuple(lines)


def function_declaration(path: Path, function: str | int, section: str = "") -> Declaration:
    """Where a function is written.

    :param path: vmlinux, or a module's ``.ko`` with debug information
    :param function: its name, or a link-time address inside of it
    :param section: in a ``.ko``, the section that the address is an offset in
    :raises SymbolError: if there is no such function, or several of this name
    """
    debug = DebugFile(path)
    if isinstance(function, int):
        unit, entry = _function_at(debug, function, section)
        return _declaration(unit, entry)
    found = {
        _declaration(unit, entry)
        for unit, hits in debug.units_at(debug.name_offsets(function))
        if unit.functions_named(function, hits)
        for entry in unit.functions()
        if entry.name == function and not entry.numbers.get(_DECLARATION)
    }
    if not found:
        raise SymbolError(f"{path.name} has no function {function!r}", symbol=function)
    if len(found) > 1:
        places = tuple(f"{file}:{line}" for file, line in sorted(found))
        raise SymbolError(
            f"there are {len(found)} functions {function!r}: {', '.join(places)}; give an address",
            symbol=function,
            candidates=places,
        )
    return found.pop()


def line_addresses(path: Path, function: int, line: int, section: str = "") -> LineAddresses:
    """Where the code of a line of a function starts, for ``func:line``.

    Each of the places where the code goes over to the line counts, among them those in the
    function's cold part. Functions that were inlined into this one have lines of their own, which
    do not count.

    :param path: vmlinux, or a module's ``.ko`` with debug information
    :param function: a link-time address inside of the function
    :param line: lines after the one that holds the function's name, as in ``perf probe``
    :param section: in a ``.ko``, the section that the address is an offset in
    :return: if the line has no code, those of the next line that has
    :raises SymbolError: if there is no such function, or no code on or after the line
    """
    debug = DebugFile(path)
    unit, entry = _function_at(debug, function, section)
    file, first = _declaration(unit, entry)
    end = _end_line(unit, file, first)
    starts: dict[int, set[int]] = {}
    if line >= 0 and unit.line_header is not None:
        for row in line_starts(unit.line_header, unit.ranges(entry)):
            if first + line <= row.line < end and unit.file(row.file) == file:
                starts.setdefault(row.line, set()).add(debug.sections.split_address(row.address)[1])
    if not starts:
        name = unit.function_name(entry)
        raise SymbolError(
            f"{name} has no code on line {line} or after it ({file}:{first + line}); "
            "give a smaller line",
            symbol=f"{name}:{line}",
        )
    nearest = min(starts)
    return LineAddresses(file, first, nearest - first, tuple(sorted(starts[nearest])))


def _function_at(debug: DebugFile, address: int, section: str) -> tuple[Unit, Entry]:
    joined = debug.sections.join_address(section, address)
    unit = debug.unit_containing(joined)
    for entry in unit.functions() if unit else ():
        if unit and any(low <= joined < high for low, high in unit.ranges(entry)):
            return unit, entry
    raise SymbolError(
        f"{debug.path.name} has no function with debug information at {address:#x}",
        symbol=hex(address),
    )


def _declaration(unit: Unit, entry: Entry) -> Declaration:
    numbers = unit.origin(entry).numbers
    return Declaration(unit.file(numbers.get(_DECL_FILE)), numbers.get(_DECL_LINE, 0))


def _end_line(unit: Unit, file: str, first: int) -> int:
    """The line of the next function of the same file: DWARF does not say where one ends."""
    later = [
        place.line
        for entry in unit.functions()
        if not entry.numbers.get(_DECLARATION)
        if (place := _declaration(unit, entry)).file == file and place.line > first
    ]
    return min(later, default=1 << 32)
