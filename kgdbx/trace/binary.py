"""The binary format of streams and recordings; docs/trace_format.md describes it for readers."""

import dataclasses
import enum
import struct
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from kgdbx.resident.clock import Clock
from kgdbx.resident.layout import ProbeLayout
from kgdbx.trace.errors import TraceError
from kgdbx.trace.json_lines import json_line
from kgdbx.trace.sink import Records

__all__ = (
    "BYTE_ORDER",
    "BatchFramer",
    "FILE_HEADER",
    "FRAME_HEADER",
    "FRAME_LIMIT_BYTES",
    "Frame",
    "FrameType",
    "LOST",
    "LostSource",
    "MAGIC",
    "RECORD_HEADER",
    "VERSION",
    "end_frame",
    "file_header",
    "lost_frame",
    "text_frames",
)

MAGIC = b"KGDBXTRC"
VERSION = 1
BYTE_ORDER = 0x01020304

FILE_HEADER = struct.Struct("<8sHHIQQQI20x")
"""Magic, version, size of this header, byte order, clock: TSC base, ns base, mult, shift."""

FRAME_HEADER = struct.Struct("<IHHII")
"""Bytes that follow, type, 0, bytes a record (0 if no records), number of items."""

RECORD_HEADER = struct.Struct("<QQIIIHH16s")
"""Sequence number, TSC, pid, tgid, probe, cpu, flags, comm."""

LOST = struct.Struct("<QIi")
"""Events missing, where they were lost (:class:`LostSource`), vCPU or -1."""

FRAME_LIMIT_BYTES = 16 << 20
"""Longest frame that a reader has to take. Those that are written are near 64 KiB."""

_FRAME_BYTES = 1 << 16
_ALIGN_BYTES = 8
_PROBE_OFFSET = 24


class FrameType(enum.IntEnum):
    """What a frame holds."""

    PROBES = 1
    RECORDS = 2
    LOST = 3
    EVENTS = 4
    END = 5


class LostSource(enum.IntEnum):
    """Where events were lost."""

    RING = 0
    READER = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """A frame to be written.

    :ivar parts: header and contents
    :ivar size_bytes: of both
    :ivar events: how many events are missing without it; 0 for one that has to arrive
    """

    parts: tuple[bytes, ...]
    size_bytes: int
    events: int = 0


def file_header(clock: Clock) -> bytes:
    """What a stream starts with.

    :raises TraceError: if a number of the clock does not fit
    """
    try:
        return FILE_HEADER.pack(
            MAGIC, VERSION, FILE_HEADER.size, BYTE_ORDER, *dataclasses.astuple(clock)
        )
    except struct.error as e:
        raise TraceError(f"{clock} does not fit: {e}") from e


def lost_frame(count: int, source: LostSource, cpu: int | None = None) -> Frame:
    """A frame that says that events are missing here."""
    data = LOST.pack(count, source, -1 if cpu is None else cpu)
    return _frame(FrameType.LOST, data, 1)


def end_frame() -> Frame:
    """The last frame of a stream that is whole."""
    return _frame(FrameType.END, b"", 0)


