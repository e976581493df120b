"""Records to events."""

from collections.abc import Callable

import pytest

from kgdbx.probes.value import FieldValue, Hex, KernelStack, Unreadable
from kgdbx.resident.clock import Clock
from kgdbx.resident.compile.code import DIVISION_BY_ZERO
from kgdbx.resident.layout import FieldLayout, ProbeLayout
from kgdbx.symbols.tasks import Task
from kgdbx.trace.decode import RecordDecoder, decode_field
from kgdbx.trace.errors import TraceError

Make = Callable[..., bytes]


@pytest.mark.parametrize(
    ("kind", "data", "options", "value"),
    [
        ("u", b"\xff\xff", {}, 65535),
        ("s", b"\xfe\xff", {}, -2),
        ("x", b"\x10\x00\x00\x00", {}, Hex(16)),
        ("symbol", b"\x00\x00\x20\x81\xff\xff\xff\xff", {}, Hex(0xFFFFFFFF81200000)),
        ("char", b"A", {}, "A"),
        ("u", b"\xb4", {"bits": (2, 3)}, 5),
        ("s", b"\xb4", {"bits": (2, 4)}, -3),
        ("string", b"abc\0def", {}, "abc"),
        ("string", b"abc", {}, "abc"),
        ("string", b"abcd\0", {"limit_bytes": 3}, "abc..."),
        ("string", b"abc\0\0", {"limit_bytes": 3}, "abc..."),
        ("string", b"abc\0\0", {"limit_bytes": 4}, "abc"),
        ("u", b"\xfe\xff", {"is_signed": True, "bits": (0, 64)}, (1 << 64) - 2),
        ("u", b"\xfe\xff", {"bits": (0, 64)}, 0xFFFE),
        ("s", b"\xfe\xff", {"bits": (0, 8)}, -2),
        ("x", b"\xfe\xff", {"is_signed": True, "bits": (8, 16)}, Hex(0xFFFF)),
        ("u", b"", {"value": 7}, 7),
        ("x", b"", {"value": 7}, Hex(7)),
        ("string", b"", {"value": "const"}, "const"),
        ("string", b"\xff\xc3\xa9\0", {}, "\\xffé"),
        ("bytes", b"\x00\x01", {}, b"\x00\x01"),
        ("raw", b"\x00\x01", {"type_name": "short"}, b"\x00\x01"),
        ("s", b"\xff\x01", {"count": 2}, [-1, 1]),
        ("string", b"a\0b\0", {"count": 2}, ["a", "b"]),
        ("stack", b"\1\0\0\0\0\0\0\x80" + bytes(8), {"count": 2}, KernelStack([Hex(1 << 63 | 1)])),
    ],
)
def test_fields(kind: str, data: bytes, options: dict[str, object], value: FieldValue) -> None:
    field = FieldLayout("f", 48, len(data), kind, **options)  # type: ignore[arg-type]
    got = decode_field(field, data)
    assert got == value
    assert type(got) is type(value)


def test_event(clock: Clock, opened: ProbeLayout, opened_record: Make) -> None:
    decoder = RecordDecoder(clock)
    decoder.add_probes([opened])
    (event,) = decoder.events(opened_record(), 344)
    assert event.ts_ns == 52_000  # 4000 ticks after the clock's base
    assert event.duration_ns == 1000
    assert event.task == Task(0, 412, 400, "cat")
    assert (event.cpu, event.kind, event.probe) == (3, "r", "kprobes/opened")
    assert event.return_address == opened.address + 0x1F
    assert event.fields == {"filename": "/etc/passwd", "$retval": -2}


def test_fault_mask(clock: Clock, opened: ProbeLayout, opened_record: Make) -> None:
    decoder = RecordDecoder(clock)
    decoder.add_probes([opened])
    bad = (8).to_bytes(8, "little")
    (event,) = decoder.events(opened_record(bad, faults=1), 344)
    assert event.fields == {"filename": Unreadable(8), "$retval": -2}
    zero = DIVISION_BY_ZERO.to_bytes(8, "little")
    (event,) = decoder.events(opened_record(zero, faults=1), 344)
    reason = "cannot evaluate 'name(x)': division by zero"
    assert event.fields == {"filename": Unreadable(None, reason), "$retval": -2}


def test_time_before_the_base(clock: Clock) -> None:
    assert clock.ns(0) == 49_500
    assert (
        Clock(0, 0, (1 << 32) - 1, 31).ns((1 << 64) - 1) == ((1 << 64) - 1) * ((1 << 32) - 1) >> 31
    )


def test_refusals(
    clock: Clock, entry: ProbeLayout, opened: ProbeLayout, opened_record: Make
) -> None:
    decoder = RecordDecoder(clock)
    with pytest.raises(TraceError, match="a record of probe 2, which is not described"):
        list(decoder.events(opened_record(), 344))
    decoder.add_probes([opened, opened])
    with pytest.raises(TraceError, match="344 bytes are not records of 343 bytes"):
        list(decoder.events(opened_record(), 343))
    with pytest.raises(TraceError, match="344 bytes are not records of 0 bytes"):
        list(decoder.events(opened_record(), 0))
    with pytest.raises(TraceError, match="a record of 88 bytes of probe 2, whose records have 344"):
        list(decoder.events(opened_record()[:88], 88))
    with pytest.raises(TraceError, match="probe 1 is described twice, and differently"):
        decoder.add_probes([entry, ProbeLayout(1, "other", "p", 0, "", 48)])
