"""From an aggregation to C that adds a hit to its CPU's table, without a lock and without a record.

The key of a place in a table is made of words, so that keys are compared word by word; text has
zeros behind its end.
"""

import dataclasses
from dataclasses import dataclass

from kgdbx.probes.aggregation import Aggregation
from kgdbx.probes.expression import Special
from kgdbx.probes.field import Field
from kgdbx.probes.scope import KernelScope
from kgdbx.probes.value import decode_text
from kgdbx.resident.compile.code import Code
from kgdbx.resident.compile.fields import Recorded, record_field
from kgdbx.resident.compile.lower import Lowering
from kgdbx.resident.compile.names import Names
from kgdbx.resident.compile.values import NotResident, foreign_errors, scalar_of
from kgdbx.resident.layout import FieldLayout

__all__ = ("MAX_KEY_BYTES", "MapShape", "aggregate", "key_fields")

MAX_KEY_BYTES = 1024
"""Longest key, of all its parts."""

_POWERS = 66  # negative, 0, and a bucket for each bit of an u64
_SIGN = 1 << 63
_COMM_BYTES = 16
_WORD_BYTES = 8


@dataclass(frozen=True)
class MapShape:
    """What the tables of a map hold.

    :ivar name: of the map, without ``@``
    :ivar keys: names of the parts of its key
    :ivar key_bytes: length of a key, a multiple of 8
    :ivar is_signed: whether values are
    :ivar steps: of a histogram of equal steps: least value, end and width
    """

    name: str
    function: str
    keys: tuple[str, ...]
    key_bytes: int
    is_signed: bool
    steps: tuple[int, int, int] | None = None

    @property
    def value_words(self) -> int:
        """Words of values at a key."""
        if self.function == "hist":
            return _POWERS
        if self.steps is not None:
            least, end, step = self.steps
            return (end - least) // step + 2
        return 1 if self.function == "count" else 2

    @property
    def place_bytes(self) -> int:
        """Size of a place in a table: its state, a key, and the values."""
        return _WORD_BYTES * (1 + self.value_words) + self.key_bytes


def key_fields(
    keys: tuple[Field, ...], names: Names, scope: KernelScope, code: Code
) -> tuple[list[Recorded], int]:
    """Append statements that make a key in ``u8 *key``, all zeros before.

    :return: its parts, their layouts with their places in the key, and its size in bytes
    """
    parts: list[Recorded] = []
    end = 0
    for field in keys:
        to = f"(u8 *)key + {end}"
        with foreign_errors(field.expression):
            part = _part(field, names, scope, code, to)
        if part.layout.kind == "string" and part.size_bytes:
            code.line(f"clean_text({to}, {part.size_bytes});")
        parts.append(
            dataclasses.replace(part, layout=dataclasses.replace(part.layout, offset_bytes=end))
        )
        end += -(-part.size_bytes // _WORD_BYTES) * _WORD_BYTES
    if end > MAX_KEY_BYTES:
        raise NotResident(f"a key of {end} bytes; at most {MAX_KEY_BYTES}")
    return parts, end


def aggregate(
    what: Aggregation, names: Names, scope: KernelScope
) -> tuple[str, MapShape, list[Recorded], bool]:
    """Statements of a function of ``c`` and ``struct table *tables`` that adds a hit to a map.

    It returns -1 if something could not be read, else 1.

    :return: them, the map's shape, the parts of its key, and whether functions of the kernel are
        called
    :raises NotResident: if it cannot be done in the guest
    """
    code = Code("return -1", reports=False)
    lower = Lowering(names, code)
    value, is_signed = "0", False
    if what.value is not None:
        with foreign_errors(what.value):
            found = lower.value(what.value)
            is_signed = scalar_of(found.model).signed
        value = code.variable("const u64", f"(u64)({'s64' if is_signed else 'u64'}){found.text}")
    parts, key_bytes = key_fields(what.keys, names, scope, code)
    keys = tuple(field.name for field in what.keys)
    shape = MapShape(what.name, what.function, keys, key_bytes, is_signed, what.steps)
    words = key_bytes // _WORD_BYTES
    lines = ["u64 at, *values;", f"u64 key[{max(1, words)}] = {{ 0 }};", *code.lines]
    if not code.calls_kernel:
        # Nobody but an interrupt adds to this CPU's table meanwhile.
        lines.append("gs_add32(PREEMPT_COUNT, 1);")
    lines += (
        f"values = CALLED(find_values(tables + current_cpu(), key, {words}, {shape.value_words}, "
        "places));",
        "if (likely(values)) {",
        *(f"\t{line}" for line in _update(shape, value)),
        "}",
    )
    if not code.calls_kernel:
        lines.append("gs_add32(PREEMPT_COUNT, -1);")
    text = "\n".join(f"\t{line}" for line in (*lines, "(void)at;", "return 1;"))
    return text, shape, parts, code.calls_kernel


def _part(field: Field, names: Names, scope: KernelScope, code: Code, to: str) -> Recorded:
    expr = field.expression
    if isinstance(expr, Special) and expr.name == "comm":
        code.line(f"__builtin_memcpy({to}, c->task + TASK_COMM, {_COMM_BYTES});")
        layout = FieldLayout(field.name, 0, _COMM_BYTES, "string")
        return Recorded(layout, lambda data: decode_text(data.partition(b"\0")[0]))
    if isinstance(expr, Special) and expr.name == "func":
        code.line(f"*(u64 *)({to}) = c->ip;")
        layout = FieldLayout(field.name, 0, _WORD_BYTES, "symbol")
        return Recorded(layout, lambda data: _function(scope, data))
    return record_field(field, Lowering(names, code), scope, to, in_header=False)


def _function(scope: KernelScope, data: bytes) -> str:
    return scope.kernel.symbolize(int.from_bytes(data, "little")).partition("+")[0]


def _update(shape: MapShape, value: str) -> list[str]:
    signed = int(shape.is_signed)
    if shape.function == "hist":
        return [f"add_to(values + power_bucket({value}, {signed}), 1);"]
    if shape.steps is not None:
        least, end, step = shape.steps
        bucket = f"step_bucket({value}, {signed}, {least}L, {end}L, {step}UL)"
        return [f"add_to(values + {bucket}, 1);"]
    count = "add_to(values, 1);"
    if shape.function == "count":
        return [count]
    if shape.function in ("sum", "avg"):
        return [f"add_to(values + 1, {value});", count]
    # In an order in which 0, what is there first, is the least.
    ordered = f"{value} ^ {_SIGN:#x}UL" if shape.is_signed else value
    extreme = f"~({ordered})" if shape.function == "min" else ordered
    return [f"raise_to(values + 1, {extreme});", count]