def text_frames(
    kind: Literal[FrameType.PROBES, FrameType.EVENTS], lines: Iterable[str]
) -> Iterator[Frame]:
    """Frames of JSON lines."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        data = line.encode(errors="backslashreplace") + b"\n"
        if chunk and size + len(data) > _FRAME_BYTES:
            yield _text_frame(kind, chunk)
            chunk, size = [], 0
        chunk.append(data)
        size += len(data)
    if chunk:
        yield _text_frame(kind, chunk)


class BatchFramer:
    """Makes frames of records, with no work per record in Python."""

    def __init__(self) -> None:
        self._layouts: dict[int, ProbeLayout] = {}
        self._sizes = np.zeros(0, np.uint32)

    def add_probes(self, layouts: Iterable[ProbeLayout]) -> list[Frame]:
        """Describe probes; those that are known and the same are skipped.

        :return: frames that tell readers
        :raises TraceError: if a probe has the number of another
        """
        new: dict[int, ProbeLayout] = {}
        for layout in layouts:
            known = self._layouts.get(layout.number) or new.setdefault(layout.number, layout)
            if known != layout:
                raise TraceError(
                    f"{layout.name} and {known.name} have the same number, {layout.number}"
                )
        if new:
            self._layouts |= new
            sizes = np.zeros(max(self._layouts) + 1, np.uint32)
            for number, layout in self._layouts.items():
                sizes[number] = layout.record_bytes
            self._sizes = sizes
        lines = (json_line(layout.to_json()) for layout in new.values())
        return list(text_frames(FrameType.PROBES, lines))

    def count(self, records: Records, record_bytes: int | None) -> int:
        """How many records these are; checks and raises as :meth:`frames`."""
        rows = _as_rows(records, record_bytes)
        if len(rows):
            self._used_bytes(rows)
        return len(rows)

    def frames(self, records: Records, record_bytes: int | None) -> Iterator[Frame]:
        """Frames of records, in their order; what no probe of them uses at their ends is cut off.

        :param record_bytes: size of each; needed for a buffer, known for an array
        :return: frames with a copy of the records
        :raises TraceError: if a record's probe is not known, or is longer than the record
        """
        rows = _as_rows(records, record_bytes)
        if not len(rows):
            return
        width = self._used_bytes(rows)
        each = max(1, _FRAME_BYTES // width)
        for at in range(0, len(rows), each):
            # Bytes of its own: a frame that waits must not hold the whole batch in memory.
            part = rows[at : at + each, :width]
            yield _frame(FrameType.RECORDS, part.tobytes(), len(part), width, events=len(part))

    def _used_bytes(self, rows: npt.NDArray[np.uint8]) -> int:
        numbers = rows[:, _PROBE_OFFSET : _PROBE_OFFSET + 4].copy().view("<u4").reshape(-1)
        highest = int(numbers.max())
        if highest >= len(self._sizes):
            raise TraceError(f"a record of probe {highest}, which was not described")
        sizes = self._sizes[numbers]
        if not sizes.all():
            unknown = int(numbers[int(sizes.argmin())])
            raise TraceError(f"a record of probe {unknown}, which was not described")
        width = -(-int(sizes.max()) // _ALIGN_BYTES) * _ALIGN_BYTES
        if width > rows.shape[1]:
            raise TraceError(
                f"records of {rows.shape[1]} bytes, but one of their probes needs {width}"
            )
        return width


def _as_rows(records: Records, record_bytes: int | None) -> npt.NDArray[np.uint8]:
    if isinstance(records, np.ndarray):
        rows = records
        if records.ndim == 1:
            rows = np.ascontiguousarray(records).view(np.uint8)
            rows = rows.reshape(len(records), records.dtype.itemsize)
    else:
        if not record_bytes or len(records) % record_bytes:
            raise TraceError(f"{len(records)} bytes are not records of {record_bytes} bytes")
        rows = np.frombuffer(records, np.uint8).reshape(-1, record_bytes)
    size = rows.shape[1]
    if size < RECORD_HEADER.size or size % _ALIGN_BYTES:
        raise TraceError(f"records of {size} bytes")
    return rows


def _frame(
    kind: FrameType,
    payload: bytes,
    items: int,
    record_bytes: int = 0,
    *,
    events: int = 0,
) -> Frame:
    header = FRAME_HEADER.pack(len(payload), kind, 0, record_bytes, items)
    parts = (header, payload) if payload else (header,)
    return Frame(parts, len(header) + len(payload), events)


def _text_frame(kind: FrameType, lines: list[bytes]) -> Frame:
    data = b"".join(lines)
    data += b"\n" * (-len(data) % _ALIGN_BYTES)
    return _frame(kind, data, len(lines), events=len(lines) if kind is FrameType.EVENTS else 0)
