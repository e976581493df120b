"""What the records of a probe hold, and where: as data, and as the JSON of the binary format."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

__all__ = ("FieldLayout", "KINDS", "PROBE_LIMIT", "ProbeLayout", "RECORD_LIMIT_BYTES")

KINDS = ("u", "s", "x", "char", "symbol", "string", "bytes", "raw", "stack")
"""Kinds of fields; see :class:`FieldLayout`."""

PROBE_LIMIT = 1 << 20
"""Numbers of probes are below this."""

RECORD_LIMIT_BYTES = 1 << 16
"""Longest record."""

_HEADER_BYTES = {"p": 48, "r": 64, "w": 48}
_NUMBERS = ("u", "s", "x", "char", "symbol")
_NUMBER_LIMIT_BYTES = 16
_NAME_LIMIT = 4096
_FAULT_BITS = 64
_ADDRESS_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class FieldLayout:
    """One field of a record.

    :ivar offset_bytes: from the start of the record; also into its header, where the field is
        there already
    :ivar size_bytes: size of the whole field, all elements of an array; 0 with *value*
    :ivar kind: u, s or x (little-endian integer: unsigned, signed, to show in hexadecimal), char
        (one character), symbol (an address to show as a symbol), string (text that ends at the
        first NUL), bytes, raw (a value of the C type *type_name*, as it was in memory), or stack
        (addresses, innermost first, to show as symbols; a 0 ends it)
    :ivar count: number of elements of an array, otherwise None
    :ivar bits: lowest bit and width of what the integer is cut to, otherwise None
    :ivar is_signed: the integer in the record is signed: that is how it is made longer, before it
        is cut to *bits*
    :ivar limit_bytes: a string without a NUL in so many bytes is cut there and ends in ``...``;
        None for no limit but the size
    :ivar fault_bit: bit of the fault mask that is set when the field could not be read: its first
        8 bytes are then the address; None for a field that always can
    :ivar type_name: C type, or empty
    :ivar expression: what was evaluated, or empty
    :ivar value: of a field that is the same in every record, and in none; otherwise None
    """

    name: str
    offset_bytes: int
    size_bytes: int
    kind: str
    count: int | None = None
    bits: tuple[int, int] | None = None
    is_signed: bool = False
    limit_bytes: int | None = None
    fault_bit: int | None = None
    type_name: str = ""
    expression: str = ""
    value: int | str | None = None

    def __post_init__(self) -> None:
        _check(len(self.name) <= _NAME_LIMIT, "the name of a field is too long")
        _check(self.kind in KINDS, f"{self.name}: there is no kind {self.kind!r}")
        _check(self.offset_bytes >= 0, f"{self.name}: negative offset")
        _check(
            self.size_bytes == 0 if self.value is not None else self.size_bytes > 0,
            f"{self.name}: {self.size_bytes} bytes",
        )
        _check(
            self.count is None or (self.count > 0 and self.size_bytes % self.count == 0),
            f"{self.name}: {self.size_bytes} bytes are not {self.count} elements",
        )
        _check(
            self.kind not in _NUMBERS or self.element_bytes <= _NUMBER_LIMIT_BYTES,
            f"{self.name}: an integer of {self.element_bytes} bytes",
        )
        low, width = self.bits or (0, 1)
        _check(
            low >= 0 and width > 0 and low + width <= 8 * _NUMBER_LIMIT_BYTES,
            f"{self.name}: bits {low}+{width} of {self.element_bytes} bytes",
        )
        _check(self.limit_bytes is None or self.limit_bytes >= 0, f"{self.name}: negative limit")
        _check(
            self.fault_bit is None or 0 <= self.fault_bit < _FAULT_BITS,
            f"{self.name}: fault bit {self.fault_bit}",
        )

    @property
    def element_bytes(self) -> int:
        """Size of one element, of the field itself if it is no array."""
        return self.size_bytes // (self.count or 1)

    def to_json(self) -> dict[str, Any]:
        """As the binary format describes a field; what does not apply is left out."""
        optional = {
            "count": self.count,
            "bits": None if self.bits is None else list(self.bits),
            "signed": self.is_signed or None,
            "limit": self.limit_bytes,
            "fault": self.fault_bit,
            "type": self.type_name or None,
            "expression": self.expression or None,
            "value": self.value,
        }
        return {
            "name": self.name,
            "offset": self.offset_bytes,
            "size": self.size_bytes,
            "kind": self.kind,
        } | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_json(cls, data: object) -> "FieldLayout":
        """The reverse of :meth:`to_json`; unknown keys are skipped.

        :raises ValueError: if anything is missing, of another type, or out of bounds
        """
        record = _object(data)
        bits = record.get("bits")
        if bits is not None:
            _check(isinstance(bits, list) and len(bits) == 2, "'bits' is not a pair")
            bits = (_integer({"bits": bits[0]}, "bits"), _integer({"bits": bits[1]}, "bits"))
        value = record.get("value")
        if value is not None and not isinstance(value, str):
            value = _integer(record, "value")
        return cls(
            name=_string(record, "name"),
            offset_bytes=_integer(record, "offset"),
            size_bytes=_integer(record, "size"),
            kind=_string(record, "kind"),
            count=_optional(record, "count"),
            bits=bits,
            is_signed=record.get("signed") is True,
            limit_bytes=_optional(record, "limit"),
            fault_bit=_optional(record, "fault"),
            type_name=_string(record, "type") if "type" in record else "",
            expression=_string(record, "expression") if "expression" in record else "",
            value=value,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeLayout:
    """One probe and its records.

    :ivar number: the ``probe`` of its records
    :ivar name: ``group/name``
    :ivar kind: ``p``, ``r`` or ``w``; fields start at 64 for r, at 48 otherwise
    :ivar address: guest-virtual address of the probe point
    :ivar where: the same as ``func+0x0/0x2c [module]``
    :ivar record_bytes: from the start of a record to the end of its last field
    :ivar faults_offset_bytes: where the u64 mask of unreadable fields is, None without one
    """

    number: int
    name: str
    kind: str
    address: int
    where: str
    record_bytes: int
    fields: tuple[FieldLayout, ...] = ()
    faults_offset_bytes: int | None = None

    def __post_init__(self) -> None:
        _check(max(len(self.name), len(self.where)) <= _NAME_LIMIT, "a name is too long")
        _check(0 <= self.number < PROBE_LIMIT, f"{self.name}: its number is {self.number}")
        _check(self.kind in _HEADER_BYTES, f"{self.name}: there is no kind {self.kind!r}")
        _check(0 <= self.address < 1 << 64, f"{self.name}: address is not a u64")
        first, end = _HEADER_BYTES[self.kind], self.record_bytes
        _check(first <= end <= RECORD_LIMIT_BYTES, f"{self.name}: records of {end} bytes")
        faults = self.faults_offset_bytes
        _check(
            faults is None or first <= faults <= end - _FAULT_BITS // 8,
            f"{self.name}: fault mask at {faults} in records of {end} bytes",
        )
        for field in self.fields:
            _check(
                field.offset_bytes <= end - field.size_bytes,
                f"{self.name}: field {field.name!r} is not inside the record",
            )
            _check(
                field.fault_bit is None or faults is not None,
                f"{self.name}: field {field.name!r} has a fault bit, but there is no fault mask",
            )
            _check(
                field.fault_bit is None or field.offset_bytes <= end - _ADDRESS_BYTES,
                f"{self.name}: field {field.name!r} has no room for an address",
            )

    def to_json(self) -> dict[str, Any]:
        """As the binary format describes a probe."""
        return {
            "id": self.number,
            "name": self.name,
            "kind": self.kind,
            "address": hex(self.address),
            "where": self.where,
            "record_bytes": self.record_bytes,
            "faults": self.faults_offset_bytes,
            "fields": [field.to_json() for field in self.fields],
        }

    @classmethod
    def from_json(cls, data: object) -> "ProbeLayout":
        """The reverse of :meth:`to_json`; unknown keys are skipped.

        :raises ValueError: if anything is missing, of another type, or out of bounds
        """
        record = _object(data)
        fields = record.get("fields")
        if not isinstance(fields, list):
            raise ValueError("'fields' is not a list")
        address = _string(record, "address")
        _check(re.fullmatch("0x[0-9a-f]{1,16}", address) is not None, "'address' is not hex text")
        return cls(
            number=_integer(record, "id"),
            name=_string(record, "name"),
            kind=_string(record, "kind"),
            address=int(address, 16),
            where=_string(record, "where"),
            record_bytes=_integer(record, "record_bytes"),
            fields=tuple(FieldLayout.from_json(field) for field in fields),
            faults_offset_bytes=_optional(record, "faults"),
        )


def _check(fact: bool, message: str) -> None:
    if not fact:
        raise ValueError(message)


def _object(data: object) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{data!r:.40} is not an object")
    return data


def _string(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is missing or no text")
    return value


def _integer(record: Mapping[str, Any], key: str) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key!r} is missing or no integer")
    return value


def _optional(record: Mapping[str, Any], key: str) -> int | None:
    return None if record.get(key) is None else _integer(record, key)
