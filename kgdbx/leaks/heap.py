"""The whole heap of a kernel: slab objects, pages, vmalloc areas and per-CPU memory, numbered."""

import numpy as np
import numpy.typing as npt

from kgdbx.errors import KgdbxError
from kgdbx.leaks.blocks import NO_SCAN, Heap
from kgdbx.leaks.kmemleak import kmemleak_nodes
from kgdbx.leaks.layout import Layout, read_layout
from kgdbx.leaks.memory import I64, PAGE_BYTES, U8, U64, BulkMemory, PhysicalMemory
from kgdbx.leaks.module_init import dead_init_nodes
from kgdbx.leaks.pages import PageKind, PageTable, find_page_blocks, read_pages
from kgdbx.leaks.percpu import PercpuMemory, read_percpu
from kgdbx.leaks.slab import ALLOCATED, Slabs, find_cache, mark_free_objects, read_slabs
from kgdbx.leaks.vmalloc import Areas, read_areas
from kgdbx.symbols.kernel import Kernel

__all__ = ("read_heap",)

_HOLDS_AREAS, _IS_SLAB = 1, 2  # flags of groups, heap_walk.c
_ONE = np.iinfo(np.uint32).max


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
    heap.node_flags[kmemleak_nodes(heap)] |= NO_SCAN
    heap.node_flags[dead_init_nodes(heap)] |= NO_SCAN
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
    # Objects lie behind the red zone on their left, if the cache has one.
    pads = np.array([c.red_left_pad for c in slabs.caches] or [0], np.int64)[slabs.cache]
    mapped = np.concatenate([slabs.base + pads, page_base])
    address = np.concatenate(
        [
            mapped.astype(np.uint64) + np.uint64(memory.direct_map),
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
    pad = slabs.caches[number].red_left_pad
    found: U64 = at[used].astype(np.uint64) + np.uint64(memory.direct_map + pad)
    return found


def _read_areas(
    kernel: Kernel,
    memory: BulkMemory,
    slabs: Slabs,
    layout: Layout,
    first: npt.NDArray[np.uint32],
    flags: U8,
) -> tuple[Areas, int | None]:
    number = find_cache(kernel, memory, slabs, "vmap_area_cachep")
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
    number = find_cache(kernel, memory, slabs, "mm_cachep")
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
