"""One field of a definition: the C that records it, and how its bytes are read again."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import drgn

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
from kgdbx.probes.fetch import converter
from kgdbx.probes.field import STACK_DEPTH, FetchType, Field
from kgdbx.probes.scope import KernelScope
from kgdbx.probes.value import (
    AGGREGATES,
    MAX_STRING_BYTES,
    FieldValue,
    Hex,
    KernelStack,
    decode_text,
    plain_value,
    underlying_type,
)
from kgdbx.resident.compile.lower import Lowering
from kgdbx.resident.compile.text import is_char_array, string_place
from kgdbx.resident.compile.values import (
    NotResident,
    Place,
    Scalar,
    Value,
    scalar_of,
)
from kgdbx.resident.layout import FieldLayout
from kgdbx.resident.record import HEADER
from kgdbx.symbols.kernel import Kernel

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

    :ivar layout: its bytes as data; not yet where they are, nor its fault bit
    :ivar decode: its value from its bytes, with the kernel's symbols
    :ivar header_offset_bytes: where it is in the header of every record; None if it is not there
    """

    layout: FieldLayout
    decode: Decoder
    header_offset_bytes: int | None = None

    @property
    def size_bytes(self) -> int:
        """Room in the record; nothing for a value that is known now."""
        return self.layout.size_bytes


def record_field(
    field: Field, lower: Lowering, scope: KernelScope, to: str, *, in_header: bool = True
) -> Recorded:
    """Append the statements that record a field.

    :param to: C expression of the address to write it to
    :param in_header: nothing is to be done for what is in the header of every record
    :raises NotResident: if that cannot be done in the guest
    """
    expr, type_ = field.expression, field.type
    shape = _Shape(field.name)
    if isinstance(expr, Special) and expr.name == "func":
        place = scope.kernel.symbolize(lower.names.point.address)
        return shape.constant(place.partition("+")[0])
    if in_header and isinstance(expr, Special) and expr.name in _IN_HEADER:
        return _header(expr.name, type_, scope, shape)
    if isinstance(expr, Special) and expr.name == "kstack":
        depth = type_.count if type_ and type_.count else STACK_DEPTH
        return _stack(depth, lower, scope.kernel, to, shape)
    if isinstance(expr, String):
        return shape.constant(expr.value)
    if is_text(expr):
        raise NotResident(f"'{format_expression(expr)}' is a string that '?:' chooses")
    if type_ is None:
        return _untyped(expr, lower, to, shape)
    user = type_.base == "ustring" or (isinstance(expr, Dereference) and expr.user)
    if type_.is_string:
        if type_.count is None:
            return _string(expr, lower, user, to, shape)
        return _strings(expr, type_.count, lower, user, to, shape)
    convert = converter(type_)
    if type_.count is not None:
        return _array(expr, type_, lower, to, lambda number: convert(scope, number), shape)
    if isinstance(expr, Dereference | AtSymbol):
        size = type_.size_bytes
        lower.code.read(to, lower.memory(expr), size)
        return Recorded(
            shape.typed(type_, size), lambda data: convert(scope, int.from_bytes(data, "little"))
        )
    value = lower.value(expr)
    scalar = value.scalar
    _store(lower, value, to)
    return Recorded(
        shape.typed(type_, scalar.size_bytes, is_signed=scalar.signed),
        lambda data: convert(scope, _number(data, scalar)),
    )


