"""Which blocks can be reached: pointers from one block to another, and from the roots."""

import ctypes
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kgdbx.arch.registers import Registers
from kgdbx.errors import MachineError
from kgdbx.leaks.blocks import NO_SCAN, VM_STRUCT, Heap
from kgdbx.leaks.kmemleak import waiting_behind_kmemleak
from kgdbx.leaks.memory import I64, U8
from kgdbx.leaks.native import load_native, pointer
from kgdbx.leaks.roots import stack_nodes
from kgdbx.leaks.walk import Piece, used_memory

__all__ = ("find_reached",)

_U32: TypeAlias = npt.NDArray[np.uint32]


def find_reached(heap: Heap, registers: Sequence[Registers] | None) -> U8:
    """Mark every block that a pointer leads to, from the roots on.

    It is conservative: whatever looks like a pointer into a block is one.

    :param registers: of all vCPUs, or None if they are not known
    :return: for each node 1 if it can be reached
    :raises MachineError: if there is no gcc, or not enough memory
    """
    own = _reached_anyway(heap)
    heap.node_flags[own] |= NO_SCAN
    edges = _Edges(heap)
    edges.seeds[own] = 1
    edges.seeds[stack_nodes(heap)] = 1
    waiting = (heap.node_of(word) for word in waiting_behind_kmemleak(heap).tolist())
    edges.seeds[[node for node in waiting if node is not None]] = 1
    _add_area_bookkeeping(heap, edges)
    for piece in used_memory(heap, registers):
        edges.add(piece)
    return edges.reach()


class _Edges:
    # Edges between nodes as they are found, and the nodes that roots point to.
    def __init__(self, heap: Heap) -> None:
        self._native = load_native()
        self._tables, self._kept = heap.tables()
        self._sources: list[_U32] = []
        self._targets: list[_U32] = []
        self._room: tuple[int, _U32] | None = None
        self.seeds = np.zeros(heap.nnodes, np.uint8)

    def add(self, piece: Piece) -> None:
        words, sources = piece.words, np.ascontiguousarray(piece.sources)
        source, target = self._buffers(max(words.size, 1))
        if piece.pfns is not None:
            pfns = np.ascontiguousarray(piece.pfns)
            count = self._native.edges_of_slabs(
                ctypes.addressof(self._tables),
                pointer(words),
                len(pfns),
                *(pointer(a) for a in (pfns, source, target)),
            )
        else:
            count = self._native.edges_of_records(
                ctypes.addressof(self._tables),
                pointer(words),
                piece.record_words,
                len(sources),
                *(pointer(a) for a in (sources, source, target, self.seeds)),
            )
        if count:
            self._sources.append(source[:count].copy())
            self._targets.append(target[:count].copy())

    def add_known(self, sources: list[int], targets: list[int]) -> None:
        self._sources.append(np.array(sources, np.uint32))
        self._targets.append(np.array(targets, np.uint32))

    def reach(self) -> U8:
        empty = [np.zeros(0, np.uint32)]
        sources = np.concatenate(self._sources or empty)
        self._sources.clear()
        targets = np.concatenate(self._targets or empty)
        self._targets.clear()
        reached = self.seeds.copy()
        if self._native.reach(
            len(reached), len(sources), *(pointer(a) for a in (sources, targets, reached))
        ):
            raise MachineError("this machine has not enough memory for the graph of the heap")
        return reached

    def _buffers(self, words: int) -> tuple[_U32, ...]:
        if self._room is None or self._room[0] < words:
            self._room = (words, np.empty(2 * words, np.uint32))
        size, room = self._room
        return room[:size], room[size : 2 * size]


# An area and what describes it live and die together: struct vm_struct and the array of its
# pages, which are the area itself. A pointer to a struct vm_struct does not count as one to its
# area: these objects are small, and what is left of former ones on stacks would hide leaks.
def _add_area_bookkeeping(heap: Heap, edges: "_Edges") -> None:
    areas = heap.areas
    first = int(heap.group_first[heap.first_area_group]) if len(areas.start) else 0
    sources: list[int] = []
    targets: list[int] = []
    for addresses, flag in ((areas.vm, NO_SCAN | VM_STRUCT), (areas.pages, NO_SCAN)):
        for row in np.flatnonzero(addresses).tolist():
            node = heap.node_of(int(addresses[row]))
            if node is not None:
                heap.node_flags[node] |= flag
                sources.append(first + row)
                targets.append(node)
    edges.add_known(sources, targets)


# What is no block of its own: areas that map the memory of devices or of others, and those of the
# per-CPU allocator, whose allocations are nodes.
def _reached_anyway(heap: Heap) -> I64:
    areas = heap.areas
    bases = heap.percpu.bases.ravel()
    rows = np.searchsorted(areas.start, bases, side="right") - 1
    ends = np.append(areas.start + areas.size, np.uint64(0))
    inside = (rows >= 0) & (bases < ends[rows])
    chosen = np.union1d(np.flatnonzero(~areas.allocated()), rows[inside])
    nodes: I64 = heap.group_first[heap.first_area_group + chosen].astype(np.int64)
    return nodes
