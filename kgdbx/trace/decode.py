"""From records to events."""

import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from kgdbx.probes.event import Event
from kgdbx.probes.value import FieldValue, Hex, KernelStack, Unreadable, decode_text
from kgdbx.resident.clock import Clock
from kgdbx.resident.compile.code import FAILURES
from kgdbx.resident.layout import FieldLayout, ProbeLayout
from kgdbx.symbols.tasks import Task
from kgdbx.trace.binary import RECORD_HEADER
from kgdbx.trace.errors import TraceError

__all__ = ("RecordDecoder", "decode_field")

Buffer: TypeAlias = bytes | bytearray | memoryview

_RETURN = struct.Struct("<QQ")
_RETURN_OFFSET = 48


class RecordDecoder:
    """Makes events of records.

    The task's address is not in a record: it is 0 in the events. Addresses stay numbers where the
    kernel's symbols are needed to name them.

    :param clock: how time stamps become nanoseconds
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.probes: dict[int, ProbeLayout] = {}

    def add_probes(self, layouts: Iterable[ProbeLayout]) -> None:
        """Describe probes.

        :raises TraceError: if a probe has the number of another
        """
        for layout in layouts:
            if self.probes.setdefault(layout.number, layout) != layout:
                raise TraceError(f"probe {layout.number} is described twice, and differently")

    def events(self, records: Buffer, record_bytes: int) -> Iterator[Event]:
        """The events of records of one size that follow one another.

        :raises TraceError: if they are not whole, a probe is unknown, or longer than its record
        """
        if record_bytes < RECORD_HEADER.size or len(records) % record_bytes:
            raise TraceError(f"{len(records)} bytes are not records of {record_bytes} bytes")
        view = memoryview(records)
        for at in range(0, len(view), record_bytes):
            yield self._event(view[at : at + record_bytes])

    def _event(self, record: memoryview) -> Event:
        _, tsc, pid, tgid, number, cpu, _, comm = RECORD_HEADER.unpack_from(record)
        layout = self.probes.get(number)
        if layout is None:
            raise TraceError(f"a record of probe {number}, which is not described")
        if layout.record_bytes > len(record):
            raise TraceError(
                f"a record of {len(record)} bytes of probe {number}, "
                f"whose records have {layout.record_bytes}"
            )
        return_address = duration_ns = None
        if layout.kind == "r":
            return_address, entry_tsc = _RETURN.unpack_from(record, _RETURN_OFFSET)
            duration_ns = self.clock.duration_ns(tsc - entry_tsc)
        name = comm.split(b"\0")[0].decode("utf-8", "replace")
        return Event(
            self.clock.ns(tsc),
            cpu,
            Task(0, pid, tgid, name),
            layout.name,
            layout.kind,
            layout.address,
            layout.where,
            _fields(layout, record),
            return_address,
            duration_ns=duration_ns,
        )


def decode_field(field: FieldLayout, data: bytes) -> FieldValue:
    """Value of a field.

    :param data: its ``size_bytes`` bytes
    """
    if field.value is not None:
        is_hex = field.kind in ("x", "symbol") and isinstance(field.value, int)
        return Hex(field.value) if is_hex else field.value
    if field.count is None:
        return _element(field, data)
    size = field.element_bytes
    if field.kind == "stack":
        words = memoryview(data).cast("Q")
        return KernelStack(Hex(word) for word in itertools.takewhile(bool, words))
    return [_element(field, data[at : at + size]) for at in range(0, len(data), size)]


def _fields(layout: ProbeLayout, record: memoryview) -> dict[str, FieldValue]:
    faults = 0
    if layout.faults_offset_bytes is not None:
        at = layout.faults_offset_bytes
        faults = int.from_bytes(record[at : at + 8], "little")
    values: dict[str, FieldValue] = {}
    for field in layout.fields:
        if field.fault_bit is not None and faults >> field.fault_bit & 1:
            at = field.offset_bytes
            address = int.from_bytes(record[at : at + 8], "little")
            values[field.name] = _unreadable(field, address)
        else:
            end = field.offset_bytes + field.size_bytes
            values[field.name] = decode_field(field, bytes(record[field.offset_bytes : end]))
    return values


def _unreadable(field: FieldLayout, address: int) -> Unreadable:
    reason = FAILURES.get(address)
    if reason is None:
        return Unreadable(address)
    return Unreadable(None, f"cannot evaluate '{field.expression}': {reason}")


def _element(field: FieldLayout, data: bytes) -> FieldValue:
    if field.kind == "string":
        text, end, _ = data[: field.limit_bytes].partition(b"\0")
        is_cut = field.limit_bytes is not None and not end
        return decode_text(text) + ("..." if is_cut else "")
    if field.kind in ("bytes", "raw"):
        return data
    value = int.from_bytes(data, "little", signed=field.is_signed)
    low, width = field.bits or (0, 8 * len(data))
    value = value >> low & ((1 << width) - 1)
    if field.kind == "s":
        sign = 1 << (width - 1)
        return (value ^ sign) - sign
    if field.kind == "char":
        return chr(value & 0xFF)
    return Hex(value) if field.kind in ("x", "symbol") else value
