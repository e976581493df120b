"""Blocks of memory by number, and what a heap is made of.

Blocks are called nodes here, as in the graph that pointers make of them. They come in rows, called
groups: the slots of a slab, free ones included; and one each for any other block.
"""

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kgdbx.leaks.layout import Layout
from kgdbx.leaks.memory import I64, PAGE_BYTES, U8, U64, BulkMemory
from kgdbx.leaks.native import Tables, pointer
from kgdbx.leaks.pages import PageKind, PageTable
from kgdbx.leaks.percpu import PercpuMemory
from kgdbx.leaks.slab import ALLOCATED, Slabs, find_cache
from kgdbx.leaks.vmalloc import Areas
from kgdbx.symbols.kernel import Kernel

__all__ = ("Block", "BlockKind", "Heap", "NO_SCAN", "VM_STRUCT")

NO_SCAN = 2
"""Flag of a node whose content is not followed."""

VM_STRUCT = 4
"""Flag of a node that is the ``struct vm_struct`` of an area."""

_SMALL_PERCPU = 1 << 32


class BlockKind(enum.Enum):
    """Where a block of memory comes from."""

    SLAB = "slab"
    PAGES = "pages"
    VMALLOC = "vmalloc"
    PERCPU = "percpu"


@dataclasses.dataclass(frozen=True)
class Block:
    """One allocated block.

    :ivar node: its number
    :ivar kind: the allocator
    :ivar cache: name of its ``kmem_cache``, or of the kind
    :ivar address: guest-virtual; of per-CPU memory what ``alloc_percpu()`` gave
    :ivar size_bytes: as large as the allocator made it
    """

    node: int
    kind: BlockKind
    cache: str
    address: int
    size_bytes: int


