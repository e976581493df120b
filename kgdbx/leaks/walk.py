"""All memory in which a pointer counts, piece by piece: roots, stacks, and what is allocated."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from kgdbx.arch.registers import GENERAL_REGISTERS, Registers
from kgdbx.leaks.blocks import Heap
from kgdbx.leaks.kmemleak import blank_kmemleak_pool
from kgdbx.leaks.memory import I64, PAGE_BYTES, U64
from kgdbx.leaks.pages import PageKind
from kgdbx.leaks.roots import NONE, ROOT, percpu_sources, root_frames, stack_sources

__all__ = ("IN_SLABS", "Piece", "used_memory")

IN_SLABS = -3
"""Source of frames of slabs: each object in them is one of its own, if it is allocated."""

_FRAME_WORDS = PAGE_BYTES // 8


@dataclasses.dataclass
class Piece:
    """Some memory as it was read.

    :ivar what: ``register``, ``variable``, ``percpu``, ``stack``, ``vmalloc``, ``pages``,
        ``struct page`` or ``slab``
    :ivar words: its words
    :ivar record_words: how many words have one source
    :ivar sources: node of each record, or :data:`~kgdbx.leaks.roots.ROOT`,
        :data:`~kgdbx.leaks.roots.NONE` or :data:`IN_SLABS`
    :ivar addresses: guest-virtual addresses of runs of words; of registers, vCPU and number
    :ivar run_words: how many words such a run has
    :ivar pfns: of frames of slabs
    """

    what: str
    words: U64
    record_words: int
    sources: I64
    addresses: U64
    run_words: int = _FRAME_WORDS
    pfns: I64 | None = None

    def address_of(self, word: int) -> int:
        """Guest-virtual address of a word."""
        run, within = divmod(word, self.run_words)
        return int(self.addresses[run]) + 8 * within

    def source_of(self, word: int) -> int:
        """Source of a word."""
        return int(self.sources[word // self.record_words])


def used_memory(heap: Heap, registers: Sequence[Registers] | None) -> Iterator[Piece]:
    """Read all memory in use, some MiB at a time.

    Free pages, the page cache and the memory of processes are not read, nor what lies below the
    stack pointers, nor kmemleak's records.

    :param registers: of all vCPUs; None if they are not known
    """
    if registers is not None:
        yield _registers(registers)
    direct = np.uint64(heap.memory.direct_map)
    for pfns, words in heap.memory.frame_chunks(root_frames(heap)):
        sources = np.full(len(pfns), ROOT, np.int64)
        addresses = heap.memory.frame_addresses(pfns)
        blank_kmemleak_pool(heap.kernel, words, addresses)
        yield Piece("variable", words.ravel(), _FRAME_WORDS, sources, addresses)
    words, sources, addresses = percpu_sources(heap, registers)
    if len(words):
        yield Piece("percpu", words, 1, sources, addresses, run_words=1)
    stack_pfns, stack_of, stacks = stack_sources(heap, registers)
    frames = heap.memory.frames(stack_pfns).ravel()
    chosen = np.isin(heap.areas.frame_area, sorted(stacks))
    at = _area_addresses(heap)
    yield Piece("stack", frames, 1, stack_of, at[chosen])
    yield from _areas(heap, ~chosen, at)
    yield from _pages(heap, direct)
    yield _struct_pages(heap)
    yield from _slabs(heap, direct)


def _registers(registers: Sequence[Registers]) -> Piece:
    named = [
        ((cpu << 8) + number, each[name])
        for cpu, each in enumerate(registers)
        for number, name in enumerate(GENERAL_REGISTERS)
        if name in each
    ]
    places, values = (np.array([row[n] for row in named], np.uint64) for n in (0, 1))
    return Piece("register", values, 1, np.full(len(values), ROOT), places, run_words=1)


def _areas(
    heap: Heap, chosen: "np.ndarray[tuple[int], np.dtype[np.bool_]]", at: U64
) -> Iterator[Piece]:
    areas = heap.areas
    pfns, of, address = areas.frame_pfns[chosen], areas.frame_area[chosen], at[chosen]
    if not len(of):
        return
    nodes = int(heap.group_first[heap.first_area_group]) + of
    done = 0
    for part, words in heap.memory.frame_chunks(pfns):
        end = done + len(part)
        yield Piece("vmalloc", words.ravel(), _FRAME_WORDS, nodes[done:end], address[done:end])
        done = end


def _pages(heap: Heap, direct: np.uint64) -> Iterator[Piece]:
    pfns = np.flatnonzero(heap.pages.kind == PageKind.PAGES)
    group = heap.frame_group[pfns]
    # Pages that belong to no block that is known count as roots: better to miss a leak.
    nodes = np.where(group >= 0, heap.group_first[group].astype(np.int64), ROOT)
    done = 0
    for part, words in heap.memory.frame_chunks(pfns):
        end = done + len(part)
        sources = nodes[done:end]
        yield Piece("pages", words.ravel(), _FRAME_WORDS, sources, _addresses(part, direct))
        done = end


# They hold pointers themselves: to page tables' locks, buffers, or what is kept for each object.
def _struct_pages(heap: Heap) -> Piece:
    kind, memmap = heap.pages.kind, heap.pages.memmap
    nodes = np.full(len(kind), ROOT, np.int64)
    group = heap.frame_group
    own = (kind == PageKind.PAGES) & (group >= 0)
    nodes[own] = heap.group_first[group[own]]
    unused = (kind == PageKind.NO_RAM) | (kind == PageKind.FREE) | (kind == PageKind.VMALLOC)
    nodes[unused] = NONE
    start = np.array([heap.pages.vmemmap], np.uint64)
    return Piece("struct page", memmap.ravel(), memmap.shape[1], nodes, start, memmap.size)


def _slabs(heap: Heap, direct: np.uint64) -> Iterator[Piece]:
    slabs = heap.slabs
    ends = np.cumsum(slabs.frames)
    within = np.arange(slabs.frames.sum()) - np.repeat(ends - slabs.frames, slabs.frames)
    pfns = np.repeat(slabs.pfns, slabs.frames) + within
    for part, words in heap.memory.frame_chunks(pfns):
        sources = np.full(len(part), IN_SLABS, np.int64)
        address = _addresses(part, direct)
        yield Piece("slab", words.ravel(), _FRAME_WORDS, sources, address, pfns=part)


def _addresses(pfns: I64, direct: np.uint64) -> U64:
    addresses: U64 = pfns.astype(np.uint64) * np.uint64(PAGE_BYTES) + direct
    return addresses


def _area_addresses(heap: Heap) -> U64:
    areas = heap.areas
    counts = np.bincount(areas.frame_area, minlength=len(areas.start))
    first = np.cumsum(counts) - counts
    index = (np.arange(len(areas.frame_area)) - first[areas.frame_area]).astype(np.uint64)
    addresses: U64 = areas.start[areas.frame_area] + index * np.uint64(PAGE_BYTES)
    return addresses
