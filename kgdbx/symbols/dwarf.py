"""DWARF entries of an ELF file: what drgn has no function for.

drgn reads types and finds lines; it does not say where the compiler put the bodies of inlined
functions, nor the addresses of a line. A kernel has 170 MB of entries, so nothing here reads them
all: a name's offset in ``.debug_str`` is searched in the bytes of ``.debug_info``, and only units
with a hit are parsed.
"""

import bisect
import functools
import itertools
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kgdbx.errors import SymbolError
from kgdbx.symbols.dwarf_data import ATTRIBUTE, FORM, find_all
from kgdbx.symbols.dwarf_sections import DebugSections
from kgdbx.symbols.dwarf_unit import Unit

__all__ = ("DebugFile",)

# gcc puts a name into .debug_info itself when that is not longer than an offset into .debug_str
_LONGEST_INLINE_NAME = 3
_FEW_WORDS = 8


class DebugFile:
    """The compilation units of one file.

    :param path: vmlinux, or a module's ``.ko`` with debug information
    :raises SymbolError: if it has none, or of a kind that is not supported
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections = DebugSections(path)
        self.info = self.sections[".debug_info"]
        self._starts = list(self._unit_starts())

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

    def unit(self, start: int) -> Unit:
        """The unit that starts at an offset in ``.debug_info``."""
        (length,) = struct.unpack_from("<I", self.info, start)
        return Unit(self, start, bytes(self.info[start : start + 4 + length]))

    def units_at(self, offsets: Iterable[int]) -> Iterator[tuple[Unit, list[int]]]:
        """Units that hold any of the offsets in ``.debug_info``, with their offsets in the unit."""

        def start(offset: int) -> int:
            return self._starts[bisect.bisect_right(self._starts, offset) - 1]

        for begin, group in itertools.groupby(sorted(offsets), key=start):
            yield self.unit(begin), [offset - begin for offset in group]

    def unit_containing(self, address: int) -> Unit | None:
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
        data = self.sections[".debug_aranges"]
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
        offsets = self.find_words(find_all(bytes(self.sections[".debug_str"]), text))
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
        pair = bytes((ATTRIBUTE["DW_AT_abstract_origin"], FORM["ref_addr"]))
        return pair in bytes(self.sections[".debug_abbrev"])


def _overlaps_itself(pattern: bytes) -> bool:
    # Whether one match can begin inside of another, where a regular expression misses it.
    return any(pattern.endswith(pattern[:size]) for size in range(1, len(pattern)))
