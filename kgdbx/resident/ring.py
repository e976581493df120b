"""Rings: one per CPU and record size, written by the guest, drained from its memory.

A ring is in chunks, as the guest's allocator gives no more than 4 MiB in one piece. A position
counts the records of one CPU's ring since the beginning. The guest reserves the next one with a
single instruction on per-CPU memory and writes the record's number last; the host reads what is
whole and says how far it has come. With ``overwrite`` the guest never waits for the host: the
newest records win, and what was overwritten is counted.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kgdbx.errors import ProbeError
from kgdbx.resident.guest_call import Script
from kgdbx.resident.host import HostView
from kgdbx.resident.memory import MAX_BLOCK_BYTES, PAGE_BYTES, Block, GuestMemory

__all__ = ("Batch", "RING_BYTES", "SLOT_SIZES", "Stream", "make_stream", "slot_size")

SLOT_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Sizes of a slot in bytes; each in use has rings of its own."""

RING_BYTES = 1 << 20
"""Default size of one CPU's ring."""

_POSITION_BITS = 48
_POSITION_MASK = (1 << _POSITION_BITS) - 1
_RING = struct.Struct("<QQQQ")  # struct ring
_SEQ_AT = 0
_MOST_CHUNKS = 256  # of one ring, where the guest's memory is in small pieces


@dataclass(frozen=True)
class Batch:
    """Whole records of one CPU, oldest first.

    :ivar records: shape (n, slot bytes), of unsigned bytes; a copy
    """

    cpu: int
    records: npt.NDArray[np.uint8]


@dataclass
class _Ring:
    cpu: int
    chunks: list[int]
    table: int  # their addresses, for the guest
    control: int  # struct ring
    position: int  # struct position
    tail: int = 0
    lost: int = 0
    in_flight: bool = False  # what comes next was not whole yet


@dataclass(eq=False)
class Stream:
    """The rings of one record size.

    :ivar slot_bytes: size of a record's place
    :ivar slots: places in a ring, a power of two
    :ivar chunk_slots: places in each of its chunks, a power of two
    :ivar overwrite: the newest records win over those that were not read
    :ivar overwritten: records that were overwritten before they were read
    """

    slot_bytes: int
    slots: int
    chunk_slots: int
    overwrite: bool
    positions: int
    controls: int
    rings: list[_Ring] = field(default_factory=list)
    overwritten: int = 0

    @property
    def arguments(self) -> str:
        """The first arguments of ``reserve()`` in C."""
        return (
            f"{self.positions:#x}UL, (struct ring *){self.controls:#x}UL, {self.slots}, "
            f"{self.chunk_slots}, {self.slot_bytes}, {int(self.overwrite)}"
        )

    def start(self, host: HostView) -> None:
        """Write what the guest starts from, before any probe uses it."""
        for ring in self.rings:
            host.write(ring.position, (ring.cpu << _POSITION_BITS).to_bytes(8, "little"))
            first = ring.cpu << _POSITION_BITS
            host.write(ring.table, struct.pack(f"<{len(ring.chunks)}Q", *ring.chunks))
            host.write(ring.control, _RING.pack(ring.table, first, first, first))

    def drain(self, host: HostView) -> Iterator[Batch]:
        """Take what was whole when it began. The guest may run."""
        for ring in self.rings:
            head = host.read_u64(ring.position) & _POSITION_MASK
            while (batch := self._drain(ring, host, head)) is not None:
                yield batch

    @property
    def in_flight(self) -> bool:
        """Whether the last drain met a record that was not whole yet."""
        return any(ring.in_flight for ring in self.rings)

    def begun(self, host: HostView) -> Callable[[], bool]:
        """To be asked after a drain: whether any record that has been begun until now is not out of
        its ring yet.
        """
        heads = [(ring, host.read_u64(ring.position) & _POSITION_MASK) for ring in self.rings]
        return lambda: any(ring.tail < head for ring, head in heads)

    def lost(self, host: HostView) -> int:
        """Records that found their ring full, or were overwritten unread; never silent."""
        for ring in self.rings:
            ring.lost = host.read_u64(ring.position + 8)
        return sum(ring.lost for ring in self.rings) + self.overwritten

    def _drain(self, ring: _Ring, host: HostView, head: int) -> Batch | None:
        if self.overwrite and head - ring.tail > self.slots:
            skipped = head - self.slots - ring.tail
            self.overwritten += skipped
            ring.tail += skipped
        count = head - ring.tail
        ring.in_flight = count > 0
        if count <= 0:
            return None
        chunk, first = divmod(ring.tail % self.slots, self.chunk_slots)
        count = min(count, self.chunk_slots - first)  # up to its end; the rest comes next
        records = np.empty((count, self.slot_bytes), np.uint8)
        host.read_into(ring.chunks[chunk] + first * self.slot_bytes, records.data.cast("B"))
        numbers = records[:, _SEQ_AT : _SEQ_AT + 8].copy().view("<u8").ravel()
        whole = numbers == np.uint64(ring.cpu << _POSITION_BITS | ring.tail + 1) + np.arange(
            count, dtype=np.uint64
        )
        if self.overwrite:
            return self._newest(ring, host, records, whole)
        count = count if whole.all() else int(np.argmin(whole))
        if not count:
            return None
        self._advance(ring, host, ring.tail + count)
        return Batch(ring.cpu, records[:count])

    def _newest(
        self,
        ring: _Ring,
        host: HostView,
        records: npt.NDArray[np.uint8],
        whole: npt.NDArray[np.bool_],
    ) -> Batch | None:
        # What was overwritten while it was being read is dropped, and counted.
        head = host.read_u64(ring.position) & _POSITION_MASK
        numbers = ring.tail + np.arange(len(records))
        gone = numbers < head - self.slots
        pending = ~whole & ~gone
        end = int(np.argmax(pending)) if pending.any() else len(records)
        if not end:
            return None
        kept = records[:end][~gone[:end] & whole[:end]]
        self.overwritten += end - len(kept)
        self._advance(ring, host, ring.tail + end)
        return Batch(ring.cpu, kept)

    def _advance(self, ring: _Ring, host: HostView, tail: int) -> None:
        ring.tail = tail
        if not self.overwrite:
            data = (ring.cpu << _POSITION_BITS | tail).to_bytes(8, "little")
            host.write(ring.control + 16, data)
            host.write(ring.control + 24, data)


