"""Recordings: there and back, and files that are none."""

import io
import os
import random
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest

from kgdbx.probes.event import Event
from kgdbx.resident.clock import IDENTITY, Clock
from kgdbx.resident.layout import ProbeLayout
from kgdbx.trace.binary import FILE_HEADER, FRAME_HEADER, LostSource, file_header
from kgdbx.trace.errors import FormatError, TraceError
from kgdbx.trace.recording import Lost, Recording
from kgdbx.trace.recording_writer import RecordingWriter
from kgdbx.trace.text import TextSink

Numbered = Callable[..., npt.NDArray[Any]]


@pytest.fixture
def recorded(
    tmp_path: Path,
    clock: Clock,
    entry: ProbeLayout,
    opened: ProbeLayout,
    opened_record: Callable[..., bytes],
    numbered: Numbered,
    event: Callable[..., Event],
) -> Path:
    path = tmp_path / "trace.kgdbx"
    writer = RecordingWriter(path, clock)
    writer.add_probes([entry])
    writer.write_batch(numbered(3))
    writer.write_lost(17, 2)
    writer.add_probes([entry, opened])
    writer.write_batch(opened_record(b"x" * 257), 344)
    writer.write([event()])
    writer.close()
    writer.close()
    return path


def test_there_and_back(recorded: Path, event: Callable[..., Event]) -> None:
    with Recording(recorded) as recording:
        items = list(recording.items())
        assert sorted(recording.probes) == [1, 2]
    first, second, third, lost, opened, other = items
    assert isinstance(first, Event) and isinstance(third, Event) and isinstance(opened, Event)
    assert (first.ts_ns, third.ts_ns) == (50_000, 50_002)
    assert [each.fields["n"] for each in (first, second, third)] == [0, 1, 2]  # type: ignore[union-attr]
    assert lost == Lost(17, LostSource.RING, 2)
    assert opened.fields == {"filename": "x" * 256 + "...", "$retval": -2}
    assert other == event()


def test_convert(recorded: Path) -> None:
    out = io.StringIO()
    with Recording(recorded) as recording:
        recording.convert(TextSink(out, header=False))
    assert out.getvalue().splitlines() == [
        "             cat-412     [000]      0.000050: n: (f+0x0/0x10) n=0",
        "             cat-412     [000]      0.000050: n: (f+0x0/0x10) n=1",
        "             cat-412     [000]      0.000050: n: (f+0x0/0x10) n=2",
        "CPU:2 [LOST 17 EVENTS]",
        "             cat-412     [003]      0.000052: opened: "
        f'(0xffffffff8120001f <- do_sys_openat2) filename="{"x" * 256}..." $retval=-2 '
        "duration_ns=1000",
        "             cat-412     [003]  12345.678901: opened: (do_sys_openat2+0x0/0x2c) dfd=-100",
    ]


def test_every_frame_is_aligned(recorded: Path) -> None:
    data = recorded.read_bytes()
    at = FILE_HEADER.size
    while at < len(data):
        assert at % 8 == 0
        at += 16 + FRAME_HEADER.unpack_from(data, at)[0]
    assert at == len(data)


def test_cut_short_anywhere(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    path = tmp_path / "cut"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=f"^{path}: at offset [0-9]+: cut short") as caught:
            read(path)
        assert size - caught.value.offset_bytes < 64 + 344 + 400
    path.write_bytes(data + b"more")
    assert len(read(path)) == 6


