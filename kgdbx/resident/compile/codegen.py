"""From probe definitions to C that filters and records their hits inside the guest."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from kgdbx.probes.aggregation import Aggregation
from kgdbx.probes.definition import ProbeDefinition
from kgdbx.probes.expression import Expr, format_expression
from kgdbx.probes.field import Field, expand_fields
from kgdbx.probes.probe import Point
from kgdbx.probes.scope import KernelScope
from kgdbx.probes.value import FieldValue, Unreadable
from kgdbx.resident.compile.aggregate import MapShape, aggregate
from kgdbx.resident.compile.code import FAILURES, Code
from kgdbx.resident.compile.fields import Recorded, record_field
from kgdbx.resident.compile.lower import Lowering
from kgdbx.resident.compile.names import Names
from kgdbx.resident.compile.values import NotResident, foreign_errors
from kgdbx.resident.layout import FieldLayout
from kgdbx.resident.record import ENTRY_FIELDS_AT, RETURN_FIELDS_AT
from kgdbx.symbols.kernel import Kernel

__all__ = ("Body", "MAX_RECORD_BYTES", "NotResident", "RecordField", "decode_fields", "generate")

MAX_RECORD_BYTES = 4096
"""Longest record that is made."""

_MASK_BYTES = 8
_MAX_FAULT_BITS = 8 * _MASK_BYTES


@dataclass(frozen=True)
class RecordField:
    """A field of a record.

    :ivar layout: its name, its bytes and where they are, as data
    :ivar decode: its value from its bytes, with the kernel's symbols
    """

    layout: FieldLayout
    decode: Callable[[bytes], FieldValue]

    @property
    def name(self) -> str:
        """As given, or the text of the expression."""
        return self.layout.name

    @property
    def offset_bytes(self) -> int:
        """From the start of the record."""
        return self.layout.offset_bytes

    @property
    def size_bytes(self) -> int:
        """Length of what *decode* takes; nothing for a value that is always the same."""
        return self.layout.size_bytes

    @property
    def fault_bit(self) -> int | None:
        """The bit of the mask that is set if it could not be had; None if it always can.

        The first 8 bytes are then the address that could not be read.
        """
        return self.layout.fault_bit

    @property
    def expression(self) -> str:
        """Its text."""
        return self.layout.expression


@dataclass(frozen=True)
class Body:
    """The C of a probe; the functions that it goes into have a ``const struct context *c``.

    :ivar condition: statements that return 1 to pass, 0 to drop, -1 if a read failed
    :ivar fill: statements that write the fields into the record ``u8 *rec``
    :ivar saves: C expressions over ``c`` at the entry, each an u64 kept for the return
    :ivar record_bytes: from the start of the record to the end of the last field
    :ivar uses_regs: whether ``c->regs`` is used
    :ivar calls_kernel: whether functions of the kernel are called
    :ivar condition_calls_kernel: whether the condition calls any
    :ivar mask_offset_bytes: where the mask of unreadable fields is; None if there is none
    :ivar map: if hits are summed up: what. *fill* does it then, *fields* are in the key, and there
        are no records
    :ivar handlers: C in place of what is made of the rest, with ``handler_@N@``, and ``return_@N@``
        of a return probe
    :ivar shared: C that handlers need, once in each unit; ``@STREAM@`` in it stands for the first
        arguments of ``reserve()``
    """

    condition: str | None
    fill: str
    saves: tuple[str, ...]
    record_bytes: int
    fields: tuple[RecordField, ...]
    uses_regs: bool
    calls_kernel: bool
    mask_offset_bytes: int | None = None
    map: MapShape | None = None
    condition_calls_kernel: bool = False
    handlers: str = ""
    shared: str = ""

    @property
    def filters_first(self) -> bool:
        """Whether most of the handler is spared where the condition drops a hit."""
        return self.condition is not None and not self.condition_calls_kernel


@dataclass(frozen=True)
class _Part:
    field: Field
    code: Code
    recorded: Recorded


def generate(definition: ProbeDefinition, kernel: Kernel, point: Point) -> Body:
    """Compile a definition for one point.

    :raises NotResident: if it cannot run in the guest; with the reason
    """
    if definition.kind not in ("p", "r"):
        raise NotResident("a data watch has no instruction of its own")
    is_return = definition.kind == "r"
    names = Names(kernel, point, is_return)
    scope = KernelScope(kernel)
    known = {"vars": names.parameter_names, "params": names.parameter_names}
    condition, calls = None, False
    if definition.condition is not None:
        code = Code("return -1", reports=False)
        condition = _condition(definition.condition, Lowering(names, code))
        calls = code.calls_kernel
    if definition.aggregation is not None:
        return _aggregated(definition.aggregation, condition, calls, names, scope)
    parts = [
        _part(number, field, names, scope)
        for number, field in enumerate(expand_fields(definition.fields, known))
    ]
    start = RETURN_FIELDS_AT if is_return else ENTRY_FIELDS_AT
    failing = [part for part in parts if part.code.can_fail]
    if len(failing) > _MAX_FAULT_BITS:
        raise NotResident(f"more than {_MAX_FAULT_BITS} fields that may be unreadable")
    mask_offset = start if failing else None
    fields, lines, end = _layout(parts, start + _MASK_BYTES * bool(failing))
    if end > MAX_RECORD_BYTES:
        raise NotResident(f"a record of {end} bytes; at most {MAX_RECORD_BYTES}")
    if failing:
        lines = ["u64 mask = 0, at;", *lines, f"__builtin_memcpy(rec + {start}, &mask, 8);"]
    return Body(
        condition,
        "\n".join(f"\t{line}" for line in lines),
        tuple(names.saves),
        end,
        tuple(fields),
        names.uses_regs,
        calls or any(part.code.calls_kernel for part in parts),
        mask_offset,
        condition_calls_kernel=calls,
    )


def _aggregated(
    what: Aggregation, condition: str | None, calls: bool, names: Names, scope: KernelScope
) -> Body:
    fill, shape, keys, also_calls = aggregate(what, names, scope)
    fields = tuple(RecordField(key.layout, key.decode) for key in keys)
    saves = tuple(names.saves)
    return Body(
        condition,
        fill,
        saves,
        0,
        fields,
        names.uses_regs,
        calls or also_calls,
        map=shape,
        condition_calls_kernel=calls,
    )


def decode_fields(body: Body, record: bytes) -> dict[str, FieldValue]:
    """Values of the fields in a record, as :func:`kgdbx.probes.fetch.compile_fields` gives them.

    :param record: the whole record with its header
    """
    at = body.mask_offset_bytes
    mask = 0 if at is None else int.from_bytes(record[at : at + _MASK_BYTES], "little")
    values: dict[str, FieldValue] = {}
    for field in body.fields:
        start = field.offset_bytes
        data = record[start : start + max(8, field.size_bytes)]
        if mask and field.fault_bit is not None and mask >> field.fault_bit & 1:
            values[field.name] = _unreadable(field, int.from_bytes(data[:8], "little"))
        else:
            values[field.name] = field.decode(data[: field.size_bytes])
    return values


def _unreadable(field: RecordField, address: int) -> Unreadable:
    reason = FAILURES.get(address)
    if reason is None:
        return Unreadable(address)
    return Unreadable(None, f"cannot evaluate '{field.expression}': {reason}")


def _condition(expr: Expr, lower: Lowering) -> str:
    with foreign_errors(expr):
        test = lower.truth(expr)
    code = lower.code
    lines = ["u64 at;"] if code.calls_kernel else []
    return "\n".join(f"\t{line}" for line in (*lines, *code.lines, f"return {test};"))


def _part(number: int, field: Field, names: Names, scope: KernelScope) -> _Part:
    code = Code(f"goto fail_{number}")
    with foreign_errors(field.expression):
        recorded = record_field(field, Lowering(names, code), scope, "out")
    return _Part(field, code, recorded)


def _layout(parts: list[_Part], start: int) -> tuple[list[RecordField], list[str], int]:
    fields: list[RecordField] = []
    lines: list[str] = []
    end, bit = start, 0
    for number, part in enumerate(parts):
        recorded, code = part.recorded, part.code
        offset = recorded.header_offset_bytes
        fault_bit = None
        if offset is None:
            offset = end
            end += max(8, -(-recorded.size_bytes // 8) * 8) if code.lines else 0
        if code.can_fail:
            fault_bit, bit = bit, bit + 1
        if code.lines:
            lines += ["{", f"\tu8 *const out = rec + {offset};"]
            lines += (f"\t{line}" for line in code.lines)
            if fault_bit is not None:
                lines += ["\tif (0) {", f"fail_{number}:", f"\t\tmask |= {1 << fault_bit:#x}UL;"]
                lines += ["\t\t__builtin_memcpy(out, &at, 8);", "\t}"]
            lines.append("}")
        layout = dataclasses.replace(
            recorded.layout,
            offset_bytes=offset,
            fault_bit=fault_bit,
            expression=format_expression(part.field.expression),
        )
        fields.append(RecordField(layout, recorded.decode))
    return fields, lines, end