@dataclass(frozen=True)
class _Shape:
    # Makes the layouts of one field.
    name: str

    def number(self, size_bytes: int, kind: str) -> FieldLayout:
        return FieldLayout(self.name, 0, size_bytes, kind, is_signed=kind == "s")

    def typed(
        self,
        type_: FetchType,
        size_bytes: int,
        *,
        is_signed: bool = False,
        count: int | None = None,
    ) -> FieldLayout:
        is_bit_field = type_.base == "b"
        bits = (0, 8 * type_.size_bytes)
        return FieldLayout(
            self.name,
            0,
            size_bytes,
            "u" if is_bit_field else type_.base,
            count=count,
            bits=(type_.bit_offset, type_.bit_width) if is_bit_field else bits,
            is_signed=is_signed,
        )

    def text(
        self, size_bytes: int, limit_bytes: int | None = None, count: int | None = None
    ) -> FieldLayout:
        return FieldLayout(self.name, 0, size_bytes, "string", count=count, limit_bytes=limit_bytes)

    def constant(self, value: int | str, *, is_hex: bool = False) -> Recorded:
        kind = "string" if isinstance(value, str) else "x" if is_hex else "s"
        layout = FieldLayout(self.name, 0, 0, kind, value=value)
        shown = Hex(value) if is_hex and isinstance(value, int) else value
        return Recorded(layout, lambda data: shown)


def _stack(depth: int, lower: Lowering, kernel: Kernel, to: str, shape: _Shape) -> Recorded:
    if kernel.object_address("stack_trace_save_regs") is None:
        raise NotResident("this kernel was built without CONFIG_STACKTRACE")
    lower.code.calls_kernel = True
    lower.code.line(f"save_stack(c, (u64 *)({to}), {depth});")
    symbolize = functools.lru_cache(maxsize=None)(kernel.symbolize)

    def decode(data: bytes) -> FieldValue:
        words = memoryview(data).cast("Q")
        return KernelStack(symbolize(word) for word in itertools.takewhile(bool, words))

    return Recorded(FieldLayout(shape.name, 0, 8 * depth, "stack", count=depth), decode)


def _header(name: str, type_: FetchType | None, scope: KernelScope, shape: _Shape) -> Recorded:
    fields = HEADER.fields
    assert fields is not None
    form, offset = fields[name][:2]
    if name == "comm":
        return Recorded(
            shape.text(form.itemsize),
            lambda data: data.split(b"\0")[0].decode("utf-8", "replace"),
            offset,
        )
    type_ = type_ or FetchType("u")
    convert = converter(type_)
    if type_.is_string or type_.count is not None:
        raise NotResident(f"${name} is no address")
    return Recorded(
        shape.typed(type_, form.itemsize),
        lambda data: convert(scope, int.from_bytes(data, "little")),
        offset,
    )


def _untyped(expr: Expr, lower: Lowering, to: str, shape: _Shape) -> Recorded:
    is_hex = isinstance(expr, Register | Dereference | AtSymbol) or (
        isinstance(expr, Special) and expr.name == "stack"
    )
    found = lower.operand(expr)
    if isinstance(found, Place):
        if found.kind is drgn.TypeKind.FUNCTION:
            return _number_field(lower, found.address, to, shape)
        if found.kind in AGGREGATES:
            return _aggregate(found, lower, to, shape)
        scalar = scalar_of(found.model)
        if scalar.bits == scalar.storage_bits and not found.model.bit_offset_:
            lower.code.read(to, found, scalar.size_bytes)
            return _scalar(found.model, scalar, is_hex, shape)
    value = lower.loaded(found)
    if value.is_constant:
        known = int(value.model) if is_hex else plain_value(value.model)
        if isinstance(known, int | str):
            return shape.constant(known, is_hex=is_hex or isinstance(known, Hex))
    _store(lower, value, to)
    return _scalar(value.model, value.scalar, is_hex, shape)


def _number_field(lower: Lowering, text: str, to: str, shape: _Shape) -> Recorded:
    name = lower.code.variable("const u64", text)
    lower.code.line(f"__builtin_memcpy({to}, &{name}, 8);")
    return Recorded(shape.number(8, "x"), lambda data: Hex(int.from_bytes(data, "little")))


