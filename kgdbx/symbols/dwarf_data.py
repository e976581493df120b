"""How DWARF stores values: its numbers of things, sizes of forms, LEB128 numbers and strings."""

from elftools.dwarf.enums import ENUM_DW_AT, ENUM_DW_FORM, ENUM_DW_TAG

__all__ = (
    "ATTRIBUTE",
    "FORM",
    "FORM_SIZES",
    "TAG",
    "ULEB_FORMS",
    "find_all",
    "read_sleb",
    "read_string",
    "read_uleb",
    "write_uleb",
)

ATTRIBUTE: dict[str, int] = ENUM_DW_AT
"""Attributes by their names."""

TAG: dict[str, int] = ENUM_DW_TAG
"""Kinds of entries by their names."""

FORM: dict[str, int] = {name.removeprefix("DW_FORM_"): n for name, n in ENUM_DW_FORM.items()}
"""Forms by their names without ``DW_FORM_``."""

FORM_SIZES = {
    FORM[name]: size
    for size, names in {
        0: "flag_present implicit_const",
        1: "data1 flag ref1",
        2: "data2 ref2",
        4: "data4 ref4 strp sec_offset ref_addr line_strp ref_sup4 strp_sup GNU_ref_alt"
        " GNU_strp_alt",
        8: "addr data8 ref8 ref_sig8 ref_sup8",
        16: "data16",
    }.items()
    for name in names.split()
}
"""Bytes that the forms of a fixed size take in the entry itself."""

ULEB_FORMS = {FORM["udata"], FORM["ref_udata"]}


def find_all(data: bytes, text: bytes) -> list[int]:
    """Where a text stands in the data, overlapping ones too."""
    found = []
    at = data.find(text)
    while at >= 0:
        found.append(at)
        at = data.find(text, at + 1)
    return found


def read_string(data: bytes | memoryview, at: int) -> tuple[str, int]:
    """The NUL-terminated string at a position, and where it ends."""
    end = at
    while data[end]:
        end += 1
    return bytes(data[at:end]).decode("utf-8", "replace"), end + 1


def read_uleb(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The unsigned LEB128 number at a position, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def read_sleb(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The signed LEB128 number at a position, and where it ends."""
    value, end = read_uleb(data, at)
    bits = 7 * (end - at)
    return value - (1 << bits) if value >> bits - 1 else value, end


def write_uleb(value: int) -> bytes:
    """A number as unsigned LEB128."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))
