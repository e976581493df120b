"""Every slab of every ``kmem_cache``, and which of its objects are allocated (SLUB)."""

import dataclasses

import numpy as np
import numpy.typing as npt

from kgdbx.errors import KgdbxError, MemoryFault, TargetError
from kgdbx.leaks.layout import CacheLayout, Layout
from kgdbx.leaks.memory import I64, PAGE_BYTES, U64, BulkMemory
from kgdbx.leaks.native import load_native, pointer
from kgdbx.leaks.pages import PageKind, PageTable
from kgdbx.symbols.kernel import Kernel

__all__ = ("ALLOCATED", "Cache", "Slabs", "find_cache", "mark_free_objects", "read_slabs")

ALLOCATED = 1
"""Flag of a node that is in use."""

_LARGEST_OBJECT = 1 << 22
_LARGEST_SLAB_FRAMES = 1 << 6
_NAME_BYTES = 64
_FRAMES_AT_ONCE = 4096
_MOST_CPUS = 1 << 13  # the largest NR_CPUS, arch/x86/Kconfig
_LOOPS = 1


@dataclasses.dataclass(frozen=True)
class Cache:
    """A ``kmem_cache``.

    :ivar address: ``struct kmem_cache *``
    :ivar size_bytes: from one object to the next
    :ivar object_bytes: of an object
    :ivar free_offset: where a free object holds the next, in bytes from its start
    :ivar red_left_pad: bytes before the first object
    :ivar random: key of the freelists; None if they are not encoded
    """

    address: int
    name: str
    size_bytes: int
    object_bytes: int
    free_offset: int
    red_left_pad: int
    random: int | None
    cpu_slab: int


@dataclasses.dataclass
class Slabs:
    """All slabs, in ascending order of their frames.

    :ivar pfns: first frame of each
    :ivar frames: how many frames its objects take
    :ivar cache: index of its cache in :attr:`caches`
    :ivar objects: how many slots it has
    :ivar freelist: its freelist
    :ivar base: guest-physical address of its first slot
    :ivar errors: what is damaged
    :ivar doubtful: slabs whose freelist is damaged: which objects are in use is not known
    """

    caches: tuple[Cache, ...]
    pfns: I64
    frames: I64
    cache: I64
    objects: I64
    freelist: U64
    base: I64
    errors: list[str]
    doubtful: npt.NDArray[np.bool_]


