"""The heap of a real kernel, object for object as drgn's helpers find it one by one."""

from collections.abc import Callable
from typing import Any

import pytest
from drgn.helpers.linux.pid import find_task
from drgn.helpers.linux.slab import find_slab_cache, slab_cache_for_each_allocated_object

from kgdbx.attach import open_ram
from kgdbx.leaks.blocks import BlockKind
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.pages import PageKind


@pytest.mark.parametrize(("kernel", "smp"), [("6.1", 4), ("6.12", 2)])
def test_allocated_objects_are_drgns(guest_of: Callable[..., Any], kernel: str, smp: int) -> None:
    guest = guest_of(kernel, smp)
    with open_ram(guest.vm.info) as ram:
        heap = read_heap(guest.kernel, ram)
    assert heap.errors == []
    for name in ("dentry", "kmalloc-64"):
        cache = find_slab_cache(guest.kernel.program, name)
        theirs = sorted(o.value_() for o in slab_cache_for_each_allocated_object(cache, "void"))
        ours = heap.allocated_objects(cache.name.string_().decode())
        assert sorted(ours.tolist()) == theirs
        assert len(theirs) > 300


def test_blocks_beside_the_slabs(guest_of: Callable[..., Any]) -> None:
    guest = guest_of()
    with open_ram(guest.vm.info) as ram:
        heap = read_heap(guest.kernel, ram)
    program = guest.kernel.program
    task = find_task(program, 1)
    node = heap.node_of(task.stack.value_() + 100)
    assert node is not None
    block = heap.block(node)
    assert (block.kind, block.address, block.size_bytes) == (
        BlockKind.VMALLOC,
        task.stack.value_(),
        16384,
    )
    node = heap.node_of(task.value_() + 100)
    assert node is not None and heap.block(node).address == task.value_()
    # what the kernel itself counts as free
    free = sum(zone.vm_stat[0].counter.value_() for zone in program["node_data"][0].node_zones)
    pcp = int((heap.pages.kind == PageKind.FREE).sum()) - free
    assert 0 <= pcp < 4000  # CPUs keep some for themselves, which no zone counts
