"""Events, descriptions and records to write."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kgdbx.probes.event import Event
from kgdbx.resident.clock import Clock
from kgdbx.resident.layout import FieldLayout, ProbeLayout
from kgdbx.symbols.tasks import Task
from kgdbx.trace.binary import RECORD_HEADER

ADDRESS = 0xFFFFFFFF81200000


@pytest.fixture
def event() -> Callable[..., Event]:
    """Makes an event; a keyword replaces what it has."""

    def make(**changes: Any) -> Event:
        values: dict[str, Any] = {
            "ts_ns": 12_345_678_901_234,
            "cpu": 3,
            "task": Task(0, 412, 400, "cat"),
            "probe": "kprobes/opened",
            "kind": "p",
            "address": ADDRESS,
            "where": "do_sys_openat2+0x0/0x2c",
            "fields": {"dfd": -100},
        }
        return Event(**(values | changes))

    return make


@pytest.fixture
def clock() -> Clock:
    """2 GHz: half a nanosecond a tick."""
    return Clock(tsc_base=1000, ns_base=50_000, mult=1 << 23, shift=24)


@pytest.fixture
def entry() -> ProbeLayout:
    """An entry probe with one number: records of 56 bytes."""
    fields = (FieldLayout("n", 48, 8, "u"),)
    return ProbeLayout(1, "kprobes/n", "p", ADDRESS, "f+0x0/0x10", 56, fields)


@pytest.fixture
def opened() -> ProbeLayout:
    """A return probe with a string, a number and a fault mask: records of 344 bytes."""
    fields = (
        FieldLayout(
            "filename", 72, 264, "string", limit_bytes=256, fault_bit=0, expression="name(x)"
        ),
        FieldLayout("$retval", 336, 8, "s", type_name="long"),
    )
    where = "do_sys_openat2+0x0/0x2c"
    return ProbeLayout(2, "kprobes/opened", "r", ADDRESS, where, 344, fields, 64)


@pytest.fixture
def opened_record() -> Callable[..., bytes]:
    """Makes a record of ``opened``."""

    def make(
        text: bytes = b"/etc/passwd", retval: int = -2, faults: int = 0, size_bytes: int = 344
    ) -> bytes:
        record = RECORD_HEADER.pack(1, 5000, 412, 400, 2, 3, 0, b"cat")
        record += (ADDRESS + 0x1F).to_bytes(8, "little") + (3000).to_bytes(8, "little")
        record += faults.to_bytes(8, "little") + text.ljust(264, b"\0")
        record += retval.to_bytes(8, "little", signed=True)
        return record.ljust(size_bytes, b"\xee")

    return make


@pytest.fixture
def numbered() -> Callable[..., npt.NDArray[Any]]:
    """Makes records of ``entry`` in slots of 64 bytes, whose field counts up."""

    def make(count: int, first: int = 0) -> npt.NDArray[Any]:
        records = np.zeros(
            count,
            [
                ("seq", "<u8"),
                ("tsc", "<u8"),
                ("pid", "<u4"),
                ("tgid", "<u4"),
                ("probe", "<u4"),
                ("cpu", "<u2"),
                ("flags", "<u2"),
                ("comm", "S16"),
                ("n", "<u8"),
                ("unused", "<u8"),
            ],
        )
        records["n"] = np.arange(first, first + count)
        records["seq"] = records["n"] + 1
        records["tsc"] = 1000 + 2 * records["n"]
        records["pid"], records["tgid"], records["probe"] = 412, 400, 1
        records["comm"] = b"cat"
        records["unused"] = 0xEEEE
        return records

    return make