def slot_size(record_bytes: int) -> int:
    """The smallest slot that holds a record.

    :raises ProbeError: if none does
    """
    for size in SLOT_SIZES:
        if record_bytes <= size:
            return size
    raise ProbeError(f"a record of {record_bytes} bytes is too large; at most {SLOT_SIZES[-1]}")


def make_stream(
    memory: GuestMemory,
    controls: int,
    per_cpu_offsets: list[int],
    slot_bytes: int,
    ring_bytes: int,
    overwrite: bool,
) -> Script[Stream]:
    """Take the memory of a stream from the guest.

    :param controls: address of ``struct ring`` for each CPU, in a data page of ours
    :param per_cpu_offsets: ``__per_cpu_offset`` of each CPU
    :param ring_bytes: for each CPU, a power of two; less if the guest has no more
    :raises ProbeError: if it has not even a page for each
    """
    positions = yield from memory.per_cpu(64)
    cpus = len(per_cpu_offsets)
    least_bytes = max(PAGE_BYTES, slot_bytes, ring_bytes // _MOST_CHUNKS)
    table_bytes = 8 * (ring_bytes // least_bytes)
    tables = yield from memory.pages(-(-table_bytes * cpus // PAGE_BYTES) * PAGE_BYTES)
    chunks, chunk_bytes = yield from _take_chunks(memory, ring_bytes, cpus, least_bytes)
    each = 1 << (len(chunks) // cpus).bit_length() - 1
    chunk_slots = chunk_bytes // slot_bytes
    stream = Stream(slot_bytes, each * chunk_slots, chunk_slots, overwrite, positions, controls)
    for cpu, offset in enumerate(per_cpu_offsets):
        own = chunks[cpu * each : (cpu + 1) * each]
        table = tables.address + table_bytes * cpu
        position = (positions + offset) & (1 << 64) - 1
        stream.rings.append(_Ring(cpu, own, table, controls + _RING.size * cpu, position))
    return stream


def _take_chunks(
    memory: GuestMemory, ring_bytes: int, cpus: int, least_bytes: int
) -> Script[tuple[list[int], int]]:
    # The largest pieces that the guest has, cut to the size of the smallest of them.
    chunk_bytes = min(ring_bytes, MAX_BLOCK_BYTES)
    blocks: list[Block] = []
    missing = cpus * ring_bytes
    while missing > 0:
        try:
            block = yield from memory.pages(chunk_bytes, least_bytes, reserves=False)
        except ProbeError:
            if sum(b.size_bytes for b in blocks) // chunk_bytes < cpus:
                raise
            break
        blocks.append(block)
        missing -= block.size_bytes
        chunk_bytes = block.size_bytes
    return [
        at
        for block in blocks
        for at in range(block.address, block.address + block.size_bytes, chunk_bytes)
    ], chunk_bytes
