"""Every page frame and what it is used for, from ``struct page`` (the vmemmap)."""

import dataclasses
import enum
import itertools

import drgn
import numpy as np
import numpy.typing as npt
from drgn.helpers.linux.percpu import per_cpu_ptr

from kgdbx.arch import paging
from kgdbx.errors import KgdbxError, MemoryFault, TargetError
from kgdbx.leaks.layout import PageLayout
from kgdbx.leaks.memory import I64, PAGE_BYTES, U64, BulkMemory
from kgdbx.symbols.kernel import Kernel

__all__ = ("POISON_2", "PageKind", "PageTable", "find_page_blocks", "read_pages")

_LARGEST_ORDER = 10
_COSTLY_ORDER = 3  # PAGE_ALLOC_COSTLY_ORDER, include/linux/mmzone.h
_PCP_TYPES = 3  # MIGRATE_PCPTYPES, include/linux/mmzone.h
_THP_ORDER = 9
_LARGEST_COMPOUND = 18
_NODES = 1024
_MOST_CPUS = 1 << 13  # the largest NR_CPUS, arch/x86/Kconfig
# list_del(): include/linux/poison.h, with CONFIG_ILLEGAL_POINTER_VALUE of x86-64.
_POISON_1 = np.uint64(0xDEAD000000000100)
POISON_2 = np.uint64(0xDEAD000000000122)
"""What ``list_del()`` leaves of a link to the one before."""


class PageKind(enum.IntEnum):
    """What a page frame is used for.

    A page of the page cache, or of a process, holds no kernel pointers; one of ours counts as such.
    What is neither that nor anything else is memory from ``alloc_pages()``.
    """

    NO_RAM = 0
    FREE = 1
    RESERVED = 2
    SLAB = 3
    USER = 4
    TABLE = 5
    PAGES = 6
    MEMMAP = 7
    VMALLOC = 8
    PERCPU = 9
    TEXT = 10


@dataclasses.dataclass
class PageTable:
    """All page frames.

    :ivar memmap: words of each ``struct page``
    :ivar vmemmap: guest-virtual address of the first
    :ivar kind: a :class:`PageKind` for each
    :ivar heads: for :attr:`PageKind.PAGES`: numbers of the first frames of each allocation
    :ivar counts: and how many frames it has
    :ivar errors: what could not be read
    """

    memmap: U64
    vmemmap: int
    kind: npt.NDArray[np.uint8]
    heads: I64
    counts: I64
    errors: list[str]


