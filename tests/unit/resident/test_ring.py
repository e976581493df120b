"""Rings: what the host takes out of memory that a guest writes, chunk by chunk."""

import struct
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from kgdbx.errors import ProbeError
from kgdbx.resident.guest_call import Call
from kgdbx.resident.host import HostView
from kgdbx.resident.memory import GuestMemory
from kgdbx.resident.ring import Stream, make_stream

SLOT = 64
CPU_SHIFT = 48
PER_CPU = [0x100000, 0x200000]
FAILED, MIB = 0, 1 << 20
ALLOC, PERCPU = 0x1000, 0x2000


class Memory:
    """The guest's allocators, and its memory as the host sees it."""

    def __init__(self, largest_bytes: int, free_bytes: int) -> None:
        self.largest_bytes, self.free_bytes = largest_bytes, free_bytes
        self.end = 0x10000000
        self.words: dict[int, bytes] = {}
        self.data = np.zeros(0, np.uint8)

    def answer(self, call: Call) -> int:
        if call.address == PERCPU:
            return 0x40
        size = call.arguments[0]
        if size > self.largest_bytes or size > self.free_bytes:
            return FAILED
        self.free_bytes -= size
        self.end += size
        return self.end - size + 64 * MIB * (self.end // MIB % 2)  # not one behind the other

    def write(self, address: int, data: bytes) -> None:
        for at in range(0, len(data), 8):
            self.words[address + at] = data[at : at + 8]

    def read_u64(self, address: int) -> int:
        return int.from_bytes(self.words.get(address, bytes(8)), "little")

    def read_into(self, address: int, buffer: memoryview) -> None:
        words = (self.words.get(address + at, bytes(8)) for at in range(0, len(buffer), 8))
        buffer[:] = b"".join(words)


def made(memory: Memory, ring_bytes: int, overwrite: bool = False) -> Stream:
    kernel: Any = SimpleNamespace(
        vmlinux=SimpleNamespace(lookup=lambda name: True),
        address=lambda name: PERCPU if "percpu" in name else ALLOC,
    )
    script = make_stream(GuestMemory(kernel), 0x5000, PER_CPU, SLOT, ring_bytes, overwrite)
    return run(memory, script)


def run(memory: Memory, script: Generator[Call, int, Stream]) -> Stream:
    try:
        call = next(script)
        while True:
            call = script.send(memory.answer(call))
    except StopIteration as e:
        return cast(Stream, e.value)


class Guest:
    """One CPU of the guest as ``reserve()`` and ``commit()`` have it, prelude.h."""

    def __init__(self, memory: Memory, stream: Stream, cpu: int) -> None:
        self.memory, self.stream, self.cpu = memory, stream, cpu
        self.position = stream.positions + PER_CPU[cpu]
        self.control = stream.controls + 32 * cpu

    def reserve(self) -> tuple[int, int] | None:
        head, tail = self.memory.read_u64(self.position), self.memory.read_u64(self.control + 16)
        slots, chunk = self.stream.slots, self.stream.chunk_slots
        assert head >> CPU_SHIFT == self.cpu
        if not self.stream.overwrite and head - tail >= slots:
            lost = self.memory.read_u64(self.position + 8) + 1
            self.memory.write(self.position + 8, lost.to_bytes(8, "little"))
            return None
        self.memory.write(self.position, (head + 1).to_bytes(8, "little"))
        table = self.memory.read_u64(self.control)
        base = self.memory.read_u64(table + 8 * ((head & slots - 1) // chunk))
        return base + (head & chunk - 1) * SLOT, head + 1

    def commit(self, place: tuple[int, int], value: int) -> None:
        self.memory.write(place[0], struct.pack("<QQ", place[1], value))

    def record(self, value: int) -> bool:
        place = self.reserve()
        if place is not None:
            self.commit(place, value)
        return place is not None


def values(memory: Memory, stream: Stream) -> list[tuple[int, int]]:
    host = cast(HostView, memory)
    return [
        (batch.cpu, value)
        for batch in stream.drain(host)
        for value in batch.records[:, 8:16].copy().view("<u8").ravel().tolist()
    ]


def started(memory: Memory, stream: Stream) -> tuple[Guest, Guest]:
    stream.start(cast(HostView, memory))
    return Guest(memory, stream, 0), Guest(memory, stream, 1)


@pytest.mark.parametrize(
    ("largest", "free", "slots", "chunk_slots"),
    [
        (4 * MIB, 64 * MIB, 16 * MIB // SLOT, 4 * MIB // SLOT),
        (MIB, 64 * MIB, 16 * MIB // SLOT, MIB // SLOT),
        (4 * MIB, 13 * MIB, 4 * MIB // SLOT, MIB // 2 // SLOT),  # two chunks and some small ones
        (4096, 3 * 4096, 4096 // SLOT, 4096 // SLOT),
    ],
)
def test_taken_in_the_largest_pieces(largest: int, free: int, slots: int, chunk_slots: int) -> None:
    wanted = 4096 if largest == 4096 else 16 * MIB
    stream = made(Memory(largest, free), wanted)
    assert stream.slots == slots
    chunks = [chunk for ring in stream.rings for chunk in ring.chunks]
    size = stream.chunk_slots * SLOT
    assert len(chunks) * stream.chunk_slots == 2 * stream.slots
    assert all(b - a >= size for a, b in zip(sorted(chunks), sorted(chunks)[1:], strict=False))


def test_no_memory() -> None:
    with pytest.raises(ProbeError, match="the guest has no 4 KiB of memory for probes"):
        made(Memory(4096, 2 * 4096), 4096)


def test_drained_over_many_rounds() -> None:
    memory = Memory(4096, MIB)
    stream = made(memory, 16384)
    assert (stream.slots, stream.chunk_slots) == (256, 64)
    first, second = started(memory, stream)
    seen: list[tuple[int, int]] = []
    written = 0
    for round_ in range(40):
        for _ in range(round_ * 7 % 250):
            assert first.record(written) and second.record(written)
            written += 1
        seen += values(memory, stream)
    assert [value for cpu, value in seen if cpu == 0] == list(range(written))
    assert [value for cpu, value in seen if cpu == 1] == list(range(written))
    assert stream.lost(cast(HostView, memory)) == 0


def test_what_is_not_whole_waits() -> None:
    memory = Memory(4096, MIB)
    stream = made(memory, 8192)
    first, _ = started(memory, stream)
    first.record(1)
    place = first.reserve()
    assert place is not None
    first.record(3)
    unfinished = stream.begun(cast(HostView, memory))
    assert (values(memory, stream), stream.in_flight, unfinished()) == ([(0, 1)], True, True)
    first.commit(place, 2)
    another = first.reserve()
    assert (values(memory, stream), stream.in_flight) == ([(0, 2), (0, 3)], True)
    assert another is not None and not unfinished()  # it was begun later


@pytest.mark.parametrize("overwrite", [False, True])
def test_lost_and_received_are_what_was_written(overwrite: bool) -> None:
    memory = Memory(4096, MIB)
    stream = made(memory, 16384, overwrite)
    first, _ = started(memory, stream)
    written, seen = 0, []
    for burst in (100, 300, 256, 257, 1000):
        for _ in range(burst):
            first.record(written)
            written += 1
        seen += [value for _, value in values(memory, stream)]
        assert seen[-1] == written - 1 if overwrite else written > seen[-1]
    assert seen == sorted(set(seen))
    assert len(seen) == 100 + 256 * 4
    assert len(seen) + stream.lost(cast(HostView, memory)) == written
