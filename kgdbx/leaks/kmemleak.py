"""What kmemleak notes of every block: no block is in use for its sake, and none of it is lost."""

from collections.abc import Sequence

import drgn
import numpy as np

from kgdbx.leaks.blocks import Heap
from kgdbx.leaks.memory import I64, PAGE_BYTES, U64
from kgdbx.symbols.kernel import Kernel

__all__ = ("blank_kmemleak_pool", "kmemleak_nodes", "waiting_behind_kmemleak")

# mm/kmemleak.c makes them with SLAB_NOLEAKTRACE, so that they are never merged with others.
_CACHES = ("kmemleak_object", "kmemleak_scan_area")
_FILE, _POOL, _FREE_LIST = "mm/kmemleak.c", "mem_pool", "mem_pool_free_list"
_RECORD = "struct kmemleak_object"
_WORD = 8
_INT_MASK = 0xFFFFFFFF


def kmemleak_nodes(heap: Heap, caches: Sequence[str] = _CACHES) -> I64:
    """Its records in the heap, by the names of their caches.

    A ``struct kmemleak_object`` holds the address of a block, and code that was called to make it.
    """
    wanted = [n for n, cache in enumerate(heap.slabs.caches) if cache.name in caches]
    return heap.allocated_nodes(wanted)


def waiting_behind_kmemleak(heap: Heap) -> U64:
    """Where records lead to that wait to be freed: RCU's list of callbacks goes through them."""
    try:
        record = heap.kernel.program.type(_RECORD)
    except LookupError:
        return np.zeros(0, np.uint64)
    in_heap = heap.addresses(kmemleak_nodes(heap, _CACHES[:1]))
    records = np.concatenate([in_heap, _used_in_pool(heap, record)])
    # put_object() hands a record to RCU when nobody uses it any more.
    offset = record.member("use_count").offset
    word = heap.members(records, offset // _WORD * _WORD)
    unused = word >> np.uint64(8 * (offset % _WORD)) & np.uint64(_INT_MASK) == 0
    return heap.members(records[unused], record.member("rcu").offset)


def blank_kmemleak_pool(kernel: Kernel, words: U64, addresses: U64) -> None:
    """Clear its records that are not in the heap: the first ones, from before there was one.

    :param words: of page frames that were read, one row each
    :param addresses: guest-virtual addresses of the frames
    """
    start, size_bytes = _pool(kernel)
    if not size_bytes:
        return
    inside = (addresses + np.uint64(PAGE_BYTES) > start) & (addresses < start + size_bytes)
    for row in np.flatnonzero(inside).tolist():
        at = int(addresses[row])
        first = max(start - at, 0) // _WORD
        words[row, first : (start + size_bytes - at) // _WORD] = 0


# What was given back to the pool is in a list there, and has old pointers.
def _used_in_pool(heap: Heap, record: drgn.Type) -> U64:
    start, size_bytes = _pool(heap.kernel)
    step, offset = record.size or 1, record.member("object_list").offset
    records = np.uint64(start) + np.arange(0, size_bytes, step, dtype=np.uint64)
    used = np.ones(len(records), bool)
    if size_bytes:
        following = heap.members(records, offset)
        find = (_FREE_LIST, drgn.FindObjectFlags.VARIABLE, _FILE)
        head = heap.kernel.program.object(*find).address_ or 0
        at = heap.memory.read_u64(head)
        while at != head:
            row, rest = divmod(at - offset - start, step)
            if rest or not 0 <= row < len(records) or not used[row]:
                break  # it changes meanwhile, or is damaged: what is left counts as used
            used[row] = False
            at = int(following[row])
    found: U64 = records[used]
    return found


# (start, size_bytes); nothing in a kernel without kmemleak.
def _pool(kernel: Kernel) -> tuple[int, int]:
    try:
        pool = kernel.program.object(_POOL, drgn.FindObjectFlags.VARIABLE, _FILE)
    except LookupError:
        return 0, 0
    return pool.address_ or 0, drgn.sizeof(pool)