def read_pages(kernel: Kernel, memory: BulkMemory, layout: PageLayout) -> PageTable:
    """Classify all page frames.

    :raises SymbolError: if the kernel has no vmemmap
    :raises TargetError: if it cannot be where the kernel says
    """
    vmemmap = memory.read_u64(kernel.address("vmemmap_base"))
    if vmemmap % PAGE_BYTES or not paging.is_canonical(vmemmap, memory.levels):
        raise TargetError(f"vmemmap_base is {vmemmap:#x}: the kernel's memory is damaged")
    count = memory.nframes
    words, parts = memory.read_array(vmemmap, count * layout.size_bytes)
    memmap = words.reshape(count, layout.size_bytes // 8)
    kind = np.zeros(count, np.uint8)
    kind[memory.is_ram(np.arange(count))] = PageKind.PAGES
    table = PageTable(memmap, vmemmap, kind, np.zeros(0, np.int64), np.zeros(0, np.int64), [])
    flags = memmap[:, layout.flags // 8]
    types = _half(memmap, layout.page_type)
    head_of = _compound_heads(memmap, layout, vmemmap)
    head_flags, head_types = flags[head_of], types[head_of]
    ram = kind == PageKind.PAGES
    user = memmap[head_of, layout.mapping // 8] != 0
    user |= (head_flags & layout.lru) != 0
    kind[ram & user] = PageKind.USER
    kind[ram & (head_types & layout.table_mask == layout.table_value)] = PageKind.TABLE
    tested = types if layout.slab_by_type else flags
    slab = tested[head_of] & layout.slab_mask == layout.slab_value
    kind[ram & slab] = PageKind.SLAB
    kind[ram & (flags & layout.reserved != 0)] = PageKind.RESERVED
    _mark_buddy(table, layout, types)
    _mark_pcp(kernel, table, layout)
    for start, size in parts:
        kind[start // PAGE_BYTES : -(-(start + size) // PAGE_BYTES)] = PageKind.MEMMAP
    return table


def find_page_blocks(table: PageTable, layout: PageLayout) -> None:
    """Put the frames from ``alloc_pages()`` together to allocations: ``heads`` and ``counts``.

    A compound page says how large it is. Otherwise the first frame is counted, and those that
    follow have no count of their own; or, after ``split_page()``, as ``alloc_pages_exact()`` has
    it, they have one each. What tells a page that was allocated alone from one of these is that
    it was taken from a list of free pages, and ``list_del()`` poisons its links.
    """
    memmap = table.memmap
    pages = table.kind == PageKind.PAGES
    counted = _half(memmap, layout.refcount) != 0
    tail = memmap[:, layout.compound_head // 8] & np.uint64(1) != 0
    word = layout.list // 8
    taken = (memmap[:, word] == _POISON_1) & (memmap[:, word + 1] == POISON_2)
    compound = memmap[:, layout.flags // 8] & np.uint64(layout.head) != 0
    follows = np.concatenate([[False], pages[:-1]])
    starts = np.flatnonzero(pages & ~tail & counted & (taken | compound | ~follows))
    ends = np.append(starts[1:], len(pages))
    broken = np.flatnonzero(~pages)
    limit = np.append(broken, len(pages))[np.searchsorted(broken, starts)]
    counts = np.minimum(ends, limit) - starts
    second = np.minimum(starts + 1, len(memmap) - 1)
    order = (memmap[second, layout.order // 8] >> np.uint64(layout.order_shift)) & np.uint64(0xFF)
    whole = 1 << np.minimum(order, np.uint64(_LARGEST_COMPOUND)).astype(np.int64)
    # A block of the buddy allocator is aligned to its size.
    aligned = starts & -starts
    single = np.minimum(counts, np.where(aligned, aligned, 1))
    counts = np.where(compound[starts], np.minimum(whole, counts), single)
    table.heads, table.counts = _joined(starts, counts.astype(np.int64), compound[starts], counted)


# Frames of one split block may have been at the head of smaller free blocks before, and so look as
# if taken alone: every other of them at most, so one that follows a frame that was not is joined.
def _joined(
    starts: I64,
    counts: I64,
    compound: npt.NDArray[np.bool_],
    counted: npt.NDArray[np.bool_],
) -> tuple[I64, I64]:
    touching = np.concatenate([[False], starts[1:] == (starts + counts)[:-1]]) & ~compound
    gone = np.zeros(len(starts), bool)
    for row in np.flatnonzero(touching).tolist():
        head = row - 1
        while gone[head]:
            head -= 1
        start = int(starts[head])
        aligned = start & -start
        # The frames of a block that was not split have no counts of their own.
        split = counts[head] >= 2 and counted[int(starts[row]) - 1]
        if compound[head] or not split or int(starts[row]) - start >= aligned:
            continue
        counts[head] = min(int(starts[row] + counts[row]) - start, aligned)
        gone[row] = True
    return starts[~gone], counts[~gone]


def _half(memmap: U64, offset: int) -> U64:
    # A 32-bit member.
    word = memmap[:, offset // 8]
    return (word >> np.uint64(8 * (offset % 8))) & np.uint64(0xFFFFFFFF)


def _compound_heads(memmap: U64, layout: PageLayout, vmemmap: int) -> I64:
    own = np.arange(len(memmap))
    word = memmap[:, layout.compound_head // 8]
    head = (word - np.uint64(vmemmap + 1)) // np.uint64(layout.size_bytes)
    tail = (word & np.uint64(1) != 0) & (head < len(memmap))
    return np.where(tail, head.astype(np.int64), own)


def _mark(kind: npt.NDArray[np.uint8], starts: I64, counts: I64, value: PageKind) -> None:
    # Ranges, all at once: +1 where one starts, -1 behind its end.
    change = np.zeros(len(kind) + 1, np.int32)
    np.add.at(change, starts, 1)
    np.add.at(change, np.minimum(starts + counts, len(kind)), -1)
    inside = np.cumsum(change[:-1]) > 0
    kind[inside & (kind != PageKind.NO_RAM)] = value


def _mark_buddy(table: PageTable, layout: PageLayout, types: U64) -> None:
    heads = np.flatnonzero(
        (types & layout.buddy_mask == layout.buddy_value) & (table.kind != PageKind.NO_RAM)
    )
    orders = table.memmap[heads, layout.private // 8]
    wrong = orders > _LARGEST_ORDER
    if wrong.any():
        table.errors.append(f"{int(wrong.sum())} free pages have an order that cannot be")
    counts = 1 << np.where(wrong, np.uint64(0), orders).astype(np.int64)
    _mark(table.kind, heads, counts, PageKind.FREE)


# Free pages that CPUs keep to themselves are in lists, and nothing in their struct page says so.
def _mark_pcp(kernel: Kernel, table: PageTable, layout: PageLayout) -> None:
    program = kernel.program
    starts: list[int] = []
    counts: list[int] = []
    try:
        cpus = min(program["nr_cpu_ids"].value_(), _MOST_CPUS)
        for node in _memory_nodes(program):
            for zone in node.node_zones:
                if not zone.managed_pages.counter:
                    continue
                for cpu in range(cpus):
                    lists = per_cpu_ptr(zone.per_cpu_pageset, cpu).lists
                    for index in range(lists.type_.length):
                        found = _list_pages(table, layout, lists[index])
                        order = index // _PCP_TYPES
                        size = 1 << (order if order <= _COSTLY_ORDER else _THP_ORDER)
                        starts += found
                        counts += [size] * len(found)
    except (LookupError, drgn.FaultError, MemoryFault, KgdbxError) as e:
        table.errors.append(f"the lists of free pages of CPUs cannot be read: {e}")
    if starts:
        _mark(table.kind, np.array(starts), np.array(counts), PageKind.FREE)


def _memory_nodes(program: drgn.Program) -> list[drgn.Object]:
    # Without CONFIG_NUMA there is one, with a name of its own.
    if "node_data" not in program:
        return [program["contig_page_data"]]
    return list(itertools.takewhile(bool, program["node_data"][:_NODES]))


def _list_pages(table: PageTable, layout: PageLayout, head: drgn.Object) -> list[int]:
    end = head.address_
    at = head.next.value_()
    found: list[int] = []
    memmap, size, word = table.memmap, layout.size_bytes, layout.list // 8
    while at != end and len(found) <= len(memmap):
        pfn, rest = divmod(at - table.vmemmap - layout.list, size)
        if rest or not 0 <= pfn < len(memmap):
            table.errors.append(f"a list of free pages leads to {at:#x}, which is no page")
            break
        found.append(pfn)
        at = int(memmap[pfn, word])
    return found
