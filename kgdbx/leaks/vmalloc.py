"""Areas of ``vmalloc()``: which there are, and the page frames behind them."""

import dataclasses

import numpy as np
import numpy.typing as npt

from kgdbx.leaks.layout import VmLayout
from kgdbx.leaks.memory import I64, PAGE_BYTES, U64, BulkMemory

__all__ = ("Areas", "read_areas")

_VM_ALLOC = 0x2  # include/linux/vmalloc.h
_VM_NO_GUARD = 0x40
_LARGEST = 1 << 40


@dataclasses.dataclass
class Areas:
    """All areas in use, by address.

    :ivar start: guest-virtual
    :ivar size: bytes, without the guard page
    :ivar flags: ``vm_struct.flags``
    :ivar vm: ``struct vm_struct *``
    :ivar pages: its array of ``struct page *``, or 0
    :ivar caller: return address of the one who asked for it
    :ivar frame_area: area of each frame in :attr:`frame_pfns`
    :ivar frame_pfns: page frames behind them, in ascending order within an area
    :ivar errors: what makes no sense
    """

    start: U64
    size: U64
    flags: U64
    vm: U64
    pages: U64
    caller: U64
    frame_area: I64
    frame_pfns: I64
    errors: list[str]

    def allocated(self) -> npt.NDArray[np.bool_]:
        """Which were made by ``vmalloc()``: the others map memory of someone else."""
        made: npt.NDArray[np.bool_] = self.flags & np.uint64(_VM_ALLOC) != 0
        return made


def read_areas(memory: BulkMemory, layout: VmLayout, candidates: U64) -> Areas:
    """Find the areas among objects of the cache of ``struct vmap_area``.

    That cache may be merged with others of its size, so an area counts as one only if its
    ``struct vm_struct`` says the same as it does.

    :param candidates: addresses of allocated objects
    """

    def member(addresses: U64, offset: int) -> U64:
        physical = memory.to_physical(addresses + np.uint64(offset))
        return np.where(
            physical >= 0, memory.words(np.maximum(physical, 0).astype(np.uint64)), np.uint64(0)
        )

    start, vm = member(candidates, layout.va_start), member(candidates, layout.vm)
    end = member(candidates, layout.va_end)
    plausible = (start % PAGE_BYTES == 0) & (end > start) & (end - start < _LARGEST) & (vm != 0)
    plausible &= (vm % np.uint64(8) == 0) & (vm >> np.uint64(47) != 0)
    start, vm, end = start[plausible], vm[plausible], end[plausible]
    size, flags = member(vm, layout.size), member(vm, layout.flags)
    good = (member(vm, layout.addr) == start) & (size > 0) & (size <= end - start)
    good &= (flags & np.uint64(_VM_ALLOC) == 0) | (size <= memory.end + PAGE_BYTES)
    order = np.argsort(start[good], kind="stable")
    start, vm, size, flags = (each[good][order] for each in (start, vm, size, flags))
    pages, caller = member(vm, layout.pages), member(vm, layout.caller)
    # The areas of the per-CPU allocator have no guard page, and no array of their pages.
    guarded = (flags & np.uint64(_VM_NO_GUARD) == 0) & (pages != 0)
    size = np.where(guarded & (size > PAGE_BYTES), size - np.uint64(PAGE_BYTES), size)
    errors: list[str] = []
    if len(start) and (overlap := int((start[1:] < start[:-1] + size[:-1]).sum())):
        errors.append(f"{overlap} vmalloc areas overlap others")
    frame_area, frame_pfns = _frames(memory, start, size, flags)
    # What is freed waits to have its addresses purged: nothing is mapped there any more.
    live = flags & np.uint64(_VM_ALLOC) == 0
    live[frame_area] = True
    frame_area = (np.cumsum(live) - 1)[frame_area]
    start, size, flags, vm, pages, caller = (
        each[live] for each in (start, size, flags, vm, pages, caller)
    )
    return Areas(start, size, flags, vm, pages, caller, frame_area, frame_pfns, errors)


def _frames(memory: BulkMemory, start: U64, size: U64, flags: U64) -> tuple[I64, I64]:
    # Devices and other people's pages are mapped, too: only what vmalloc() made is its own.
    own = np.flatnonzero(flags & np.uint64(_VM_ALLOC) != 0)
    counts = (size[own] // PAGE_BYTES).astype(np.int64)
    area = np.repeat(own, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    address = start[area] + within.astype(np.uint64) * np.uint64(PAGE_BYTES)
    physical = memory.to_physical(address)
    mapped = physical >= 0
    pfns = physical[mapped] // PAGE_BYTES
    area = area[mapped]
    inside = memory.is_ram(pfns)
    return area[inside], pfns[inside]