def read_slabs(kernel: Kernel, memory: BulkMemory, pages: PageTable, layout: Layout) -> Slabs:
    """Find all slabs in the page frames, and the caches that they belong to.

    A slab that makes no sense is left out and told in ``errors``.

    :raises TargetError: if no slab makes sense
    """
    cache, page = layout.cache, layout.page
    tail = pages.memmap[:, page.compound_head // 8] & np.uint64(1) != 0
    heads = np.flatnonzero((pages.kind == PageKind.SLAB) & ~tail)
    slab = pages.memmap[heads]
    errors: list[str] = []
    addresses, which = np.unique(slab[:, cache.slab_cache // 8], return_inverse=True)
    caches: list[Cache] = []
    number = np.full(len(addresses), -1, np.int64)
    for n, address in enumerate(addresses.tolist()):
        found = _read_cache(kernel, memory, cache, address, errors)
        if found is not None:
            number[n] = len(caches)
            caches.append(found)
    counters = slab[:, cache.objects_word // 8]
    objects = (counters >> np.uint64(cache.objects_shift)) & np.uint64(cache.objects_mask)
    of = number[which]
    size = np.array([c.size_bytes for c in caches] or [1], np.int64)[of]
    frames = -(-objects.astype(np.int64) * size // PAGE_BYTES)
    good = (of >= 0) & (objects > 0) & (frames <= _LARGEST_SLAB_FRAMES)
    good &= heads + frames <= len(pages.kind)
    # Its frames must be its own: the next slab begins behind them.
    following = np.append(heads[1:], len(pages.kind))
    good &= heads + frames <= following
    for pfn in heads[~good & (of >= 0)].tolist()[:3]:
        errors.append(f"the slab at page frame {pfn:#x} is damaged: it has an impossible size")
    if not good.any():
        raise TargetError(
            "no slab was found in this kernel's memory: what describes its page frames is damaged"
        )
    if (more := int((~good).sum())) > 0:
        errors.append(f"{more} slabs are left out")
    return Slabs(
        tuple(caches),
        heads[good],
        frames[good],
        of[good],
        objects[good].astype(np.int64),
        slab[good, cache.freelist // 8],
        heads[good] * PAGE_BYTES,
        errors,
        np.zeros(int(good.sum()), bool),
    )


def find_cache(kernel: Kernel, memory: BulkMemory, slabs: Slabs, symbol: str) -> int | None:
    """The number of the cache that a variable of the kernel points to; None if it has no slabs.

    Its name may be another's, if it was merged with one.

    :param symbol: such as ``vmap_area_cachep``
    """
    address = kernel.object_address(symbol)
    if address is None:
        return None
    wanted = memory.read_u64(address)
    return next((n for n, c in enumerate(slabs.caches) if c.address == wanted), None)


def mark_free_objects(
    kernel: Kernel,
    memory: BulkMemory,
    slabs: Slabs,
    layout: CacheLayout,
    first: npt.NDArray[np.uint32],
    flags: npt.NDArray[np.uint8],
) -> None:
    """Take :data:`ALLOCATED` from all objects on freelists: of slabs and of CPUs.

    :param first: node of the first slot of each slab
    :param flags: of each node
    """
    lists = _all_lists(kernel, memory, slabs, layout)
    encoded = layout.random is not None
    heads = np.array([head for _, head in lists], np.uint64)
    slab = np.array([n for n, _ in lists], np.int64)
    order = np.argsort(slab, kind="stable")
    heads, slab = heads[order], slab[order]
    caches = slabs.caches
    table = np.array([(c.size_bytes, c.free_offset) for c in caches] or [(1, 0)], np.uint32)
    random = np.array([c.random or 0 for c in caches] or [0], np.uint64)
    pad = np.array([c.red_left_pad for c in caches] or [0], np.uint64)
    native = load_native()
    bounds = _chunks(slabs.frames[slab])
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = slab[start:end]
        unique, where = np.unique(part, return_inverse=True)
        counts = slabs.frames[unique]
        begin = np.cumsum(counts) - counts
        pfns = np.repeat(slabs.pfns[unique] - begin, counts) + np.arange(counts.sum())
        words = memory.frames(pfns)
        of = slabs.cache[part]
        # The first object lies behind the red zone on its left, and so do all the others.
        at = begin[where].astype(np.uint64) * np.uint64(PAGE_BYTES // 8) + pad[of] // np.uint64(8)
        address = slabs.base[part].astype(np.uint64) + np.uint64(memory.direct_map) + pad[of]
        head = np.ascontiguousarray(heads[start:end])
        size = np.ascontiguousarray(table[of, 0])
        offset = np.ascontiguousarray(table[of, 1])
        count = slabs.objects[part].astype(np.uint32)
        key, begins = random[of], np.ascontiguousarray(first[part])
        verdict = np.zeros(len(part), np.uint8)
        native.walk_freelists(
            pointer(words),
            len(part),
            *(pointer(a) for a in (at, address, head, size, count, offset, key)),
            int(encoded),
            *(pointer(a) for a in (begins, flags, verdict)),
        )
        for row in np.flatnonzero(verdict).tolist():
            _note_damage(memory, slabs, int(part[row]), int(verdict[row]))


def _note_damage(memory: BulkMemory, slabs: Slabs, number: int, verdict: int) -> None:
    if slabs.doubtful[number]:
        return
    slabs.doubtful[number] = True
    cache = slabs.caches[int(slabs.cache[number])]
    how = "loops" if verdict == _LOOPS else "leads out of it"
    slabs.errors.append(
        f"cache {cache.name}: the freelist of the slab at "
        f"{int(slabs.base[number]) + memory.direct_map:#x} {how}"
    )


def _chunks(frames: I64) -> list[int]:
    # Where to cut a row of slabs so that no part has many frames.
    total = np.cumsum(frames)
    cuts = np.flatnonzero(np.diff(total // _FRAMES_AT_ONCE)) + 1
    return [0, *cuts.tolist(), len(frames)]


def _all_lists(
    kernel: Kernel, memory: BulkMemory, slabs: Slabs, layout: CacheLayout
) -> list[tuple[int, int]]:
    # (slab, head) of each freelist that is not empty.
    some = np.flatnonzero(slabs.freelist)
    lists = list(zip(some.tolist(), slabs.freelist[some].tolist(), strict=True))
    cpus = min(memory.read_u32(kernel.address("nr_cpu_ids")), _MOST_CPUS)
    offsets = memory.read(kernel.address("__per_cpu_offset"), 8 * cpus)
    per_cpu = [int.from_bytes(offsets[8 * n : 8 * n + 8], "little") for n in range(cpus)]
    for number, cache in enumerate(slabs.caches):
        for cpu in range(cpus) if cache.cpu_slab else ():
            try:
                at = (cache.cpu_slab + per_cpu[cpu]) & ((1 << 64) - 1)
                head = memory.read_u64(at + layout.cpu_freelist)
            except MemoryFault:
                slabs.errors.append(f"cache {cache.name}: CPU {cpu}'s slab cannot be read")
                continue
            if not head:
                continue
            found = _slab_of(memory, slabs, head)
            if found is None or int(slabs.cache[found]) != number:
                slabs.errors.append(
                    f"cache {cache.name}: CPU {cpu}'s freelist leads to {head:#x}, no slab of it"
                )
            else:
                lists.append((found, head))
    return lists


def _slab_of(memory: BulkMemory, slabs: Slabs, address: int) -> int | None:
    pfn = (address - memory.direct_map) // PAGE_BYTES
    row = int(np.searchsorted(slabs.pfns, pfn, side="right")) - 1
    inside = row >= 0 and pfn < int(slabs.pfns[row] + slabs.frames[row])
    return row if inside else None


def _read_cache(
    kernel: Kernel, memory: BulkMemory, layout: CacheLayout, address: int, errors: list[str]
) -> Cache | None:
    try:
        data = memory.read(address, layout.size_bytes)
        name = memory.read(_u64(data, layout.name), _NAME_BYTES).partition(b"\0")[0]
    except KgdbxError:
        errors.append(f"a slab names {address:#x} as its cache, which cannot be read")
        return None
    size, object_size = _u32(data, layout.size), _u32(data, layout.object_size)
    if not 0 < object_size <= size <= _LARGEST_OBJECT or size % 8:
        errors.append(f"a slab names {address:#x} as its cache, which is none")
        return None
    return Cache(
        address=address,
        name=name.decode("ascii", "replace"),
        size_bytes=size,
        object_bytes=object_size,
        free_offset=_u32(data, layout.offset),
        red_left_pad=_u32_or_zero(data, layout.red_left_pad),
        random=None if layout.random is None else _u64(data, layout.random),
        cpu_slab=0 if layout.cpu_slab is None else _u64(data, layout.cpu_slab),
    )


def _u64(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def _u32_or_zero(data: bytes, offset: int | None) -> int:
    return 0 if offset is None else _u32(data, offset)
