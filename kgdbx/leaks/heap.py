"""The whole heap of a kernel, as numbered blocks.

Blocks are called nodes here, as in the graph that pointers make of them. They come in rows, called
groups: the slots of a slab, free ones included; and one each for any other block.
"""

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from kgdbx.errors import KgdbxError
from kgdbx.leaks.layout import Layout, read_layout
from kgdbx.leaks.memory import I64, PAGE_BYTES, U8, U64, BulkMemory, PhysicalMemory
from kgdbx.leaks.native import Tables, pointer
from kgdbx.leaks.pages import PageKind, PageTable, find_page_blocks, read_pages
from kgdbx.leaks.percpu import PercpuMemory, read_percpu
from kgdbx.leaks.slab import ALLOCATED, Slabs, mark_free_objects, read_slabs
from kgdbx.leaks.vmalloc import Areas, read_areas
from kgdbx.symbols.kernel import Kernel

__all__ = ("Block", "BlockKind", "Heap", "NO_SCAN", "VM_STRUCT", "read_heap")

NO_SCAN = 2
"""Flag of a node whose content is not followed."""

VM_STRUCT = 4
"""Flag of a node that is the ``struct vm_struct`` of an area."""

_HOLDS_AREAS, _IS_SLAB = 1, 2  # flags of groups, heap_walk.c
_ONE = np.iinfo(np.uint32).max
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

    def allocated_objects(self, cache: str) -> U64:
        """Addresses of the allocated objects of a cache, ascending within a slab."""
        wanted = [n for n, c in enumerate(self.slabs.caches) if c.name == cache]
        return self.addresses(self._allocated_nodes(wanted))

    def objects_of(self, symbol: str) -> U64:
        """Addresses of the allocated objects of the cache that a variable of the kernel names."""
        number = _cache_number(self.kernel, self.memory, self.slabs, symbol)
        return self.addresses(self._allocated_nodes([] if number is None else [number]))

    def members(self, addresses: U64, offset: int) -> U64:
        """Words of many structures, zero where nothing is mapped.

        :param offset: of the word in the structure, a multiple of 8
        """
        physical = self.memory.to_physical(addresses + np.uint64(offset))
        words = self.memory.words(np.maximum(physical, 0).astype(np.uint64))
        return np.where(physical >= 0, words, np.uint64(0))

    def _allocated_nodes(self, caches: list[int]) -> I64:
        groups = np.flatnonzero(np.isin(self.slabs.cache, caches))
        first = self.group_first[groups].astype(np.int64)
        counts = self.group_count[groups].astype(np.int64)
        ends = np.cumsum(counts)
        nodes = np.repeat(first - (ends - counts), counts) + np.arange(counts.sum())
        used: I64 = nodes[self.node_flags[nodes] & ALLOCATED != 0]
        return used

    def node_of(self, address: int) -> int | None:
        """The node that holds an address, allocated or not."""
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


def read_heap(kernel: Kernel, ram: PhysicalMemory) -> Heap:
    """Find every block of a kernel's heap.

    What is damaged or unknown is left out and told in ``errors``.

    :param ram: the kernel's physical memory, at rest or live
    :raises SymbolError: if debug information does not tell the layout
    :raises TargetError: if the kernel has not booted, or is damaged beyond sense
    """
    memory = BulkMemory(kernel, ram)
    layout = read_layout(kernel.program)
    pages = read_pages(kernel, memory, layout.page)
    slabs = read_slabs(kernel, memory, pages, layout)
    slot_count = slabs.objects.astype(np.int64)
    slab_first = (np.cumsum(slot_count) - slot_count).astype(np.uint32)
    slots = int(slot_count.sum())
    flags = np.full(slots, ALLOCATED, np.uint8)
    mark_free_objects(kernel, memory, slabs, layout.cache, slab_first, flags)
    areas, area_cache = _read_areas(kernel, memory, slabs, layout, slab_first, flags)
    percpu = read_percpu(kernel, memory, layout.percpu)
    pages.kind[areas.frame_pfns] = PageKind.VMALLOC
    _mark_tables(kernel, memory, slabs, layout, slab_first, flags, pages)
    find_page_blocks(pages, layout.page)
    heap = _number(
        kernel, memory, layout, pages, slabs, areas, percpu, slab_first, flags, area_cache
    )
    heap.errors += [*pages.errors, *slabs.errors, *areas.errors, *percpu.errors]
    return heap


