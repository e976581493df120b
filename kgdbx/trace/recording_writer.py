"""Recordings that are written: the binary stream into a file."""

import collections
import threading
from collections.abc import Iterable
from pathlib import Path

from kgdbx.probes.event import Event
from kgdbx.resident.clock import Clock
from kgdbx.resident.layout import ProbeLayout
from kgdbx.trace.binary import (
    BatchFramer,
    Frame,
    FrameType,
    LostSource,
    end_frame,
    file_header,
    lost_frame,
    text_frames,
)
from kgdbx.trace.errors import TraceError
from kgdbx.trace.event_lines import event_to_line
from kgdbx.trace.sink import Records

__all__ = ("RecordingWriter",)

_WAITING_BYTES = 256 << 20


class RecordingWriter:
    """Writes records and events to a file, in the format of streams.

    A thread of its own writes the file: while a disk takes its time, records are still taken out
    of the guest's rings. An error of the file shows at a later call, at the latest at the end.

    :param path: replaced if it exists
    :param clock: how time stamps become nanoseconds
    :raises TraceError: if the file cannot be made
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self._framer = BatchFramer()
        self._file = _FrameFile(path, file_header(clock))

    def add_probes(self, layouts: Iterable[ProbeLayout]) -> None:
        """Describe probes, before the first of their records.

        :raises TraceError: if a probe has the number of another, or the file cannot be written
        """
        self._file.write(self._framer.add_probes(layouts))

    def write_batch(self, records: Records, record_bytes: int | None = None) -> None:
        """Write records; they may be overwritten once this returns.

        :param record_bytes: size of each; needed for a buffer, known for an array
        :raises TraceError: if a record's probe was not described, or is longer than the record, or
            the file cannot be written
        """
        self._file.write(self._framer.frames(records, record_bytes))

    def write(self, events: Iterable[Event]) -> None:
        """Write events that are no records.

        :raises TraceError: if the file cannot be written
        """
        self._file.write(text_frames(FrameType.EVENTS, map(event_to_line, events)))

    def write_lost(self, count: int, cpu: int | None = None) -> None:
        """Say that events are missing here.

        :raises TraceError: if the file cannot be written
        """
        self._file.write([lost_frame(count, LostSource.RING, cpu)])

    def close(self) -> None:
        """Write what tells that the recording is whole. Idempotent.

        :raises TraceError: if the file cannot be written
        """
        if not self._file.closed:
            try:
                self._file.write([end_frame()])
            finally:
                self._file.close()


class _FrameFile:
    # What waits for the disk is bounded: with more, write() waits, and then the guest's rings fill.

    def __init__(self, path: Path, header: bytes) -> None:
        self._path = path
        self._waiting: collections.deque[bytes] = collections.deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._ending = False
        self._error: OSError | None = None
        try:
            # Unbuffered: frames are large, and what a full disk refused is not tried again.
            self._file = path.open("wb", 0)
        except OSError as e:
            raise TraceError(f"{path}: {e.strerror}") from e
        try:
            self._write(header)
        except OSError as e:
            self._file.close()
            raise TraceError(f"{path}: {e.strerror}") from e
        self._thread = threading.Thread(target=self._run, name=f"writer of {path}", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, frames: Iterable[Frame]) -> None:
        if self._file.closed:
            raise TraceError(f"{self._path}: written to after it was closed")
        for frame in frames:
            data = b"".join(frame.parts)
            with self._changed:
                while self._waiting_bytes > _WAITING_BYTES and self._error is None:
                    self._changed.wait()
                self._raise_error()
                self._waiting.append(data)
                self._waiting_bytes += len(data)
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()
        self._file.close()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise TraceError(f"{self._path}: {self._error.strerror}") from self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._ending:
                    self._changed.wait()
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            try:
                self._write(data)
            except OSError as e:
                with self._changed:
                    self._error = e
                    self._waiting.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting_bytes -= len(data)
                self._changed.notify_all()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
