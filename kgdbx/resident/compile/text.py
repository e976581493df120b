"""Strings in conditions: equality, patterns, and whether there is any text."""

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING

import drgn

from kgdbx.probes.expression import AtSymbol, Dereference, Expr, Special, String, Ternary
from kgdbx.probes.value import MAX_STRING_BYTES, underlying_type
from kgdbx.resident.compile.code import peek
from kgdbx.resident.compile.values import NotResident, Place

if TYPE_CHECKING:
    from kgdbx.resident.compile.lower import Lowering

__all__ = ("is_char_array", "matches", "not_empty", "same_text", "string_place")

_CUT = b"..."
_CHARS = (
    drgn.PrimitiveType.C_CHAR,
    drgn.PrimitiveType.C_SIGNED_CHAR,
    drgn.PrimitiveType.C_UNSIGNED_CHAR,
)


@dataclass(frozen=True)
class _Subject:
    # C expressions: bytes that can be read without care, and how many of them are the text.
    bytes: str
    length: str


def is_char_array(place: Place) -> bool:
    """Whether a place holds the text itself."""
    return place.kind is drgn.TypeKind.ARRAY


def string_place(lower: "Lowering", expr: Expr) -> Place:
    """Where the text of an expression is: an array that holds it, or what a pointer leads to."""
    if isinstance(expr, Dereference | AtSymbol):
        return lower.memory(expr)
    found = lower.operand(expr)
    if isinstance(found, Place) and is_char_array(found):
        if underlying_type(underlying_type(found.model.type_).type).primitive not in _CHARS:
            raise NotResident("an array of something else than char is no string")
        return found
    return lower.target(expr)


def same_text(lower: "Lowering", left: Expr, right: Expr) -> str:
    """C expression that is 1 if two strings are equal."""
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Ternary) and isinstance(one.then, String | Special | Ternary):
            return _same_choice(lower, one, other)
    for one, other in ((left, right), (right, left)):
        if isinstance(other, String):
            if isinstance(one, String):
                return str(int(one.value == other.value))
            return _is_literal(lower, one, _encode(other.value))
    first, second = _subject(lower, left), _subject(lower, right)
    code = lower.code
    result = code.variable("s32", f"{first.length} == {second.length}")
    code.line(f"for (s64 i = 0; {result} && i < {first.length}; i++)")
    code.line(f"{result} = ({first.bytes})[i] == ({second.bytes})[i];")
    return result


def not_empty(lower: "Lowering", expr: Expr) -> str:
    """C expression that is 1 if a string has any characters."""
    if isinstance(expr, String):
        return str(int(bool(expr.value)))
    return f"({_subject(lower, expr).length} > 0)"


def matches(lower: "Lowering", expr: Expr, pattern: str) -> str:
    """C expression that is 1 if a string matches a pattern of ``* ? [...]``.

    ``?`` and ``[...]`` stand for one byte.
    """
    if isinstance(expr, String):
        return str(int(fnmatch.fnmatchcase(expr.value, pattern)))
    first, *others = _segments(pattern)
    subject, code = _subject(lower, expr), lower.code
    text, length = subject.bytes, subject.length
    if not others:
        same = [f"{length} == {len(first)}", *_tests(text, "", first)]
        return f"({' && '.join(same)})"
    *middles, last = others
    tests = [f"{length} >= {len(first)}", *_tests(text, "", first)]
    result = code.variable("s32", " && ".join(tests))
    at = code.variable("s64", str(len(first)))
    for segment in filter(None, middles):
        found = " && ".join(_tests(text, at, segment)) or "1"
        code.line(
            f"if ({result}) {{ {result} = 0; for (; {at} + {len(segment)} <= {length}; {at}++)"
        )
        code.line(f"if ({found}) {{ {result} = 1; {at} += {len(segment)}; break; }} }}")
    tests = [result, f"{length} - {at} >= {len(last)}"]
    tests += _tests(text, f"{length} - {len(last)}", last)
    return f"({' && '.join(tests)})"


def _same_choice(lower: "Lowering", choice: Ternary, other: Expr) -> str:
    code = lower.code
    test = lower.truth(choice.condition)
    first, before = code.capture(lambda: same_text(lower, choice.then, other))
    second, after = code.capture(lambda: same_text(lower, choice.otherwise, other))
    result = code.variable("s32")
    code.line(f"if ({test}) {{")
    code.lines += before
    code.line(f"{result} = {first}; }} else {{")
    code.lines += after
    code.line(f"{result} = {second}; }}")
    return result