def _scalar(model: drgn.Object, scalar: Scalar, is_hex: bool, shape: _Shape) -> Recorded:
    if is_hex or underlying_type(model.type_).kind is drgn.TypeKind.POINTER:
        return Recorded(
            shape.number(scalar.size_bytes, "x"), lambda data: Hex(_number(data, scalar))
        )
    layout = shape.number(scalar.size_bytes, "s" if scalar.signed else "u")
    return Recorded(layout, lambda data: _number(data, scalar))


def _number(data: bytes, scalar: Scalar) -> int:
    number = int.from_bytes(data, "little", signed=scalar.signed)
    return int(number != 0) if scalar.boolean else number


def _store(lower: Lowering, value: Value, to: str) -> None:
    scalar = value.scalar
    name = lower.code.variable(f"const {scalar.c_type}", value.text)
    lower.code.line(f"__builtin_memcpy({to}, &{name}, {scalar.size_bytes});")


def _aggregate(place: Place, lower: Lowering, to: str, shape: _Shape) -> Recorded:
    program, type_ = lower.program, place.model.type_
    name = type_.type_name()
    plain = underlying_type(type_)
    if plain.kind is drgn.TypeKind.ARRAY:
        element = underlying_type(plain.type).primitive
        if element in _CHARS:
            return _text_array(place, lower, to, shape)
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

    if not size:
        return Recorded(FieldLayout(shape.name, 0, 0, "bytes", value=""), decode)
    return Recorded(FieldLayout(shape.name, 0, size, "raw", type_name=name), decode)


def _shows_memory(type_: drgn.Type) -> bool:
    # Whether drgn would follow pointers to char to show a value.
    type_ = underlying_type(type_)
    if type_.kind is drgn.TypeKind.POINTER:
        target = underlying_type(type_.type)
        return target.kind is drgn.TypeKind.INT and target.primitive in _CHARS
    if type_.kind is drgn.TypeKind.ARRAY:
        return _shows_memory(type_.type)
    return type_.kind in AGGREGATES and any(_shows_memory(m.type) for m in type_.members or ())


def _text_array(place: Place, lower: Lowering, to: str, shape: _Shape) -> Recorded:
    # An array that holds the text itself.
    length = underlying_type(place.model.type_).length
    if length is None or length > MAX_STRING_BYTES:
        lower.code.string(f"(char *)({to})", place, _STRING_BYTES)
        return Recorded(shape.text(_STRING_SLOT, MAX_STRING_BYTES), _cut_text)
    if not length:
        return shape.constant("")
    lower.code.read(to, place, length)
    return Recorded(shape.text(length), lambda data: decode_text(data.partition(b"\0")[0]))


def _string(expr: Expr, lower: Lowering, user: bool, to: str, shape: _Shape) -> Recorded:
    place = string_place(lower, expr)
    if is_char_array(place):
        return _text_array(place, lower, to, shape)
    lower.code.string(f"(char *)({to})", _in_user(place, user), _STRING_BYTES)
    return Recorded(shape.text(_STRING_SLOT, MAX_STRING_BYTES), _cut_text)


def _strings(
    expr: Expr, count: int, lower: Lowering, user: bool, to: str, shape: _Shape
) -> Recorded:
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

    return Recorded(shape.text(size, MAX_STRING_BYTES, count), decode)


def _in_user(place: Place, user: bool) -> Place:
    if not user:
        return place
    return Place(place.model, place.base, place.offset_bytes, space="user", absolute=place.absolute)


def _cut_text(data: bytes) -> str:
    text, end, _ = data[:MAX_STRING_BYTES].partition(b"\0")
    return decode_text(text) + ("" if end else "...")


def _array(
    expr: Expr,
    type_: FetchType,
    lower: Lowering,
    to: str,
    convert: Callable[[int], FieldValue],
    shape: _Shape,
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

    if size % each:  # the array ends inside of the last element
        return Recorded(FieldLayout(shape.name, 0, size, "bytes"), decode)
    return Recorded(shape.typed(type_, size, count=size // each), decode)
