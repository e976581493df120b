"""The leak scan: blocks of the whole heap that nothing points to any more."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kgdbx.arch.registers import Registers
from kgdbx.leaks.blocks import NO_SCAN, VM_STRUCT, Block, Heap
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.mark import find_reached
from kgdbx.leaks.memory import I64, PhysicalMemory
from kgdbx.leaks.slab import ALLOCATED
from kgdbx.symbols.kernel import Kernel

__all__ = ("CacheUsage", "Scan", "cache_usage", "confirm", "scan_heap")


@dataclasses.dataclass(frozen=True)
class CacheUsage:
    """How much of a cache, or of another kind of memory, is in use.

    :ivar objects: number of allocated blocks
    :ivar size_bytes: bytes in them
    """

    cache: str
    objects: int
    size_bytes: int


@dataclasses.dataclass
class Scan:
    """What one scan found.

    :ivar heap: the heap that was looked at
    :ivar leaks: blocks that cannot be reached, by address
    :ivar unreached: the nodes of all of them
    :ivar errors: what is damaged, unknown or was left out; empty if all was looked at. A scan
        with errors that finds nothing does not say that there is nothing
    """

    heap: Heap
    leaks: tuple[Block, ...]
    unreached: I64
    errors: tuple[str, ...]


def scan_heap(
    kernel: Kernel,
    ram: PhysicalMemory,
    registers: Sequence[Registers] | None = None,
    own: Sequence[tuple[int, int]] = (),
) -> Scan:
    """Find the blocks that nothing points to, in memory as it is now.

    :param ram: the kernel's physical memory, at rest or live
    :param registers: of all vCPUs if the kernel stands: pointers may be in them alone
    :param own: guest-virtual ``(start, size_bytes)`` of memory that is left out: that of the
        resident tier
    :raises SymbolError: if debug information does not tell the layout of the heap
    :raises MachineError: if there is no gcc
    """
    heap = read_heap(kernel, ram)
    heap.leave_out(own)
    reached = find_reached(heap, registers)
    lost = (heap.node_flags & ALLOCATED != 0) & (reached == 0)
    # What is in use of a slab with a damaged freelist is not known.
    for number in np.flatnonzero(heap.slabs.doubtful).tolist():
        first = int(heap.group_first[number])
        lost[first : first + int(heap.group_count[number])] = False
    # What describes a lost area is lost with it.
    lost &= heap.node_flags & (NO_SCAN | VM_STRUCT) == 0
    nodes = np.flatnonzero(lost)
    blocks = sorted((heap.block(node) for node in nodes.tolist()), key=lambda b: b.address)
    return Scan(heap, tuple(blocks), nodes, tuple(heap.errors))


def confirm(first: Scan, second: Scan) -> Scan:
    """Of two scans of a running kernel, what both found: the same blocks, of the same size.

    A pointer that is on its way from one place to another is seen by neither of two reads; it is
    hardly so twice. What is damaged in one of the scans only was being changed.
    """
    known = {(b.cache, b.address, b.size_bytes) for b in first.leaks}
    leaks = tuple(b for b in second.leaks if (b.cache, b.address, b.size_bytes) in known)
    nodes = np.array([block.node for block in leaks], np.int64)
    errors = tuple(error for error in second.errors if error in first.errors)
    return Scan(second.heap, leaks, nodes, errors)


def cache_usage(heap: Heap) -> tuple[CacheUsage, ...]:
    """Allocated blocks of each cache and kind, largest first; merged caches are one."""
    nodes = np.flatnonzero(heap.node_flags & ALLOCATED)
    numbers = heap.cache_numbers(nodes)
    names = heap.cache_names
    counts = np.bincount(numbers, minlength=len(names))
    sizes = np.bincount(numbers, heap.sizes(nodes), minlength=len(names))
    usage = [
        CacheUsage(name, int(count), int(size))
        for name, count, size in zip(names, counts, sizes, strict=True)
        if count
    ]
    return tuple(sorted(usage, key=lambda u: (-u.size_bytes, u.cache)))