def _number(
    kernel: Kernel,
    memory: BulkMemory,
    layout: Layout,
    pages: PageTable,
    slabs: Slabs,
    areas: Areas,
    percpu: PercpuMemory,
    slab_first: npt.NDArray[np.uint32],
    slot_flags: U8,
    area_cache: int | None,
) -> Heap:
    nslabs, slots = len(slabs.cache), len(slot_flags)
    singles = len(pages.heads) + len(areas.start) + len(percpu.start)
    sizes = np.array([c.size_bytes for c in slabs.caches] or [0], np.int64)[slabs.cache]
    page_base = pages.heads * PAGE_BYTES
    base = np.concatenate([slabs.base, page_base, np.zeros(singles - len(page_base), np.int64)])
    address = np.concatenate(
        [
            base[: nslabs + len(page_base)].astype(np.uint64) + np.uint64(memory.direct_map),
            areas.start,
            percpu.start,
        ]
    )
    bytes_ = np.concatenate(
        [
            sizes,
            pages.counts * PAGE_BYTES,
            areas.size.astype(np.int64),
            percpu.size.astype(np.int64),
        ]
    )
    group_flags = np.zeros(nslabs + singles, np.uint8)
    group_flags[:nslabs] = _IS_SLAB
    if area_cache is not None:
        group_flags[:nslabs][slabs.cache == area_cache] |= _HOLDS_AREAS
    frame_group = np.full(memory.nframes, -1, np.int32)
    _spread(frame_group, slabs.pfns, slabs.frames, 0)
    _spread(frame_group, pages.heads, pages.counts, nslabs)
    frame_group[areas.frame_pfns] = nslabs + len(pages.heads) + areas.frame_area
    return Heap(
        kernel,
        memory,
        layout,
        pages,
        slabs,
        areas,
        percpu,
        group_first=np.concatenate(
            [slab_first, slots + np.arange(singles, dtype=np.uint32)]
        ).astype(np.uint32),
        group_count=np.concatenate([slabs.objects, np.ones(singles, np.int64)]).astype(np.uint32),
        group_size=np.concatenate([sizes, np.full(singles, _ONE, np.int64)]).astype(np.uint32),
        group_flags=group_flags,
        group_base=base,
        group_address=address,
        group_bytes=bytes_,
        frame_group=frame_group,
        node_flags=np.concatenate(
            [
                slot_flags,
                np.full(len(pages.heads), ALLOCATED, np.uint8),
                # What maps the memory of devices, or of others, is not memory of its own.
                np.where(areas.allocated(), ALLOCATED, 0).astype(np.uint8),
                np.full(len(percpu.start), ALLOCATED, np.uint8),
            ]
        ),
        errors=[],
    )


def _spread(frame_group: npt.NDArray[np.int32], pfns: I64, counts: I64, first: int) -> None:
    ends = np.cumsum(counts)
    within = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    frame_group[np.repeat(pfns, counts) + within] = np.repeat(
        np.arange(first, first + len(pfns)), counts
    )


def _objects(
    memory: BulkMemory, slabs: Slabs, first: npt.NDArray[np.uint32], flags: U8, number: int
) -> U64:
    # Addresses of the allocated objects of a cache.
    groups = np.flatnonzero(slabs.cache == number)
    counts = slabs.objects[groups]
    ends = np.cumsum(counts)
    within = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    used = flags[np.repeat(first[groups].astype(np.int64), counts) + within] & ALLOCATED != 0
    at = np.repeat(slabs.base[groups], counts) + within * slabs.caches[number].size_bytes
    found: U64 = at[used].astype(np.uint64) + np.uint64(memory.direct_map)
    return found


def _cache_number(kernel: Kernel, memory: BulkMemory, slabs: Slabs, symbol: str) -> int | None:
    # The cache that a variable of the kernel points to: its name may be another's, if merged.
    address = kernel.object_address(symbol)
    if address is None:
        return None
    wanted = memory.read_u64(address)
    return next((n for n, c in enumerate(slabs.caches) if c.address == wanted), None)


def _read_areas(
    kernel: Kernel,
    memory: BulkMemory,
    slabs: Slabs,
    layout: Layout,
    first: npt.NDArray[np.uint32],
    flags: U8,
) -> tuple[Areas, int | None]:
    number = _cache_number(kernel, memory, slabs, "vmap_area_cachep")
    candidates = np.zeros(0, np.uint64)
    if number is None:
        slabs.errors.append("the cache of vmalloc areas is not found: these are left out")
    else:
        candidates = _objects(memory, slabs, first, flags, number)
    return read_areas(memory, layout.vm, candidates), number


# Page tables are pages that only a physical address leads to.
def _mark_tables(
    kernel: Kernel,
    memory: BulkMemory,
    slabs: Slabs,
    layout: Layout,
    first: npt.NDArray[np.uint32],
    flags: U8,
    pages: PageTable,
) -> None:
    roots: list[int] = []
    number = _cache_number(kernel, memory, slabs, "mm_cachep")
    if number is not None:
        offset = kernel.program.type("struct mm_struct").member("pgd").offset
        objects = _objects(memory, slabs, first, flags, number)
        physical = memory.to_physical(objects + np.uint64(offset))
        pgds = memory.words(physical[physical >= 0].astype(np.uint64))
        tables = memory.to_physical(pgds[pgds >> np.uint64(47) != 0])
        roots = tables[(tables >= 0) & (tables % PAGE_BYTES == 0)].tolist()
        # With page-table isolation the table for user mode lies behind that for the kernel. It is
        # part of the same allocation, and so has no count of its own.
        word = layout.page.refcount // 8
        shift = 8 * (layout.page.refcount % 8)
        for root in [root for root in roots if root // PAGE_BYTES + 1 < memory.nframes]:
            pfn = root // PAGE_BYTES + 1
            count = (int(pages.memmap[pfn, word]) >> shift) & 0xFFFFFFFF
            if pages.kind[pfn] == PageKind.PAGES and count == 0:
                roots.append(pfn * PAGE_BYTES)
    (top,) = kernel.vmlinux.lookup("init_top_pgt")
    if top.size_bytes > PAGE_BYTES:
        roots.append(memory.image_physical(top.address + kernel.slide) + PAGE_BYTES)
    for name in ("efi_mm", "init_mm"):
        try:
            mm = kernel.program[name]
            roots.append(int(memory.to_physical(np.array([mm.pgd.value_()], np.uint64))[0]))
        except (LookupError, KgdbxError):
            continue  # not every kernel has them
    found = memory.page_table_pages([root for root in roots if root >= 0])
    found = found[pages.kind[found] == PageKind.PAGES]
    pages.kind[found] = PageKind.TABLE
