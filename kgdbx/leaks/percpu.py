"""Per-CPU memory: the chunks of the allocator, and what is allocated of them."""

import dataclasses

import numpy as np
import numpy.typing as npt

from kgdbx.errors import MemoryFault
from kgdbx.leaks.layout import PercpuLayout
from kgdbx.leaks.memory import I64, PAGE_BYTES, U64, BulkMemory
from kgdbx.symbols.kernel import Kernel

__all__ = ("PercpuMemory", "read_percpu")

_UNIT_OF_MAP = 4  # PCPU_MIN_ALLOC_SIZE, include/linux/percpu.h
_MOST_CHUNKS = 10000
_MOST_PAGES = 1 << 12
_MOST_CPUS = 1 << 13  # the largest NR_CPUS, arch/x86/Kconfig
_MOST_SLOTS = 1000
_LARGEST_UNIT = _MOST_PAGES * PAGE_BYTES


@dataclasses.dataclass
class PercpuMemory:
    """All per-CPU allocations, by address.

    :ivar start: what ``alloc_percpu()`` gave: a guest-virtual address that stands for one a CPU
    :ivar size: bytes for one CPU
    :ivar bases: guest-virtual addresses of the units of all chunks: a row each, a column a CPU
    :ivar unit_bytes: size of a unit
    :ivar of_chunk: chunk of each allocation
    :ivar offset: of each allocation in a unit
    :ivar fixed: bytes at the start of a unit of the first chunk that are the kernel's and the
        modules' own variables; of the other chunks 0
    :ivar errors: what cannot be read
    """

    start: U64
    size: U64
    bases: U64
    unit_bytes: int
    of_chunk: I64
    offset: I64
    fixed: I64
    errors: list[str]


def read_percpu(kernel: Kernel, memory: BulkMemory, layout: PercpuLayout) -> PercpuMemory:
    """Read the chunks of the per-CPU allocator (mm/percpu.c). What is damaged is told in errors."""
    try:
        return _read(kernel, memory, layout)
    except MemoryFault as e:
        empty = np.zeros(0, np.uint64)
        none = np.zeros(0, np.int64)
        bases = np.zeros((0, 0), np.uint64)
        told = [f"per-CPU memory is left out: {e}"]
        return PercpuMemory(empty, empty, bases, 0, none, none, none, told)


def _read(kernel: Kernel, memory: BulkMemory, layout: PercpuLayout) -> PercpuMemory:
    base = memory.read_u64(kernel.address("pcpu_base_addr"))
    cpus = memory.read_u32(kernel.address("pcpu_nr_units"))
    unit_bytes = memory.read_u32(kernel.address("pcpu_unit_size"))
    if not (0 < cpus <= _MOST_CPUS and 0 < unit_bytes <= _LARGEST_UNIT) or unit_bytes % PAGE_BYTES:
        raise MemoryFault(base, unit_bytes)
    offsets = np.frombuffer(
        memory.read(memory.read_u64(kernel.address("pcpu_unit_offsets")), 8 * cpus), np.uint64
    )
    errors: list[str] = []
    starts, sizes, chunks, places = [], [], [], []
    bases: list[U64] = []
    fixed: list[int] = []
    first = memory.read_u64(kernel.address("pcpu_first_chunk"))
    for address in _chunks(kernel, memory, layout, errors):
        try:
            chunk = memory.read(address, layout.size_bytes)
            chunk_base = _int(chunk, layout.base_addr, 8)
            nbits = min(_int(chunk, layout.nr_pages, 4), _MOST_PAGES) * PAGE_BYTES // _UNIT_OF_MAP
            allocated = _bits(memory, _int(chunk, layout.alloc_map, 8), nbits)
            bounds = _bits(memory, _int(chunk, layout.bound_map, 8), nbits + 1)
        except MemoryFault as e:
            errors.append(f"the per-CPU chunk at {address:#x} is left out: {e}")
            continue
        hidden = _int(chunk, layout.start_offset, 4)
        # The first chunk's units begin with the static variables.
        before = (chunk_base - base) & ((1 << 64) - 1) if address == first else 0
        at, size = _allocations(allocated, bounds, nbits)
        keep = at >= hidden if address == first else at >= 0
        at, size = at[keep], size[keep]
        starts.append(np.uint64((chunk_base - base) & ((1 << 64) - 1)) + at.astype(np.uint64))
        sizes.append(size.astype(np.uint64))
        chunks.append(np.full(len(at), len(bases)))
        places.append(at + before)
        bases.append(np.uint64((chunk_base - before) & ((1 << 64) - 1)) + offsets)
        fixed.append(before + hidden)
    start = np.concatenate(starts) if starts else np.zeros(0, np.uint64)
    order = np.argsort(start, kind="stable")
    return PercpuMemory(
        start[order],
        np.concatenate(sizes)[order] if sizes else np.zeros(0, np.uint64),
        np.array(bases, np.uint64).reshape(len(bases), cpus),
        unit_bytes,
        np.concatenate(chunks)[order] if chunks else np.zeros(0, np.int64),
        np.concatenate(places)[order] if places else np.zeros(0, np.int64),
        np.array(fixed, np.int64),
        errors,
    )


# All chunks are in lists by how much is free in them.
def _chunks(
    kernel: Kernel, memory: BulkMemory, layout: PercpuLayout, errors: list[str]
) -> list[int]:
    slots = min(memory.read_u32(kernel.address("pcpu_nr_slots")), _MOST_SLOTS)
    steps = 0
    lists = memory.read_u64(kernel.address("pcpu_chunk_lists"))
    found = [memory.read_u64(kernel.address("pcpu_first_chunk"))]
    seen = set(found)
    for slot in range(slots):
        head = lists + 16 * slot
        try:
            at = memory.read_u64(head)
            while at != head and steps < _MOST_CHUNKS:
                steps += 1
                if at - layout.list not in seen:
                    seen.add(at - layout.list)
                    found.append(at - layout.list)
                at = memory.read_u64(at)
        except MemoryFault as e:
            errors.append(f"a list of per-CPU chunks is damaged: {e}")
    if steps >= _MOST_CHUNKS:
        errors.append("a list of per-CPU chunks loops")
    return found


def _bits(memory: BulkMemory, address: int, nbits: int) -> npt.NDArray[np.bool_]:
    data = memory.read(address, -(-nbits // 64) * 8)
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[:nbits].astype(bool)


# An allocation starts at a boundary and ends at the next one.
def _allocations(
    allocated: npt.NDArray[np.bool_], bounds: npt.NDArray[np.bool_], nbits: int
) -> tuple[I64, I64]:
    edges = np.flatnonzero(bounds)
    edges = np.union1d(edges, [0, nbits]).astype(np.int64)
    start, end = edges[:-1], edges[1:]
    used = allocated[start]
    return start[used] * _UNIT_OF_MAP, (end - start)[used] * _UNIT_OF_MAP


def _int(data: bytes, offset: int, size_bytes: int) -> int:
    return int.from_bytes(data[offset : offset + size_bytes], "little")
