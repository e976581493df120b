"""A damaged heap: what is not known is told, and nothing is made up."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.scan import scan_heap


def test_a_damaged_freelist(guest_of: Callable[..., Any]) -> None:
    guest = guest_of()
    session, ram = guest.session, guest.session.ram
    heap = read_heap(session.kernel, ram)
    number = next(n for n, c in enumerate(heap.slabs.caches) if c.name == "kmalloc-64")
    cache = heap.slabs.caches[number]
    (slab, *_) = np.flatnonzero((heap.slabs.cache == number) & (heap.slabs.freelist != 0)).tolist()
    first_free = int(heap.slabs.freelist[slab])
    place = first_free + cache.free_offset
    assert cache.random is not None
    # A free object that says it is its own successor: encoded as freelist_ptr_encode() does.
    key = cache.random ^ int.from_bytes(place.to_bytes(8, "little"), "big")
    for value, how in ((first_free ^ key, "loops"), (0x1234 ^ key, "leads out of it")):
        ram.write(place - heap.memory.direct_map, value.to_bytes(8, "little"))
        scan = scan_heap(session.kernel, ram, None)
        base = int(heap.slabs.base[slab]) + heap.memory.direct_map
        assert scan.errors == (f"cache kmalloc-64: the freelist of the slab at {base:#x} {how}",)
        frames = int(heap.slabs.frames[slab]) * 4096
        assert not [b for b in scan.leaks if base <= b.address < base + frames]


def test_a_slab_without_a_cache(guest_of: Callable[..., Any]) -> None:
    guest = guest_of()
    session, ram = guest.session, guest.session.ram
    heap = read_heap(session.kernel, ram)
    pfn = int(heap.slabs.pfns[100])
    place = heap.pages.vmemmap + pfn * heap.layout.page.size_bytes + heap.layout.cache.slab_cache
    physical = session.kernel.memory.to_physical(place)
    ram.write(physical, (0xDEAD0000).to_bytes(8, "little"))
    scan = scan_heap(session.kernel, ram, None)
    assert "a slab names 0xdead0000 as its cache, which cannot be read" in scan.errors
    assert "1 slabs are left out" in scan.errors
