"""Frames of records, cut to what their probes need."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kgdbx.resident import record
from kgdbx.resident.clock import Clock
from kgdbx.resident.layout import FieldLayout, ProbeLayout
from kgdbx.trace.binary import (
    FILE_HEADER,
    FRAME_HEADER,
    LOST,
    RECORD_HEADER,
    BatchFramer,
    FrameType,
    LostSource,
    end_frame,
    file_header,
    lost_frame,
    text_frames,
)
from kgdbx.trace.errors import TraceError

Numbered = Callable[..., npt.NDArray[Any]]


def test_a_record_is_what_the_guest_writes() -> None:
    values = (1, 2, 3, 4, 5, 6, 7, b"comm")
    assert np.array(values, record.HEADER).tobytes() == RECORD_HEADER.pack(*values)
    assert record.ENTRY_FIELDS_AT == RECORD_HEADER.size == 48
    assert record.RETURN_FIELDS_AT == 64
    ProbeLayout(0, "p", "p", 0, "", 56, (FieldLayout("f", record.ENTRY_FIELDS_AT, 8, "u"),))
    ProbeLayout(0, "r", "r", 0, "", 72, (FieldLayout("f", record.RETURN_FIELDS_AT, 8, "u"),))


def test_header() -> None:
    header = file_header(Clock(1, 2, 3, 4))
    assert header == (
        b"KGDBXTRC\x01\0\x40\0\x04\x03\x02\x01"
        b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x04".ljust(64, b"\0")
    )
    assert len(header) == FILE_HEADER.size == 64
    with pytest.raises(TraceError, match="does not fit"):
        file_header(Clock(-1, 0, 1, 0))


def test_small_frames() -> None:
    assert b"".join(end_frame().parts) == FRAME_HEADER.pack(0, FrameType.END, 0, 0, 0)
    lost = b"".join(lost_frame(9, LostSource.RING, 2).parts)
    assert lost == FRAME_HEADER.pack(16, FrameType.LOST, 0, 0, 1) + LOST.pack(9, 0, 2)
    assert b"".join(lost_frame(9, LostSource.READER).parts)[16:] == LOST.pack(9, 1, -1)


def test_text_frames() -> None:
    lines = ["x" * 1000] * 150 + ["y" * 100_000, "z"]
    frames = list(text_frames(FrameType.EVENTS, lines))
    assert [frame.events for frame in frames] == [65, 65, 20, 1, 1]
    text = b"".join(frame.parts[1] for frame in frames).decode()
    assert [line for line in text.split("\n") if line] == lines
    assert all(frame.size_bytes % 8 == 0 for frame in frames)
    assert [frame.events for frame in text_frames(FrameType.PROBES, lines)] == [0] * 5


def test_batches(entry: ProbeLayout, numbered: Numbered) -> None:
    framer = BatchFramer()
    framer.add_probes([entry])
    records = numbered(5000)
    frames = list(framer.frames(records, None))
    assert [frame.events for frame in frames] == [1170, 1170, 1170, 1170, 320]
    for frame in frames:
        size, kind, zero, width, count = FRAME_HEADER.unpack(frame.parts[0])
        assert (kind, zero, width, count) == (FrameType.RECORDS, 0, 56, frame.events)
        assert size == len(frame.parts[1]) == 56 * count == frame.size_bytes - 16
    data = b"".join(frame.parts[1] for frame in frames)
    rows = np.frombuffer(data, np.uint8).reshape(-1, 56)
    assert np.array_equal(rows, records.view(np.uint8).reshape(-1, 64)[:, :56])
    assert framer.count(records, None) == 5000


def test_every_form_of_records(entry: ProbeLayout, numbered: Numbered) -> None:
    framer = BatchFramer()
    framer.add_probes([entry])
    records = numbered(10)
    (expected,) = framer.frames(records, None)
    matrix = records.view(np.uint8).reshape(10, 64)
    every_other = np.repeat(records, 2)[::2]
    for form in (records.tobytes(), bytearray(records.tobytes()), memoryview(records.tobytes())):
        assert list(framer.frames(form, 64)) == [expected]
    assert list(framer.frames(matrix, None)) == [expected]
    assert list(framer.frames(every_other, None)) == [expected]
    assert list(framer.frames(b"", 64)) == []
    assert list(framer.frames(records[:0], None)) == []


def test_frames_are_copies(entry: ProbeLayout, numbered: Numbered) -> None:
    framer = BatchFramer()
    framer.add_probes([entry])
    records = numbered(3)
    (frame,) = framer.frames(records, None)
    before = bytes(frame.parts[1])
    records["n"] = 99
    assert frame.parts[1] == before


def test_mixed_probes_keep_their_order(
    entry: ProbeLayout, opened: ProbeLayout, opened_record: Callable[..., bytes], numbered: Numbered
) -> None:
    framer = BatchFramer()
    assert len(framer.add_probes([entry, opened])) == 1
    wide = [each.tobytes().ljust(512, b"\xee") for each in numbered(2)]
    data = wide[0] + opened_record(size_bytes=512) + wide[1]
    (frame,) = framer.frames(data, 512)
    assert FRAME_HEADER.unpack(frame.parts[0])[3:] == (344, 3)
    assert [frame.parts[1][at + 24] for at in (0, 344, 688)] == [1, 2, 1]


def test_descriptions_are_told_once(entry: ProbeLayout, opened: ProbeLayout) -> None:
    framer = BatchFramer()
    (frame,) = framer.add_probes([entry, entry])
    assert FRAME_HEADER.unpack(frame.parts[0])[4] == 1
    assert framer.add_probes([entry]) == []
    (frame,) = framer.add_probes([entry, opened])
    assert b"do_sys_openat2" in frame.parts[1]
    other = ProbeLayout(1, "kprobes/other", "p", 0, "g", 48)
    with pytest.raises(TraceError, match="kprobes/other and kprobes/n have the same number, 1"):
        framer.add_probes([other])


def test_refusals(entry: ProbeLayout, opened: ProbeLayout, numbered: Numbered) -> None:
    framer = BatchFramer()
    with pytest.raises(TraceError, match="a record of probe 1, which was not described"):
        list(framer.frames(numbered(1), None))
    framer.add_probes([opened])
    with pytest.raises(TraceError, match="a record of probe 1, which was not described"):
        list(framer.frames(numbered(1), None))
    records = numbered(2)
    records["probe"] = 2
    with pytest.raises(TraceError, match="records of 64 bytes, but one of their probes needs 344"):
        framer.count(records, None)
    for size in (None, 0, 63):
        with pytest.raises(TraceError, match=f"128 bytes are not records of {size} bytes"):
            list(framer.frames(bytes(128), size))
    for size in (40, 60):
        with pytest.raises(TraceError, match=f"records of {size} bytes"):
            list(framer.frames(bytes(size), size))
