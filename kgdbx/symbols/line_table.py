"""The line number program of a compilation unit: its head, and the rows that it makes.

DWARF 5, section 6.2.
"""

import dataclasses
import posixpath
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from elftools.dwarf.enums import ENUM_DW_LNCT

from kgdbx.symbols.dwarf_data import (
    FORM,
    FORM_SIZES,
    ULEB_FORMS,
    read_sleb,
    read_string,
    read_uleb,
)

__all__ = ("LineHeader", "Row", "StringAt", "line_starts", "read_line_header", "rows")

StringAt = Callable[[str, int], str]
_STRING, _STRP, _LINE_STRP = (FORM[name] for name in ("string", "strp", "line_strp"))

# opcodes of the line number program: DWARF 5, section 7.22
_END_SEQUENCE, _SET_ADDRESS = 1, 2
_COPY, _ADVANCE_PC, _ADVANCE_LINE, _SET_FILE = 1, 2, 3, 4
_NEGATE_STMT, _CONST_ADD_PC, _FIXED_ADVANCE_PC = 6, 8, 9


@dataclasses.dataclass(frozen=True)
class LineHeader:
    """The head of a unit's line number program.

    :ivar files: by the number that ``DW_AT_decl_file`` and the program use
    :ivar program: the program's bytes
    """

    version: int
    minimum_instruction_length: int
    default_is_stmt: bool
    line_base: int
    line_range: int
    operand_counts: tuple[int, ...]
    files: tuple[str, ...]
    program: bytes


class Row(NamedTuple):
    """From this address on, the code is of this line."""

    address: int
    file: int
    line: int
    is_stmt: bool
    end_sequence: bool


def read_line_header(string: StringAt, data: memoryview, offset: int) -> LineHeader:
    """The head of the line number program at an offset in ``.debug_line``.

    :param string: the string at an offset in ``.debug_str`` or ``.debug_line_str``
    :param data: ``.debug_line``
    """
    length, version = struct.unpack_from("<IH", data, offset)
    end = offset + 4 + length
    at = offset + (8 if version >= 5 else 6)
    (header_length,) = struct.unpack_from("<I", data, at)
    at += 4
    program = bytes(data[at + header_length : end])
    minimum = data[at]
    at += 2 if version >= 4 else 1  # over the VLIW operations per instruction
    default_is_stmt, line_base, line_range, opcode_base = struct.unpack_from("<BbBB", data, at)
    at += 4
    counts = tuple(data[at : at + opcode_base - 1])
    at += opcode_base - 1
    files = _files(string, data, at) if version >= 5 else _old_files(data, at)
    return LineHeader(
        version, minimum, bool(default_is_stmt), line_base, line_range, counts, files, program
    )


def _files(string: StringAt, data: memoryview, at: int) -> tuple[str, ...]:
    directories, at = _file_table(string, data, at)
    files, _ = _file_table(string, data, at)
    names = [name for name, _ in directories]
    return tuple(_path(names, name, directory) for name, directory in files)


def _file_table(string: StringAt, data: memoryview, at: int) -> tuple[list[tuple[str, int]], int]:
    """Names and directory numbers of a version 5 table, and where it ends."""
    formats, at = [], at + 1
    for _ in range(data[at - 1]):
        kind, at = read_uleb(data, at)
        form, at = read_uleb(data, at)
        formats.append((kind, form))
    count, at = read_uleb(data, at)
    rows = []
    for _ in range(count):
        name, directory = "", 0
        for kind, form in formats:
            value: int | str = 0
            if form == _STRING:
                value, at = read_string(data, at)
            elif form in ULEB_FORMS:
                value, at = read_uleb(data, at)
            else:
                size = FORM_SIZES[form]
                value = int.from_bytes(data[at : at + size], "little")
                at += size
                if form in (_STRP, _LINE_STRP):
                    section = ".debug_str" if form == _STRP else ".debug_line_str"
                    value = string(section, value)
            if kind == ENUM_DW_LNCT["DW_LNCT_path"] and isinstance(value, str):
                name = value
            elif kind == ENUM_DW_LNCT["DW_LNCT_directory_index"] and isinstance(value, int):
                directory = value
        rows.append((name, directory))
    return rows, at


def _old_files(data: memoryview, at: int) -> tuple[str, ...]:
    """The file table of versions 2 to 4, where files and directories count from 1."""
    directories, files = [""], [""]
    while data[at]:
        name, at = read_string(data, at)
        directories.append(name)
    at += 1
    while data[at]:
        name, at = read_string(data, at)
        directory, at = read_uleb(data, at)
        _, at = read_uleb(data, at)  # time of last change
        _, at = read_uleb(data, at)  # size
        files.append(_path(directories, name, directory))
    return tuple(files)


def _path(directories: list[str], name: str, directory: int) -> str:
    """A file's path, relative to the directory of the compilation if it lies below that."""
    if directory >= len(directories):
        return name
    path = posixpath.normpath(posixpath.join(directories[directory], name))
    return path.removeprefix(directories[0].rstrip("/") + "/") if directories[0] else path


def line_starts(header: LineHeader, ranges: list[tuple[int, int]]) -> Iterator[Row]:
    """Rows inside of *ranges* where another line than before begins."""
    here: tuple[int, int] | None = None
    found = False
    for row in rows(header):
        if here != (row.file, row.line):
            here, found = (row.file, row.line), False
        # a line goes on over several rows, one for each column
        if row.is_stmt and not found and not row.end_sequence:
            found = any(low <= row.address < high for low, high in ranges)
            if found:
                yield row
        if row.end_sequence:
            here = None


def rows(header: LineHeader) -> Iterator[Row]:
    """The rows of the line table, from running its program (DWARF 5, section 6.2)."""
    program, at = header.program, 0
    opcode_base = len(header.operand_counts) + 1
    start = Row(0, 1, 1, header.default_is_stmt, False)
    row = start

    def advanced(operations: int) -> int:
        return row.address + operations * header.minimum_instruction_length

    while at < len(program):
        opcode = program[at]
        at += 1
        if opcode >= opcode_base:
            operations, lines = divmod(opcode - opcode_base, header.line_range)
            row = row._replace(
                address=advanced(operations), line=row.line + header.line_base + lines
            )
            yield row
        elif opcode == 0:
            size, at = read_uleb(program, at)
            extended = program[at]
            if extended == _END_SEQUENCE:
                yield row._replace(end_sequence=True)
                row = start
            elif extended == _SET_ADDRESS:
                row = row._replace(address=struct.unpack_from("<Q", program, at + 1)[0])
            at += size
        elif opcode == _COPY:
            yield row
        elif opcode == _ADVANCE_PC:
            operations, at = read_uleb(program, at)
            row = row._replace(address=advanced(operations))
        elif opcode == _ADVANCE_LINE:
            lines, at = read_sleb(program, at)
            row = row._replace(line=row.line + lines)
        elif opcode == _SET_FILE:
            file, at = read_uleb(program, at)
            row = row._replace(file=file)
        elif opcode == _NEGATE_STMT:
            row = row._replace(is_stmt=not row.is_stmt)
        elif opcode == _CONST_ADD_PC:
            operations = (255 - opcode_base) // header.line_range
            row = row._replace(address=advanced(operations))
        elif opcode == _FIXED_ADVANCE_PC:
            (size,) = struct.unpack_from("<H", program, at)
            row = row._replace(address=row.address + size)
            at += 2
        else:
            for _ in range(header.operand_counts[opcode - 1]):
                _, at = read_uleb(program, at)
