"""One field of a definition: the C that records it, and how its bytes are read again."""

from collections.abc import Callable
from dataclasses import dataclass

import drgn

from kgdbx.probes.definition import FetchType, Field
from kgdbx.probes.expression import (
    AtSymbol,
    Dereference,
    Expr,
    Register,
    Special,
    String,
    format_expression,
    is_text,
)
from kgdbx.probes.fetch import (
    MAX_STRING_BYTES,
    FieldValue,
    Hex,
    converter,
    decode_text,
    plain_value,
)
from kgdbx.probes.scope import KernelScope
from kgdbx.resident.lower import Lowering
from kgdbx.resident.record import HEADER
from kgdbx.resident.text import is_char_array, string_place
from kgdbx.resident.values import AGGREGATES, NotResident, Place, Scalar, Value, bare, scalar_of

__all__ = ("Recorded", "record_field")

Decoder = Callable[[bytes], FieldValue]

_STRING_BYTES = MAX_STRING_BYTES + 2
_STRING_SLOT = -(-_STRING_BYTES // 8) * 8
_MAX_AGGREGATE_BYTES = 1024
_CHARS = (drgn.PrimitiveType.C_CHAR, drgn.PrimitiveType.C_SIGNED_CHAR)
_IN_HEADER = ("comm", "cpu", "pid", "tgid")


@dataclass(frozen=True)
class Recorded:
    """What became of a field.

    :ivar size_bytes: room in the record; nothing for a value that is known now
    :ivar header_offset_bytes: where it is in the header of every record; None if it is not there
    """

    size_bytes: int
    decode: Decoder
    header_offset_bytes: int | None = None


def record_field(field: Field, lower: Lowering, scope: KernelScope, to: str) -> Recorded:
    """Append the statements that record a field.

    :param to: C expression of the address to write it to
    :raises NotResident: if that cannot be done in the guest
    """
    expr, type_ = field.expression, field.type
    if isinstance(expr, Special) and expr.name in _IN_HEADER:
        return _header(expr.name, type_, scope)
    if isinstance(expr, String):
        text = expr.value
        return Recorded(0, lambda data: text)
    if is_text(expr):
        raise NotResident(f"'{format_expression(expr)}' is a string that '?:' chooses")
    if type_ is None:
        return _untyped(expr, lower, to)
    user = type_.base == "ustring" or (isinstance(expr, Dereference) and expr.user)
    if type_.is_string:
        if type_.count is None:
            return _string(expr, lower, user, to)
        return _strings(expr, type_.count, lower, user, to)
    convert = converter(type_)
    if type_.count is not None:
        return _array(expr, type_, lower, to, lambda number: convert(scope, number))
    if isinstance(expr, Dereference | AtSymbol):
        size = type_.size_bytes
        lower.code.read(to, lower.memory(expr), size)
        return Recorded(size, lambda data: convert(scope, int.from_bytes(data, "little")))
    value = lower.value(expr)
    scalar = value.scalar
    _store(lower, value, to)
    return Recorded(scalar.size_bytes, lambda data: convert(scope, _number(data, scalar)))


def _header(name: str, type_: FetchType | None, scope: KernelScope) -> Recorded:
    fields = HEADER.fields
    assert fields is not None
    form, offset = fields[name][:2]
    if name == "comm":
        return Recorded(
            form.itemsize, lambda data: data.split(b"\0")[0].decode("utf-8", "replace"), offset
        )
    convert = converter(type_ or FetchType("u"))
    if type_ is not None and (type_.is_string or type_.count is not None):
        raise NotResident(f"${name} is no address")
    return Recorded(
        form.itemsize, lambda data: convert(scope, int.from_bytes(data, "little")), offset
    )


def _untyped(expr: Expr, lower: Lowering, to: str) -> Recorded:
    is_hex = isinstance(expr, Register | Dereference | AtSymbol) or (
        isinstance(expr, Special) and expr.name == "stack"
    )
    found = lower.operand(expr)
    if isinstance(found, Place):
        if found.kind is drgn.TypeKind.FUNCTION:
            return _number_field(lower, found.address, to)
        if found.kind in AGGREGATES:
            return _aggregate(found, lower, to)
        scalar = scalar_of(found.model)
        if scalar.bits == scalar.storage_bits and not found.model.bit_offset_:
            lower.code.read(to, found, scalar.size_bytes)
            return Recorded(scalar.size_bytes, _decoder(found.model, scalar, is_hex))
    value = lower.loaded(found)
    if value.is_constant:
        known = Hex(int(value.model)) if is_hex else plain_value(value.model)
        return Recorded(0, lambda data: known)
    _store(lower, value, to)
    return Recorded(value.scalar.size_bytes, _decoder(value.model, value.scalar, is_hex))


def _number_field(lower: Lowering, text: str, to: str) -> Recorded:
    name = lower.code.variable("const u64", text)
    lower.code.line(f"__builtin_memcpy({to}, &{name}, 8);")
    return Recorded(8, lambda data: Hex(int.from_bytes(data, "little")))


def _decoder(model: drgn.Object, scalar: Scalar, is_hex: bool) -> Decoder:
    if is_hex or bare(model.type_).kind is drgn.TypeKind.POINTER:
        return lambda data: Hex(_number(data, scalar))
    return lambda data: _number(data, scalar)


def _number(data: bytes, scalar: Scalar) -> int:
    number = int.from_bytes(data, "little", signed=scalar.signed)
    return int(number != 0) if scalar.boolean else number


def _store(lower: Lowering, value: Value, to: str) -> None:
    scalar = value.scalar
    name = lower.code.variable(f"const {scalar.c_type}", value.text)
    lower.code.line(f"__builtin_memcpy({to}, &{name}, {scalar.size_bytes});")


def _aggregate(place: Place, lower: Lowering, to: str) -> Recorded:
    program, type_ = lower.program, place.model.type_
    name = type_.type_name()
    plain = bare(type_)
    if plain.kind is drgn.TypeKind.ARRAY:
        element = bare(plain.type).primitive
        if element in _CHARS:
            return _text_array(place, lower, to)
        if plain.length is None:
            raise NotResident(f"'{name}' has no known end")
    size = drgn.sizeof(type_)
    if size > _MAX_AGGREGATE_BYTES:
        raise NotResident(f"'{name}' has more than {_MAX_AGGREGATE_BYTES} bytes")
    if _shows_memory(type_):
        raise NotResident(f"'{name}' has strings in other memory than its own")
    if size:
        lower.code.read(to, place, size)

    def decode(data: bytes) -> FieldValue:
        return plain_value(drgn.Object.from_bytes_(program, type_, data))

    return Recorded(size, decode)


def _shows_memory(type_: drgn.Type) -> bool:
    # Whether drgn would follow pointers to char to show a value.
    type_ = bare(type_)
    if type_.kind is drgn.TypeKind.POINTER:
        target = bare(type_.type)
        return target.kind is drgn.TypeKind.INT and target.primitive in _CHARS
    if type_.kind is drgn.TypeKind.ARRAY:
        return _shows_memory(type_.type)
    return type_.kind in AGGREGATES and any(_shows_memory(m.type) for m in type_.members or ())


def _text_array(place: Place, lower: Lowering, to: str) -> Recorded:
    # An array that holds the text itself.
    length = bare(place.model.type_).length
    if length is None or length > MAX_STRING_BYTES:
        lower.code.string(f"(char *)({to})", place, _STRING_BYTES)
        return Recorded(_STRING_SLOT, _cut_text)
    if length:
        lower.code.read(to, place, length)
    return Recorded(length, lambda data: decode_text(data.partition(b"\0")[0]))


def _string(expr: Expr, lower: Lowering, user: bool, to: str) -> Recorded:
    place = string_place(lower, expr)
    if is_char_array(place):
        return _text_array(place, lower, to)
    lower.code.string(f"(char *)({to})", _in_user(place, user), _STRING_BYTES)
    return Recorded(_STRING_SLOT, _cut_text)


def _strings(expr: Expr, count: int, lower: Lowering, user: bool, to: str) -> Recorded:
    code = lower.code
    place = lower.target(expr)
    pointers = code.name()
    code.line(f"u64 {pointers}[{count}];")
    code.read(f"(u8 *){pointers}", place, 8 * count)
    code.line(f"for (u64 i = 0; i < {count}; i++) {{")
    model = drgn.Object(lower.program, "unsigned long", address=0)
    element = _in_user(Place(model, f"{pointers}[i]"), user)
    code.string(f"(char *)({to}) + i * {_STRING_SLOT}", element, _STRING_BYTES)
    code.line("}")
    size = count * _STRING_SLOT

    def decode(data: bytes) -> FieldValue:
        return [_cut_text(data[at:]) for at in range(0, size, _STRING_SLOT)]

    return Recorded(size, decode)


def _in_user(place: Place, user: bool) -> Place:
    if not user:
        return place
    return Place(place.model, place.base, place.offset_bytes, space="user", absolute=place.absolute)


def _cut_text(data: bytes) -> str:
    text, end, _ = data[:MAX_STRING_BYTES].partition(b"\0")
    return decode_text(text) + ("" if end else "...")


def _array(
    expr: Expr, type_: FetchType, lower: Lowering, to: str, convert: Callable[[int], FieldValue]
) -> Recorded:
    each, count = type_.size_bytes, type_.count or 0
    place = lower.target(expr)
    size = each * count
    if place.is_copy:
        size = min(size, drgn.sizeof(place.model) - place.offset_bytes)
    lower.code.read(to, place, size)

    def decode(data: bytes) -> FieldValue:
        chunks = (data[at : at + each] for at in range(0, size, each))
        return [convert(int.from_bytes(chunk, "little")) for chunk in chunks]

    return Recorded(size, decode)