def test_what_comes_before_the_cut_is_given(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(recorded.read_bytes()[:-16])
    items = []
    cut = pytest.raises(FormatError, match="cut short: 0 of 16 bytes of the header of a frame")
    with Recording(path) as recording, cut:
        for item in recording.items():
            items.append(item)
    assert len(items) == 6


def read(path: Path) -> list[Event | Lost]:
    with Recording(path) as recording:
        return list(recording.items())


def frame(kind: int, payload: bytes, record_bytes: int = 0, count: int = 0) -> bytes:
    return FRAME_HEADER.pack(len(payload), kind, 0, record_bytes, count) + payload


HEADER = file_header(IDENTITY)


@pytest.mark.parametrize(
    ("data", "message", "offset"),
    [
        (b"", "cut short", 0),
        (b"x" * 64, "not a trace of kgdbx", 0),
        (HEADER[:8] + b"\x02" + HEADER[9:], "version 2", 0),
        (HEADER[:12] + b"\x01\x02\x03\x04" + bytes(48), "byte order", 0),
        (HEADER[:10] + b"\0\0" + HEADER[12:], "header of 0", 0),
        (file_header(Clock(0, 0, 1, 64)), "shift of 64", 0),
        (HEADER + b"\xff" * 16, "a frame of 4294967295 bytes", 64),
        (HEADER + frame(1, b"\n\n{]\n"), "not a probe", 82),
        (HEADER + frame(1, b"[" * 100_000), "not a probe", 80),
        (HEADER + frame(1, b"[]"), "not a probe: \\[\\] is not an object", 80),
        (HEADER + frame(2, bytes(96), 48, 3), "3 records of 48 bytes in 96", 64),
        (HEADER + frame(2, bytes(96), 48, 2), "a record of probe 0", 80),
        (HEADER + frame(2, b"", 0, 5), "0 bytes are not records of 0 bytes", 80),
        (HEADER + frame(3, bytes(8)), "8 bytes say what is lost", 80),
        (HEADER + frame(3, b"\xff" * 16), "which is no place", 80),
        (HEADER + frame(4, b"{}\n"), "not an event: KeyError", 80),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_not_a_recording(tmp_path: Path, data: bytes, message: str, offset: int) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        read(path)
    assert caught.value.offset_bytes == offset
    assert str(caught.value).startswith(f"{path}: at offset {offset}: ")


def test_the_offset_of_a_bad_record(
    tmp_path: Path, recorded: Path, numbered: Numbered, entry: ProbeLayout
) -> None:
    records = numbered(3)
    writer = RecordingWriter(tmp_path / "bad", IDENTITY)
    writer.add_probes([entry])
    writer.write_batch(records)
    writer.close()
    data = bytearray((tmp_path / "bad").read_bytes())
    start = len(data) - 16 - 3 * 56
    data[start + 56 + 24] = 9
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(FormatError, match="a record of probe 9") as caught:
        read(tmp_path / "bad")
    assert caught.value.offset_bytes == start + 56


def test_later_versions_may_add(tmp_path: Path) -> None:
    header = bytearray(HEADER + bytes(16))
    header[10] = 80
    path = tmp_path / "later"
    path.write_bytes(header + frame(77, b"what") + frame(5, b""))
    assert read(path) == []


def test_flipped_bytes_give_events_or_a_format_error(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    path = tmp_path / "flipped"
    rng = random.Random(7)
    for _ in range(1500):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        path.write_bytes(broken)
        try:
            with Recording(path) as recording:
                recording.convert(TextSink(io.StringIO()))
        except FormatError as e:
            assert 0 <= e.offset_bytes <= len(data)


def test_files_that_cannot_be(tmp_path: Path, numbered: Numbered) -> None:
    with pytest.raises(TraceError, match=r"nowhere: No such file"):
        Recording(tmp_path / "nowhere")
    with pytest.raises(TraceError, match="Is a directory"):
        RecordingWriter(tmp_path, IDENTITY)
    with pytest.raises(TraceError, match="/dev/full: No space left on device"):
        RecordingWriter(Path("/dev/full"), IDENTITY)
    writer = RecordingWriter(tmp_path / "closed", IDENTITY)
    writer.close()
    with pytest.raises(TraceError, match="written to after it was closed"):
        writer.write_batch(numbered(1))


def test_a_slow_disk_holds_nobody_up(
    tmp_path: Path, entry: ProbeLayout, numbered: Numbered
) -> None:
    # A FIFO is a file that takes 64 KiB, and the rest when its reader likes.
    path, copy = tmp_path / "slow", tmp_path / "copy"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reading, True)
    writer = RecordingWriter(path, IDENTITY)
    writer.add_probes([entry])
    for _ in range(20):
        writer.write_batch(numbered(1009))

    def read() -> None:
        with open(reading, "rb") as fifo:
            copy.write_bytes(fifo.read())

    reader = threading.Thread(target=read)
    reader.start()
    writer.close()
    reader.join(60)
    with Recording(copy) as recording:
        assert sum(isinstance(item, Event) for item in recording.items()) == 20 * 1009


def test_a_disk_that_fills_up(tmp_path: Path, entry: ProbeLayout, numbered: Numbered) -> None:
    path = tmp_path / "large"
    writer = RecordingWriter(path, IDENTITY)
    writer.add_probes([entry])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        for _ in range(40):  # 2.5 MiB
            writer.write_batch(numbered(1009))
        with pytest.raises(TraceError, match="large: File too large"):
            writer.close()
    except TraceError as e:
        assert "large: File too large" in str(e)
        with pytest.raises(TraceError, match="large: File too large"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()  # once is enough
    with Recording(path) as recording, pytest.raises(FormatError, match="cut short"):
        list(recording.items())
