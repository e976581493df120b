"""Events to programs outside, through a FIFO or a socket, while the trace runs."""

import collections
import os
import select
import signal
import threading
import time
from collections.abc import Iterable

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
from kgdbx.trace.endpoint import Endpoint
from kgdbx.trace.errors import TraceError
from kgdbx.trace.event_lines import event_to_line
from kgdbx.trace.queue import Delivery, FrameQueue
from kgdbx.trace.sink import Records

__all__ = ("Fifo", "READER_LIMIT_BYTES")

READER_LIMIT_BYTES = 4 << 20
"""How much may wait for one reader."""

_READERS = 64
_REMEMBERED = 64
_RETRY_MS = 20
_CALLS_A_TURN = 16
_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Fifo:
    """Sends records and events to readers, each at its own pace; never waits for one.

    A thread of its own does the sending. A reader that does not keep up loses whole frames, is told
    how many events they held, and does not hold up the others or the caller. A reader that comes
    late gets the descriptions of all probes first.

    :param endpoint: where readers come from; closed with this
    :param clock: how time stamps become nanoseconds
    :param limit_bytes: how much may wait for one reader
    """

    def __init__(
        self, endpoint: Endpoint, clock: Clock, *, limit_bytes: int = READER_LIMIT_BYTES
    ) -> None:
        self.path = endpoint.path
        self._endpoint = endpoint
        self._limit_bytes = limit_bytes
        self._framer = BatchFramer()
        header = file_header(clock)
        self._preamble = [Frame((header,), len(header))]
        # All that follows is shared with the thread, under this lock.
        self._changed = threading.Condition()
        self._queues: dict[int, FrameQueue] = {}
        self._gone: collections.deque[Delivery] = collections.deque(maxlen=_REMEMBERED)
        self._unread = 0
        self._deadline_s: float | None = None
        self._error: Exception | None = None
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"readers of {self.path}")
        self._thread.daemon = True
        self._thread.start()

    def add_probes(self, layouts: Iterable[ProbeLayout]) -> None:
        """Describe probes, before the first of their records.

        :raises TraceError: if a probe has the number of another
        """
        with self._changed:
            frames = self._framer.add_probes(layouts)
            self._preamble += frames
            self._offer(frames)

    def write_batch(self, records: Records, record_bytes: int | None = None) -> None:
        """Write records; they may be overwritten once this returns.

        :param record_bytes: size of each; needed for a buffer, known for an array
        :raises TraceError: if a record's probe was not described, or is longer than the record
        """
        with self._changed:
            if self._queues:
                self._offer(self._framer.frames(records, record_bytes))
            else:
                self._check_open()
                self._unread += self._framer.count(records, record_bytes)

    def write(self, events: Iterable[Event]) -> None:
        """Write events that are no records."""
        with self._changed:
            frames = list(text_frames(FrameType.EVENTS, map(event_to_line, events)))
            self._offer(frames)
            if not self._queues:
                self._unread += sum(frame.events for frame in frames)

    def write_lost(self, count: int, cpu: int | None = None) -> None:
        """Say that events are missing here: they were lost before they came this far."""
        with self._changed:
            self._offer([lost_frame(count, LostSource.RING, cpu)])

    def wait_for_reader(self, timeout_s: float | None = None) -> bool:
        """Wait until somebody reads.

        :return: whether somebody does
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: bool(self._queues) or not self._thread.is_alive(), timeout_s
            ) and bool(self._queues)

    @property
    def unread(self) -> int:
        """How many events were written while nobody read."""
        with self._changed:
            return self._unread

    def deliveries(self) -> list[Delivery]:
        """What became of the events for each reader: the last ones gone, then those there."""
        with self._changed:
            there = [queue.delivery(connected=True) for queue in self._queues.values()]
            return [*self._gone, *there]

    def close(self, timeout_s: float = 2.0) -> None:
        """Let readers take what waits, then end their streams and remove the path. Idempotent.

        :param timeout_s: longest wait; what then still waits is lost
        :raises TraceError: if sending had failed before
        """
        with self._changed:
            if self._deadline_s is None:
                self._deadline_s = time.monotonic() + timeout_s
                for queue in self._queues.values():
                    queue.tell_lost()
                    queue.offer(end_frame())
                os.eventfd_write(self._waker, 1)
        self._thread.join()
        if self._waker >= 0:
            os.close(self._waker)
            self._waker = -1
        if self._error is not None:
            error, self._error = self._error, None
            raise TraceError(f"{self.path}: {error}") from error

    def _check_open(self) -> None:
        if self._error is not None:
            raise TraceError(f"{self.path}: {self._error}") from self._error
        if self._deadline_s is not None:
            raise TraceError(f"{self.path}: written to after it was closed")

    def _offer(self, frames: Iterable[Frame]) -> None:
        self._check_open()
        for frame in frames:
            for queue in self._queues.values():
                queue.offer(frame)
        if self._queues:
            os.eventfd_write(self._waker, 1)

    # From here on: in the thread.

    def _run(self) -> None:
        # Signals are the main thread's, also in a debugger that has one of its own for them. A
        # write to a reader that is gone gives an error, not SIGPIPE.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._serve()
        except (OSError, TraceError) as e:
            with self._changed:
                self._error = e
        finally:
            with self._changed:
                for reader in list(self._queues):
                    self._drop(reader)
                self._endpoint.close()
                self._changed.notify_all()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._waker, select.POLLIN)
        if self._endpoint.listener is not None:
            poll.register(self._endpoint.listener, select.POLLIN)
        while True:
            with self._changed:
                deadline_s = self._deadline_s
                busy = False
                for reader, queue in self._queues.items():
                    poll.register(reader, select.POLLOUT if queue else 0)
                    busy = busy or bool(queue)
            if deadline_s is not None and (not busy or time.monotonic() >= deadline_s):
                return
            for number, events in poll.poll(self._timeout_ms(deadline_s)):
                if number == self._waker:
                    os.eventfd_read(self._waker)
                elif number in self._queues and (events & _GONE or not self._send(number)):
                    poll.unregister(number)
                    with self._changed:
                        self._drop(number)
            if deadline_s is None:
                self._accept()

    def _timeout_ms(self, deadline_s: float | None) -> float | None:
        if deadline_s is not None:
            return max(0.0, deadline_s - time.monotonic()) * 1000
        waits = self._endpoint.listener is None and not self._queues
        return _RETRY_MS if waits else None

    def _accept(self) -> None:
        for reader in self._endpoint.accept(len(self._queues)):
            if len(self._queues) >= _READERS:
                os.close(reader)
                continue
            queue = FrameQueue(self._limit_bytes)
            with self._changed:
                for frame in self._preamble:
                    queue.offer(frame)
                if self._deadline_s is not None:
                    queue.offer(end_frame())
                self._queues[reader] = queue
                self._changed.notify_all()

    def _send(self, reader: int) -> bool:
        # Whether the reader is still there.
        queue = self._queues[reader]
        for _ in range(_CALLS_A_TURN):
            with self._changed:
                parts = queue.parts()
            if not parts:
                return True
            try:
                size = os.writev(reader, parts)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            with self._changed:
                queue.taken(size)
        return True

    def _drop(self, reader: int) -> None:
        queue = self._queues.pop(reader)
        queue.discard()
        self._gone.append(queue.delivery(connected=False))
        os.close(reader)
