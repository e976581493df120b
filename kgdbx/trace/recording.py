"""Recordings that are read: the binary stream in a file."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self, TypeAlias

from kgdbx.probes.event import Event
from kgdbx.probes.value import decode_text
from kgdbx.resident.clock import Clock
from kgdbx.resident.layout import ProbeLayout
from kgdbx.trace.binary import (
    BYTE_ORDER,
    FILE_HEADER,
    FRAME_HEADER,
    FRAME_LIMIT_BYTES,
    LOST,
    MAGIC,
    VERSION,
    FrameType,
    LostSource,
)
from kgdbx.trace.decode import RecordDecoder
from kgdbx.trace.errors import FormatError, TraceError
from kgdbx.trace.event_lines import event_from_line
from kgdbx.trace.sink import Sink

__all__ = ("Lost", "Recording")

_BUFFER_BYTES = 1 << 20
_SHIFT_LIMIT = 64
_SORTED = 1 << 17


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """Events are missing here.

    :ivar count: how many
    :ivar source: whether the guest's ring was full, or the reader of a stream slow
    :ivar cpu: vCPU that they happened on; None if that is not known
    """

    count: int
    source: LostSource
    cpu: int | None


_Item: TypeAlias = Event | Lost


class Recording:
    """A file in the format of streams: written by kgdbx, or a stream that somebody has kept.

    Nothing in it is trusted. What is read before a fault is given before the error is raised.

    :raises FormatError: if it is no such file
    :raises TraceError: if it cannot be opened
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", _BUFFER_BYTES)
        except OSError as e:
            raise TraceError(f"{path}: {e.strerror}") from e
        self._offset = 0
        try:
            self.clock = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._decoder = RecordDecoder(self.clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    @property
    def probes(self) -> dict[int, ProbeLayout]:
        """Probes by number, those that were described up to here."""
        return self._decoder.probes

    def items(self) -> Iterator[_Item]:
        """What is recorded, in its order; that of the vCPUs is by time, together it need not be.

        :raises FormatError: at what is not the format, and where a recording was cut short
        """
        for items in self._frames():
            yield from items

    def convert(self, sink: Sink) -> None:
        """Write all of it to another output, which is not closed, in the order of time.

        What was recorded more than some 100,000 events after its time stays where it is.

        :raises FormatError: at what is not the format, and where a recording was cut short
        """
        waiting: list[tuple[int, _Item]] = []
        last_ns = 0
        try:
            for item in self.items():
                last_ns = last_ns if isinstance(item, Lost) else item.ts_ns
                waiting.append((last_ns, item))
                if len(waiting) >= 2 * _SORTED:
                    waiting.sort(key=_time)
                    _write(sink, waiting[:_SORTED])
                    del waiting[:_SORTED]
        finally:
            waiting.sort(key=_time)
            _write(sink, waiting)

    def _frames(self) -> Iterator[Iterator[_Item]]:
        while True:
            start = self._offset
            header = self._read(FRAME_HEADER.size, "the header of a frame")
            size, kind, _, record_bytes, count = FRAME_HEADER.unpack(header)
            if size > FRAME_LIMIT_BYTES:
                raise self._error(f"a frame of {size} bytes", start)
            payload = self._read(size, "a frame")
            at = start + FRAME_HEADER.size
            if kind == FrameType.END:
                return
            if kind == FrameType.PROBES:
                self._add_probes(payload, at)
            elif kind == FrameType.RECORDS:
                if count * record_bytes != size:
                    raise self._error(f"{count} records of {record_bytes} bytes in {size}", start)
                yield self._records(payload, record_bytes, at)
            elif kind == FrameType.EVENTS:
                yield self._events(payload, at)
            elif kind == FrameType.LOST:
                yield self._lost(payload, at)
            # Others are of a later version that says nothing that is needed here.

    def _read_header(self) -> Clock:
        data = self._read(FILE_HEADER.size, "the header")
        magic, version, size, order, *clock = FILE_HEADER.unpack(data)
        if magic != MAGIC:
            raise self._error("not a trace of kgdbx", 0)
        if order != BYTE_ORDER or version != VERSION:
            raise self._error(f"version {version}, byte order {order:#x}; this reads {VERSION}", 0)
        if not FILE_HEADER.size <= size <= FRAME_LIMIT_BYTES:
            raise self._error(f"a header of {size} bytes", 0)
        if clock[3] >= _SHIFT_LIMIT:
            raise self._error(f"a clock with a shift of {clock[3]}", 0)
        self._read(size - FILE_HEADER.size, "the header")
        return Clock(*clock)

    def _add_probes(self, payload: bytes, at: int) -> None:
        for offset, line in _lines(payload, at):
            try:
                self._decoder.add_probes([ProbeLayout.from_json(json.loads(line))])
            except (ValueError, RecursionError, TraceError) as e:
                raise self._error(f"not a probe: {e}", offset) from e

    def _records(self, payload: bytes, record_bytes: int, at: int) -> Iterator[_Item]:
        try:
            for event in self._decoder.events(payload, record_bytes):
                yield event
                at += record_bytes
        except TraceError as e:
            raise self._error(str(e), at) from e

    def _events(self, payload: bytes, at: int) -> Iterator[_Item]:
        for offset, line in _lines(payload, at):
            try:
                yield event_from_line(line)
            except ValueError as e:
                raise self._error(str(e), offset) from e

    def _lost(self, payload: bytes, at: int) -> Iterator[_Item]:
        if len(payload) < LOST.size:
            raise self._error(f"{len(payload)} bytes say what is lost", at)
        count, source, cpu = LOST.unpack_from(payload)
        if source not in list(LostSource):
            raise self._error(f"lost at {source}, which is no place", at)
        yield Lost(count, LostSource(source), None if cpu < 0 else cpu)

    def _read(self, size_bytes: int, what: str) -> bytes:
        try:
            data = self._file.read(size_bytes)
        except OSError as e:
            raise TraceError(f"{self.path}: {e.strerror}") from e
        if len(data) < size_bytes:
            raise self._error(
                f"cut short: {len(data)} of {size_bytes} bytes of {what}", self._offset
            )
        self._offset += size_bytes
        return data

    def _error(self, message: str, offset_bytes: int) -> FormatError:
        return FormatError(message, str(self.path), offset_bytes)


def _time(stamped: tuple[int, _Item]) -> int:
    return stamped[0]


def _write(sink: Sink, items: Iterable[tuple[int, _Item]]) -> None:
    events: list[Event] = []
    for _, item in items:
        if not isinstance(item, Lost):
            events.append(item)
            continue
        sink.write(events)
        events = []
        sink.write_lost(item.count, item.cpu)
    sink.write(events)


def _lines(payload: bytes, at: int) -> Iterator[tuple[int, str]]:
    # Lines that hold anything, and where they are in the file.
    for line in payload.split(b"\n"):
        if line.strip():
            yield at, decode_text(line)
        at += len(line) + 1