@dataclasses.dataclass
class Heap:
    """All blocks of a kernel at one moment.

    :ivar group_first: first node of each group
    :ivar group_address: guest-virtual address of each
    :ivar group_bytes: size of its nodes
    :ivar group_base: guest-physical address where it has one
    :ivar frame_group: group of each page frame, -1 for none
    :ivar node_flags: :data:`~kgdbx.leaks.slab.ALLOCATED`, :data:`NO_SCAN`, :data:`VM_STRUCT`
    :ivar errors: what could not be read or is damaged; empty if the heap is whole
    """

    kernel: Kernel
    memory: BulkMemory
    layout: Layout
    pages: PageTable
    slabs: Slabs
    areas: Areas
    percpu: PercpuMemory
    group_first: npt.NDArray[np.uint32]
    group_count: npt.NDArray[np.uint32]
    group_size: npt.NDArray[np.uint32]
    group_flags: U8
    group_base: I64
    group_address: U64
    group_bytes: I64
    frame_group: npt.NDArray[np.int32]
    node_flags: U8
    errors: list[str]

    @property
    def nnodes(self) -> int:
        """Number of nodes, free slots included."""
        return len(self.node_flags)

    def groups_of(self, nodes: I64) -> I64:
        """Groups of nodes."""
        return np.searchsorted(self.group_first, nodes, side="right") - 1

    def addresses(self, nodes: I64) -> U64:
        """Guest-virtual addresses of nodes."""
        group = self.groups_of(nodes)
        within = (nodes - self.group_first[group]) * self.group_bytes[group]
        return self.group_address[group] + within.astype(np.uint64)

    def cache_numbers(self, nodes: I64) -> I64:
        """Index in :attr:`cache_names` for each node."""
        group = self.groups_of(nodes)
        nslabs = len(self.slabs.cache)
        numbers = np.empty(len(nodes), np.int64)
        slab = group < nslabs
        numbers[slab] = self.slabs.cache[group[slab]]
        ends = nslabs + np.cumsum([len(self.pages.heads), len(self.areas.start)])
        numbers[~slab] = len(self.slabs.caches) + np.searchsorted(ends, group[~slab], side="right")
        return numbers

    @property
    def cache_names(self) -> tuple[str, ...]:
        """Names of all caches, and of the kinds of blocks that have none."""
        kinds = (BlockKind.PAGES, BlockKind.VMALLOC, BlockKind.PERCPU)
        return (*(c.name for c in self.slabs.caches), *(kind.value for kind in kinds))

    def sizes(self, nodes: I64) -> I64:
        """Sizes of nodes in bytes."""
        sizes: I64 = self.group_bytes[self.groups_of(nodes)]
        return sizes

    def block(self, node: int) -> Block:
        """Describe a node."""
        one = np.array([node])
        number = int(self.cache_numbers(one)[0])
        rest = number - len(self.slabs.caches)
        kinds = (BlockKind.PAGES, BlockKind.VMALLOC, BlockKind.PERCPU)
        return Block(
            node,
            kinds[rest] if rest >= 0 else BlockKind.SLAB,
            self.cache_names[number],
            int(self.addresses(one)[0]),
            int(self.sizes(one)[0]),
        )

    def allocated_nodes(self, caches: list[int]) -> I64:
        """Nodes of the allocated objects of some caches, by the caches' numbers."""
        groups = np.flatnonzero(np.isin(self.slabs.cache, caches))
        first = self.group_first[groups].astype(np.int64)
        counts = self.group_count[groups].astype(np.int64)
        ends = np.cumsum(counts)
        nodes = np.repeat(first - (ends - counts), counts) + np.arange(counts.sum())
        used: I64 = nodes[self.node_flags[nodes] & ALLOCATED != 0]
        return used

    def allocated_objects(self, cache: str) -> U64:
        """Addresses of the allocated objects of a cache, ascending within a slab."""
        wanted = [n for n, c in enumerate(self.slabs.caches) if c.name == cache]
        return self.addresses(self.allocated_nodes(wanted))

    def objects_of(self, symbol: str) -> U64:
        """Addresses of the allocated objects of the cache that a variable of the kernel names."""
        number = find_cache(self.kernel, self.memory, self.slabs, symbol)
        return self.addresses(self.allocated_nodes([] if number is None else [number]))

    def members(self, addresses: U64, offset: int) -> U64:
        """Words of many structures, zero where nothing is mapped.

        :param offset: of the word in the structure, a multiple of 8
        """
        physical = self.memory.to_physical(addresses + np.uint64(offset))
        words = self.memory.words(np.maximum(physical, 0).astype(np.uint64))
        return np.where(physical >= 0, words, np.uint64(0))

    def node_of(self, address: int) -> int | None:
        """The node that holds an address, allocated or not; per-CPU memory aside."""
        direct = address - self.memory.direct_map
        if 0 <= direct < self.memory.end:
            group = int(self.frame_group[direct // PAGE_BYTES])
            if group < 0:
                return None
            index = 0
            if int(self.group_count[group]) > 1:
                index = (direct - int(self.group_base[group])) // int(self.group_size[group])
            return int(self.group_first[group]) + index if index < self.group_count[group] else None
        row = int(np.searchsorted(self.areas.start, np.uint64(address), side="right")) - 1
        if row >= 0 and address < int(self.areas.start[row]) + int(self.areas.size[row]):
            return int(self.group_first[self.first_area_group + row])
        return None

    def leave_out(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Neither read nor report some memory.

        :param ranges: guest-virtual ``(start, size_bytes)`` of pages in the direct map, or of
            per-CPU memory
        """
        for start, size in ranges:
            first = (start - self.memory.direct_map) // PAGE_BYTES
            if 0 <= first < len(self.frame_group):
                frames = slice(first, first + -(-size // PAGE_BYTES))
                self.pages.kind[frames] = PageKind.USER
                groups = np.unique(self.frame_group[frames])
                nodes = self.group_first[groups[groups >= 0]].tolist()
            else:
                node = self.percpu_node_of(start)
                nodes = [] if node is None else [node]
            self.node_flags[nodes] |= NO_SCAN

    def percpu_node_of(self, address: int) -> int | None:
        """The node of per-CPU memory at an address such as ``alloc_percpu()`` gives."""
        percpu = self.percpu
        row = int(np.searchsorted(percpu.start, np.uint64(address), side="right")) - 1
        if row < 0 or address >= int(percpu.start[row]) + int(percpu.size[row]):
            return None
        return int(self.group_first[self.first_percpu_group + row])

    @property
    def first_area_group(self) -> int:
        """Group of the first vmalloc area."""
        return len(self.slabs.cache) + len(self.pages.heads)

    @property
    def first_percpu_group(self) -> int:
        """Group of the first per-CPU allocation."""
        return self.first_area_group + len(self.areas.start)

    def tables(self) -> tuple[Tables, tuple[object, ...]]:
        """What heap_walk.c works on, and the arrays to keep as long as it does."""
        areas, percpu, vm = self.areas, self.percpu, self.layout.vm
        area_end = areas.start + areas.size
        area_node = self.group_first[self.first_area_group : self.first_percpu_group].copy()
        percpu_end = percpu.start + percpu.size
        percpu_node = self.group_first[self.first_percpu_group :].copy()
        kept = (area_end, area_node, percpu_end, percpu_node)
        tables = Tables(
            direct_map=self.memory.direct_map,
            nframes=self.memory.nframes,
            frame_group=pointer(self.frame_group),
            group_base=pointer(self.group_base),
            group_size=pointer(self.group_size),
            group_count=pointer(self.group_count),
            group_first=pointer(self.group_first),
            group_flags=pointer(self.group_flags),
            node_flags=pointer(self.node_flags),
            vmemmap=self.pages.vmemmap,
            page_struct_bytes=self.layout.page.size_bytes,
            nareas=len(areas.start),
            area_start=pointer(areas.start),
            area_end=pointer(area_end),
            area_node=pointer(area_node),
            npercpu=len(percpu.start),
            percpu_exact_below=_SMALL_PERCPU,
            percpu_start=pointer(percpu.start),
            percpu_end=pointer(percpu_end),
            percpu_node=pointer(percpu_node),
            va_start=vm.va_start,
            va_end=vm.va_end,
            vm=vm.vm,
        )
        return tables, kept
