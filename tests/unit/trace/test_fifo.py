"""Real readers of real FIFOs and sockets: that read, that stop, and that die."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kgdbx.probes.event import Event
from kgdbx.resident.clock import IDENTITY, Clock
from kgdbx.resident.layout import ProbeLayout
from kgdbx.trace.binary import FILE_HEADER, FRAME_HEADER, LOST, FrameType
from kgdbx.trace.endpoint import FifoEndpoint, SocketEndpoint
from kgdbx.trace.errors import TraceError
from kgdbx.trace.fifo import Fifo
from kgdbx.trace.recording import Recording

Numbered = Callable[..., npt.NDArray[Any]]
Make = Callable[..., Fifo]
DEADLINE_S = 20.0
READER = Path(__file__).parents[3] / "docs" / "read_trace.py"


@pytest.fixture
def make(tmp_path: Path, entry: ProbeLayout) -> Iterator[Make]:
    """Makes a stream of one probe; closed at the end."""
    with contextlib.ExitStack() as stack:

        def start(
            kind: type[Any] = SocketEndpoint, clock: Clock = IDENTITY, **options: Any
        ) -> Fifo:
            fifo = Fifo(kind(tmp_path / f"events{len(os.listdir(tmp_path))}"), clock, **options)
            stack.callback(fifo.close)
            fifo.add_probes([entry])
            return fifo

        yield start


class Reader:
    """Reads a stream with a thread, and checks that what it gets is in its place."""

    def __init__(self, path: Path, *, pause_s: float = 0.0) -> None:
        self.received = self.lost = self.ring_lost = self.events = 0
        self.probes = 0
        self.ended = False
        self.error: Exception | None = None
        self._pause_s = pause_s
        self._path = path
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                if self._path.is_socket():
                    connection = stack.enter_context(socket.socket(socket.AF_UNIX))
                    connection.connect(str(self._path))
                    file: Any = stack.enter_context(connection.makefile("rb"))
                else:
                    file = stack.enter_context(self._path.open("rb"))
                self._read(file)
        except Exception as e:
            self.error = e

    def _read(self, file: Any) -> None:
        assert FILE_HEADER.unpack(file.read(64))[0] == b"KGDBXTRC"
        while header := file.read(16):
            assert not self.ended
            size, kind, _, width, count = FRAME_HEADER.unpack(header)
            payload = file.read(size)
            assert len(payload) == size
            if kind == FrameType.RECORDS:
                rows = np.frombuffer(payload, np.uint8).reshape(count, width)
                numbers = rows[:, 48:56].copy().view("<u8").ravel()
                place = self.received + self.lost + np.arange(count, dtype=np.uint64)
                assert np.array_equal(numbers, place)
                self.received += count
                time.sleep(self._pause_s)
            elif kind == FrameType.LOST:
                lost, source, _ = LOST.unpack(payload)
                if source:
                    self.lost += lost
                else:
                    self.ring_lost += lost
            elif kind == FrameType.PROBES:
                self.probes += count
            elif kind == FrameType.EVENTS:
                self.events += count
            self.ended = kind == FrameType.END


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("kind", [FifoEndpoint, SocketEndpoint])
def test_everything_arrives(
    make: Make, kind: type[Any], numbered: Numbered, event: Callable[..., Event]
) -> None:
    fifo = make(kind)
    assert fifo.path.exists()
    reader = Reader(fifo.path)
    assert fifo.wait_for_reader(DEADLINE_S)
    for first in range(0, 50_000, 1000):
        fifo.write_batch(numbered(1000, first))
        time.sleep(0.0005)  # 50,000 records fit into what may wait, in any case
    fifo.write([event(), event()])
    fifo.write_lost(5, 1)
    fifo.close()
    reader.join()
    assert (reader.received, reader.lost, reader.ring_lost) == (50_000, 0, 5)
    assert (reader.probes, reader.events, reader.ended) == (1, 2, True)
    (delivery,) = fifo.deliveries()
    assert (delivery.offered, delivery.sent, delivery.lost) == (50_002, 50_002, 0)
    assert not fifo.path.exists()


@pytest.mark.parametrize("kind", [FifoEndpoint, SocketEndpoint])
@pytest.mark.parametrize("pause_s", [0.001, 0.01])
def test_received_and_lost_make_what_was_written(
    make: Make, kind: type[Any], numbered: Numbered, pause_s: float
) -> None:
    fifo = make(kind, limit_bytes=200_000)
    reader = Reader(fifo.path, pause_s=pause_s)
    assert fifo.wait_for_reader(DEADLINE_S)
    total = 0
    for size in (1, 1009, 20_000, 7, 300_000, 300_000):
        fifo.write_batch(numbered(size, total))
        total += size
        time.sleep(0.02)
    fifo.close(DEADLINE_S)
    reader.join()
    assert reader.ended
    assert reader.lost > 0
    assert reader.received + reader.lost == total
    (delivery,) = fifo.deliveries()
    assert (delivery.offered, delivery.sent, delivery.lost) == (total, reader.received, reader.lost)


def test_a_reader_that_stops_holds_up_nobody(make: Make, numbered: Numbered) -> None:
    fifo = make()
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.connect(str(fifo.path))
        assert fifo.wait_for_reader(DEADLINE_S)
        good = Reader(fifo.path)
        wait(lambda: len(fifo.deliveries()) == 2)
        batch = 10_000
        records = numbered(batch)
        slowest_s = 0.0
        for first in range(0, 2_000_000, batch):
            records["n"] = np.arange(first, first + batch)
            begin = time.monotonic()
            fifo.write_batch(records)
            slowest_s = max(slowest_s, time.monotonic() - begin)
            wait(lambda: fifo.deliveries()[1].sent + 60_000 >= fifo.deliveries()[1].offered)
        wait(lambda: fifo.deliveries()[1].sent == fifo.deliveries()[1].offered)
        begin = time.monotonic()
        fifo.close(0.2)
        assert time.monotonic() - begin < 1.0
        good.join()
        assert (good.received, good.lost, good.ended) == (2_000_000, 0, True)
        # The other got what the system and its queue had room for, and no more was kept.
        of_stopped = fifo.deliveries()[-2:]
        (stuck,) = (each for each in of_stopped if each.lost)
        assert stuck.offered == 2_000_000 == stuck.sent + stuck.lost
        assert stuck.sent < 100_000
        assert slowest_s < 1.0


def test_a_reader_that_dies(make: Make, numbered: Numbered) -> None:
    fifo = make()
    program = (
        f"import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect({str(fifo.path)!r})\n"
    )
    program += "print(len(s.recv(64)), flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as dying:
        assert dying.stdout is not None and dying.stdout.readline() == b"64\n"
        fifo.write_batch(numbered(200_000))
        dying.kill()
    wait(lambda: not fifo.deliveries()[0].connected)
    (delivery,) = fifo.deliveries()
    assert delivery.offered == delivery.sent + delivery.lost == 200_000
    assert fifo.unread == 0
    fifo.write_batch(numbered(11))
    assert fifo.unread == 11
    reader = Reader(fifo.path)
    wait(lambda: len(fifo.deliveries()) == 2)
    fifo.write_batch(numbered(7))
    fifo.close()
    reader.join()
    assert (reader.probes, reader.received, reader.ended) == (1, 7, True)


def test_fifo_readers_one_after_the_other(make: Make, numbered: Numbered) -> None:
    fifo = make(FifoEndpoint)
    fifo.write_batch(numbered(3))
    assert fifo.unread == 3
    for count in range(1, 4):
        number = os.open(fifo.path, os.O_RDONLY)
        wait(lambda count=count: len(fifo.deliveries()) == count)  # type: ignore[misc]
        fifo.write_batch(numbered(100_000))
        assert os.read(number, 8) == b"KGDBXTRC"
        os.close(number)
        wait(lambda count=count: not fifo.deliveries()[count - 1].connected)  # type: ignore[misc]
    reader = Reader(fifo.path)
    assert fifo.wait_for_reader(DEADLINE_S)
    fifo.write_batch(numbered(5))
    fifo.close()
    reader.join()
    assert (reader.received, reader.lost, reader.ended) == (5, 0, True)


def test_late_readers_get_every_description(
    make: Make, numbered: Numbered, opened: ProbeLayout
) -> None:
    fifo = make()
    early = Reader(fifo.path)
    assert fifo.wait_for_reader(DEADLINE_S)
    fifo.write_batch(numbered(10))
    fifo.add_probes([opened])
    late = Reader(fifo.path)
    wait(lambda: len(fifo.deliveries()) == 2)
    fifo.close()
    early.join()
    late.join()
    assert (early.probes, early.received) == (2, 10)
    assert (late.probes, late.received, late.ended) == (2, 0, True)


def test_too_many_readers_are_turned_away(make: Make) -> None:
    fifo = make()
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(70)]
        for reader in readers:
            reader.connect(str(fifo.path))
            reader.settimeout(DEADLINE_S)
        assert sum(len(reader.recv(8)) for reader in readers) == 64 * 8


def test_nobody_reads(make: Make, numbered: Numbered, event: Callable[..., Event]) -> None:
    for kind in (FifoEndpoint, SocketEndpoint):
        fifo = make(kind)
        assert not fifo.wait_for_reader(0.0)
        fifo.write_batch(numbered(1000))
        fifo.write([event()])
        with pytest.raises(TraceError, match="a record of probe 2, which was not described"):
            records = numbered(1)
            records["probe"] = 2
            fifo.write_batch(records)
        assert fifo.unread == 1001
        fifo.close()
        fifo.close()
        with pytest.raises(TraceError, match="written to after it was closed"):
            fifo.write_batch(numbered(1))
        assert not fifo.wait_for_reader(0.0)


def test_a_fault_is_told(make: Make, numbered: Numbered) -> None:
    fifo = make(FifoEndpoint)
    fifo.path.unlink()
    fifo.path.write_text("not a FIFO any more")
    wait(lambda: not fifo._thread.is_alive())
    with pytest.raises(TraceError, match="exists and is no FIFO"):
        fifo.write_batch(numbered(1))
    with pytest.raises(TraceError, match="exists and is no FIFO"):
        fifo.close()
    fifo.close()
    assert fifo.path.read_text() == "not a FIFO any more"


def test_threads_and_files_end(make: Make, numbered: Numbered) -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = files(), threading.active_count()
    for _ in range(5):
        fifo = make()
        reader = Reader(fifo.path)
        assert fifo.wait_for_reader(DEADLINE_S)
        fifo.write_batch(numbered(10))
        fifo.close()
        reader.join()
    assert (files(), threading.active_count()) == before


def test_a_stream_that_is_kept_is_a_recording(
    make: Make, numbered: Numbered, tmp_path: Path, clock: Clock
) -> None:
    fifo = make(FifoEndpoint, clock)
    kept = tmp_path / "kept"
    with kept.open("wb") as file, subprocess.Popen(["cat", fifo.path], stdout=file):
        assert fifo.wait_for_reader(DEADLINE_S)
        fifo.write_batch(numbered(1000))
        fifo.close()
    with Recording(kept) as recording:
        events = [item for item in recording.items() if isinstance(item, Event)]
    assert [each.fields["n"] for each in events] == list(range(1000))
    assert events[-1].ts_ns == 50_999
