"""Abbreviations: how the entries of a DWARF unit are laid out."""

from typing import NamedTuple

from kgdbx.symbols.dwarf_data import ATTRIBUTE, FORM, FORM_SIZES, read_sleb, read_uleb

__all__ = ("Abbreviation", "read_abbreviations")

_NAME, _SIBLING = ATTRIBUTE["DW_AT_name"], ATTRIBUTE["DW_AT_sibling"]
_IMPLICIT_CONST, _REF4 = FORM["implicit_const"], FORM["ref4"]


class Abbreviation(NamedTuple):
    """What all entries with one code have in common.

    :ivar attributes: name, form and implicit constant of each
    :ivar size: of the attributes in bytes; -1 if it varies
    :ivar sibling: offset of a 4-byte ``DW_AT_sibling``; -1 if there is none or it varies
    :ivar name: offset of ``DW_AT_name``; -1 likewise
    """

    tag: int
    has_children: bool
    attributes: tuple[tuple[int, int, int], ...]
    size: int
    sibling: int
    name: int
    name_form: int


def read_abbreviations(data: memoryview, offset: int) -> dict[int, Abbreviation]:
    """The table at an offset in ``.debug_abbrev``, by codes."""
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


def _abbreviation(
    tag: int, has_children: bool, attributes: list[tuple[int, int, int]]
) -> Abbreviation:
    size, sibling, name, name_form = 0, -1, -1, 0
    for attribute, form, _ in attributes:
        if attribute == _SIBLING and form == _REF4:
            sibling = size
        if attribute == _NAME:
            name, name_form = size, form
        if form not in FORM_SIZES:
            size = -1
            break
        size += FORM_SIZES[form]
    return Abbreviation(tag, has_children, tuple(attributes), size, sibling, name, name_form)
