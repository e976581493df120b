"""Where the compiler put the bodies of inlined functions."""

import bisect
import dataclasses
import itertools
import struct
import time
from pathlib import Path

from kgdbx.errors import SymbolError
from kgdbx.symbols.dwarf import DebugFile
from kgdbx.symbols.dwarf_data import ATTRIBUTE, TAG, find_all
from kgdbx.symbols.dwarf_unit import Unit
from kgdbx.symbols.file_cache import cached_by_file

__all__ = ("InlineSite", "InlineSites", "inlined_instances")

_ABSTRACT_ORIGIN = ATTRIBUTE["DW_AT_abstract_origin"]
_CALL_FILE, _CALL_LINE = ATTRIBUTE["DW_AT_call_file"], ATTRIBUTE["DW_AT_call_line"]
_INLINED, _SUBPROGRAM = TAG["DW_TAG_inlined_subroutine"], TAG["DW_TAG_subprogram"]


@dataclasses.dataclass(frozen=True)
class InlineSite:
    """One place where a function's body was put into another function.

    :ivar address: its first instruction: link-time address; in a ``.ko`` the offset in *section*
    :ivar function: the function with a symbol of its own that holds it
    :ivar file: source file of the call; empty if not known
    :ivar line: 1-based line of the call; 0 if not known
    :ivar section: name of the section in a ``.ko``, else empty
    """

    address: int
    function: str
    file: str
    line: int
    section: str


@dataclasses.dataclass(frozen=True)
class InlineSites:
    """Where a function was inlined.

    :ivar sites: by section and address
    :ivar truncated: whether the search was ended by its deadline, so that there may be more
    """

    name: str
    sites: tuple[InlineSite, ...]
    truncated: bool


def inlined_instances(path: Path, name: str, timeout_s: float | None = None) -> InlineSites:
    """Every place where a function was inlined and left code; each is searched once a process.

    :param path: vmlinux, or a module's ``.ko`` with debug information
    :param timeout_s: stop searching after this many seconds; a header's function is in more than
        a thousand source files
    :raises SymbolError: if the file has no function of this name, or no debug information
    """
    known = _known(path)
    if name in known:
        return known[name]
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    debug = DebugFile(path)
    origins: set[int] = set()
    found: dict[int, InlineSite] = {}
    truncated = False
    for unit, hits in debug.units_at(debug.name_offsets(name)):
        if truncated := deadline is not None and time.monotonic() > deadline:
            break
        named = unit.functions_named(name, hits)
        references = itertools.chain.from_iterable(
            find_all(unit.data, struct.pack("<I", origin - unit.start)) for origin in named
        )
        origins.update(named)
        found.update(_sites(unit, origins, sorted(references)))
    if not origins and not truncated:
        raise SymbolError(f"{path.name} has no function {name!r}", symbol=name)
    # Only link-time optimization makes references from one unit to another.
    if not truncated and debug.may_refer_across_units():
        for unit, hits in debug.units_at(debug.find_words(origins)):
            if truncated := deadline is not None and time.monotonic() > deadline:
                break
            found.update(_sites(unit, origins, hits))
    sites = sorted(found.values(), key=lambda site: (site.section, site.address))
    result = InlineSites(name, tuple(sites), truncated)
    if not truncated:
        known[name] = result
    return result


@cached_by_file
def _known(path: Path) -> dict[str, InlineSites]:
    # What was found in a file so far.
    return {}


def _sites(unit: Unit, origins: set[int], references: list[int]) -> dict[int, InlineSite]:
    """Inlined instances of *origins* by offset; *references* are the places that may name one."""
    sites: dict[int, InlineSite] = {}
    if not references:
        return sites

    def has_reference(start: int, end: int) -> bool:
        at = bisect.bisect_left(references, start)
        return at < len(references) and references[at] < end

    for position, tag, parents in unit.walk(has_reference):
        if position > references[-1]:
            break
        if tag != _INLINED:
            continue
        entry = unit.entry(position)
        address = unit.entry_address(entry)
        if entry.numbers.get(_ABSTRACT_ORIGIN) not in origins or address is None:
            continue
        around = map(unit.entry, reversed(parents))
        function = next((e for e in around if e.tag == _SUBPROGRAM), unit.root)
        section, offset = unit.debug.sections.split_address(address)
        sites[unit.start + position] = InlineSite(
            offset,
            unit.function_name(function),
            unit.file(entry.numbers.get(_CALL_FILE)),
            entry.numbers.get(_CALL_LINE, 0),
            section,
        )
    return sites
