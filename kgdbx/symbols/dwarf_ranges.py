"""Range lists: the parts of an entry's code, where it is in several places."""

import struct
from collections.abc import Iterator

from elftools.dwarf.enums import ENUM_DW_RLE

from kgdbx.errors import SymbolError
from kgdbx.symbols.dwarf_data import read_uleb
from kgdbx.symbols.dwarf_sections import DebugSections

__all__ = ("read_ranges",)


def read_ranges(
    sections: DebugSections, version: int, offset: int, base: int
) -> Iterator[tuple[int, int]]:
    """First and end address of each range at an offset in the section of the DWARF version.

    :param base: address that the ranges count from
    :raises SymbolError: if the list has an entry of unknown kind
    """
    if version >= 5:
        yield from _rnglist(sections, offset, base)
        return
    for low, high in struct.iter_unpack("<QQ", sections[".debug_ranges"][offset:]):
        if not low and not high:
            return
        if low == (1 << 64) - 1:
            base = high
        else:
            yield base + low, base + high


def _rnglist(sections: DebugSections, offset: int, base: int) -> Iterator[tuple[int, int]]:
    data = sections[".debug_rnglists"]
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
            raise SymbolError(f"{sections.path.name} has an unknown range list entry {kind}")