def _encode(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as e:
        raise NotResident("the text to compare with is not UTF-8") from e
    if len(data) >= MAX_STRING_BYTES:
        raise NotResident(f"a text to compare with has less than {MAX_STRING_BYTES} bytes")
    return data


def _is_literal(lower: "Lowering", expr: Expr, literal: bytes) -> str:
    # Only as much is read as tells the difference.
    if b"\0" in literal:
        return "0"  # no string of the kernel has one
    code, size = lower.code, len(literal)
    place = _place(lower, expr)
    room = _array_bytes(place)
    if room is None:
        text = _buffer(lower, size + 2)
        length = code.string(f"(char *){text}", place, size + 2)
        tests = [f"{length} == {size + 1}", *_equal(text, literal)]
        return f"({' && '.join(tests)})"
    if size > room:
        return "0"
    compared = literal if size == room else literal + b"\0"
    return f"({' && '.join(_equal(_array(lower, place, len(compared)), compared))})"


def _subject(lower: "Lowering", expr: Expr) -> _Subject:
    code = lower.code
    place = _place(lower, expr)
    room = _array_bytes(place)
    if room is not None:
        if room > MAX_STRING_BYTES:
            raise NotResident(f"an array of more than {MAX_STRING_BYTES} bytes is not compared")
        text = _array(lower, place, room)
        length = code.variable("s64", "0")
        code.line(f"while ({length} < {room} && ({text})[{length}]) {length}++;")
        return _Subject(text, length)
    text = _buffer(lower, MAX_STRING_BYTES + len(_CUT) + 1)
    length = code.string(f"(char *){text}", place, MAX_STRING_BYTES + 2)
    # Cut as the text that would be shown.
    dots = code.variable("const u32", f"{int.from_bytes(_CUT, 'little'):#x}")
    end = MAX_STRING_BYTES + len(_CUT)
    code.line(f"if ({length} <= {MAX_STRING_BYTES}) {length}--; else {{")
    code.line(f"__builtin_memcpy({text} + {MAX_STRING_BYTES}, &{dots}, 4); {length} = {end}; }}")
    return _Subject(text, length)


def _place(lower: "Lowering", expr: Expr) -> Place:
    if isinstance(expr, Special) and expr.name == "comm":
        return lower.names.comm()
    if isinstance(expr, Ternary):
        raise NotResident("a string that '?:' chooses can be compared with == and != only")
    return string_place(lower, expr)


def _array_bytes(place: Place) -> int | None:
    # None for a string behind a pointer, and for an array whose end is not known.
    if not is_char_array(place):
        return None
    length: int | None = underlying_type(place.model.type_).length
    return length


def _buffer(lower: "Lowering", size_bytes: int) -> str:
    name = lower.code.name()
    lower.code.line(f"u8 {name}[{size_bytes}];")
    return name


def _array(lower: "Lowering", place: Place, size_bytes: int) -> str:
    if place.is_direct(size_bytes):
        return f"((const u8 *)({place.base}) + {place.offset_bytes})"
    name = _buffer(lower, size_bytes)
    lower.code.read(name, place, size_bytes)
    return name


def _equal(text: str, literal: bytes) -> list[str]:
    tests, at = [], 0
    while at < len(literal):
        size = next(size for size in (8, 4, 2, 1) if size <= len(literal) - at)
        number = int.from_bytes(literal[at : at + size], "little")
        tests.append(f"{peek(f'{text} + {at}', size)} == {number:#x}UL")
        at += size
    return tests or ["1"]


def _tests(text: str, start: str, segment: list[frozenset[int]]) -> list[str]:
    # One test for each byte that is not arbitrary.
    tests = []
    for offset, allowed in enumerate(segment):
        ranges = _ranges(allowed)
        if ranges == [(1, 255)]:
            continue
        byte = f"({text})[{start or 0} + {offset}]"
        parts = [
            f"{byte} == {low}" if low == high else f"(u8)({byte} - {low}) <= {high - low}"
            for low, high in ranges
        ]
        tests.append(f"({' || '.join(parts) or 0})")
    return tests


def _ranges(allowed: frozenset[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for byte in sorted(allowed):
        if ranges and ranges[-1][1] == byte - 1:
            ranges[-1] = ranges[-1][0], byte
        else:
            ranges.append((byte, byte))
    return ranges


def _segments(pattern: str) -> list[list[frozenset[int]]]:
    # What stands between the stars: for each byte those that fit. Brackets as fnmatch reads them.
    segments: list[list[frozenset[int]]] = [[]]
    at = 0
    while at < len(pattern):
        char, end = pattern[at], at + 1
        if char == "[":
            close = pattern.find("]", at + (3 if pattern[at + 1 : at + 2] == "!" else 2))
            end = close + 1 if close >= 0 else end
        piece = pattern[at:end]
        if char == "*":
            segments.append([])
        elif char == "?" or len(piece) > 1:
            accepted = (b for b in range(1, 256) if fnmatch.fnmatchcase(chr(b), piece))
            segments[-1].append(frozenset(accepted))
        else:
            segments[-1] += (frozenset((byte,)) for byte in _encode(char))
        at = end
    return segments
