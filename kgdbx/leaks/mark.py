"""Which blocks can be reached: pointers from one block to another, and from the roots."""

import ctypes
from collections.abc import Sequence

import numpy as np

from kgdbx.arch.registers import Registers
from kgdbx.errors import MachineError
from kgdbx.leaks.heap import NO_SCAN, VM_STRUCT, Heap
from kgdbx.leaks.memory import I64, U8, U64
from kgdbx.leaks.native import load_native, pointer
from kgdbx.leaks.pages import PageKind
from kgdbx.leaks.roots import (
    NONE,
    ROOT,
    percpu_sources,
    register_words,
    root_frames,
    stack_sources,
)
from kgdbx.leaks.slab import ALLOCATED

__all__ = ("find_reached",)

_FRAME_WORDS = 512


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
    _add_area_bookkeeping(heap, edges)
    if registers is not None:
        edges.add_roots(register_words(registers))
    for _, words in heap.memory.frame_chunks(root_frames(heap)):
        edges.add_roots(words)
    words, sources, _ = percpu_sources(heap, registers)
    edges.add(words, 1, sources)
    stack_pfns, stack_of, stacks = stack_sources(heap, registers)
    edges.add(heap.memory.frames(stack_pfns), 1, stack_of)
    _add_areas(heap, edges, stacks)
    _add_pages(heap, edges)
    _add_struct_pages(heap, edges)
    _add_slabs(heap, edges)
    return edges.reach()


class _Edges:
    # Edges between nodes as they are found, and the nodes that roots point to.
    def __init__(self, heap: Heap) -> None:
        self._native = load_native()
        self._tables, self._kept = heap.tables()
        self._sources: list[np.ndarray[tuple[int], np.dtype[np.uint32]]] = []
        self._targets: list[np.ndarray[tuple[int], np.dtype[np.uint32]]] = []
        self._room: tuple[int, np.ndarray[tuple[int], np.dtype[np.uint32]]] | None = None
        self.seeds = np.zeros(heap.nnodes, np.uint8)

    def add_roots(self, words: U64) -> None:
        flat = words.ravel()
        self.add(flat, max(len(flat), 1), np.array([ROOT], np.int64))

    def add(self, words: U64, record_words: int, sources: I64) -> None:
        # `sources`: of each record; ROOT and NONE are no nodes.
        words, sources = np.ascontiguousarray(words), np.ascontiguousarray(sources)
        if not words.size:
            return
        source, target = self._buffers(words.size)
        count = self._native.edges_of_records(
            ctypes.addressof(self._tables),
            pointer(words),
            record_words,
            len(sources),
            *(pointer(a) for a in (sources, source, target, self.seeds)),
        )
        self._append(source, target, count)

    def add_known(self, sources: list[int], targets: list[int]) -> None:
        self._sources.append(np.array(sources, np.uint32))
        self._targets.append(np.array(targets, np.uint32))

    def add_slabs(self, pfns: I64, words: U64) -> None:
        source, target = self._buffers(words.size)
        count = self._native.edges_of_slabs(
            ctypes.addressof(self._tables),
            pointer(words),
            len(pfns),
            *(pointer(a) for a in (np.ascontiguousarray(pfns), source, target)),
        )
        self._append(source, target, count)

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

    def _buffers(self, words: int) -> tuple["np.ndarray[tuple[int], np.dtype[np.uint32]]", ...]:
        if self._room is None or self._room[0] < words:
            self._room = (words, np.empty(2 * words, np.uint32))
        size, room = self._room
        return room[:size], room[size : 2 * size]

    def _append(
        self,
        source: "np.ndarray[tuple[int], np.dtype[np.uint32]]",
        target: "np.ndarray[tuple[int], np.dtype[np.uint32]]",
        count: int,
    ) -> None:
        if count:
            self._sources.append(source[:count].copy())
            self._targets.append(target[:count].copy())


# An area and what describes it live and die together: struct vm_struct and the array of its pages.
# The pages in that array are the area itself.
def _add_area_bookkeeping(heap: Heap, edges: "_Edges") -> None:
    areas = heap.areas
    first = int(heap.group_first[heap.first_area_group]) if len(areas.start) else 0
    sources: list[int] = []
    targets: list[int] = []
    for addresses, flag in ((areas.vm, VM_STRUCT), (areas.pages, NO_SCAN)):
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
    inside = (rows >= 0) & (bases < (areas.start + areas.size)[rows])
    chosen = np.union1d(np.flatnonzero(~areas.allocated()), rows[inside])
    nodes: I64 = heap.group_first[heap.first_area_group + chosen].astype(np.int64)
    return nodes


def _add_areas(heap: Heap, edges: _Edges, stacks: set[int]) -> None:
    areas = heap.areas
    chosen = ~np.isin(areas.frame_area, sorted(stacks))
    pfns, of = areas.frame_pfns[chosen], areas.frame_area[chosen]
    if not len(of):
        return
    nodes = int(heap.group_first[heap.first_area_group]) + of
    at = 0
    for part, words in heap.memory.frame_chunks(pfns):
        edges.add(words, _FRAME_WORDS, nodes[at : at + len(part)])
        at += len(part)


def _add_pages(heap: Heap, edges: _Edges) -> None:
    pfns = np.flatnonzero(heap.pages.kind == PageKind.PAGES)
    group = heap.frame_group[pfns]
    # Pages that belong to no block that is known count as roots: better to miss a leak.
    nodes = np.where(group >= 0, heap.group_first[group].astype(np.int64), ROOT)
    at = 0
    for part, words in heap.memory.frame_chunks(pfns):
        edges.add(words, _FRAME_WORDS, nodes[at : at + len(part)])
        at += len(part)


def _add_struct_pages(heap: Heap, edges: _Edges) -> None:
    kind, memmap = heap.pages.kind, heap.pages.memmap
    nodes = np.full(len(kind), ROOT, np.int64)
    group = heap.frame_group
    own = (kind == PageKind.PAGES) & (group >= 0)
    nodes[own] = heap.group_first[group[own]]
    unused = (kind == PageKind.NO_RAM) | (kind == PageKind.FREE) | (kind == PageKind.VMALLOC)
    nodes[unused] = NONE
    edges.add(memmap, memmap.shape[1], nodes)


def _add_slabs(heap: Heap, edges: _Edges) -> None:
    slabs = heap.slabs
    ends = np.cumsum(slabs.frames)
    within = np.arange(slabs.frames.sum()) - np.repeat(ends - slabs.frames, slabs.frames)
    pfns = np.repeat(slabs.pfns, slabs.frames) + within
    used = heap.node_flags & ALLOCATED != 0
    if used.any():
        for part, words in heap.memory.frame_chunks(pfns):
            edges.add_slabs(part, words)
