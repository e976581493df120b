"""The leak scan against leaks that were planted, and against blocks that only look lost."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kgdbx.attach import attach_vm, open_ram
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.module_init import dead_init_nodes
from kgdbx.leaks.pages import POISON_2
from kgdbx.leaks.scan import Scan, cache_usage
from kgdbx.leaks.slab import ALLOCATED


def allocated(scan: Scan) -> set[int]:
    nodes = np.flatnonzero(scan.heap.node_flags & ALLOCATED)
    return set(scan.heap.addresses(nodes).tolist())


def scan_with_old_pointers(guest: Any, address: int) -> Scan:
    """Have the memory of modules' init, which is not freed yet, point to an address."""
    with attach_vm(guest.vm.info) as session, open_ram(guest.vm.info) as ram:
        heap = read_heap(session.kernel, ram)
        dead = dead_init_nodes(heap)
        rows = np.flatnonzero(np.isin(heap.areas.start, heap.addresses(dead)))
        assert len(rows) >= 2  # of two modules
        listed = [region[:2] for module in session.kernel.modules for region in module.regions]
        # What goes is in no list any more, and is not dead yet.
        memory = session.kernel.memory
        (module, *_) = session.kernel.modules
        struct = session.kernel.program.type("struct module")
        link = module.struct_address + struct.member("list").offset
        following, before = memory.read(link, 8), memory.read(link + 8, 8)
        memory.write(int.from_bytes(before, "little"), following)
        memory.write(link + 8, int(POISON_2).to_bytes(8, "little"))
        assert module not in tuple(session.kernel.modules)
        same = read_heap(session.kernel, ram)
        assert same.addresses(dead_init_nodes(same)).tolist() == heap.addresses(dead).tolist()
        memory.write(link + 8, before)
        memory.write(int.from_bytes(before, "little"), link.to_bytes(8, "little"))
        for row in rows.tolist():
            start = int(heap.areas.start[row])
            assert not [r for r in listed if r[0] <= start < sum(r)]
            (first, *_) = heap.areas.frame_pfns[heap.areas.frame_area == row].tolist()
            ram.write(first * 4096, address.to_bytes(8, "little"))
    return guest.scan()


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_all_that_was_lost_and_nothing_else(planted_in: Callable[[str], Any], kernel: str) -> None:
    guest = planted_in(kernel)
    before = guest.scan()
    assert before.errors == ()
    assert len(before.leaks) <= 5
    # The first one spins with a pointer in a register and holds up all grace periods.
    guest.load("hidden_references")
    guest.load("planted_leaks")
    scan = guest.scan()
    assert scan.errors == ()
    lost, kept = guest.told("lost"), guest.told("kept")
    assert sorted(lost.values()) == sorted(
        ["kmalloc", "large", "own_cache", "merged_cache", "page", "pages", "vmalloc", "percpu"]
        + ["name", "list", "cycle", "cycle", "kref"]
    )
    assert len(kept) == 4 + 9  # four elements of a mempool
    found = {block.address for block in scan.leaks}
    assert not {kept[a] for a in found & set(kept)}
    assert {lost[a] for a in set(lost) - found} == set()
    # Old pointers on stacks may hide at one time what was there before, and not at another.
    assert found - set(lost) <= allocated(before)
    sizes = {lost[b.address]: (b.cache, b.size_bytes) for b in scan.leaks if b.address in lost}
    assert sizes["own_cache"] == ("planted_own", 128)
    assert sizes["pages"] == ("pages", 4 * 4096)
    assert sizes["vmalloc"] == ("vmalloc", 3 * 4096)
    assert sizes["percpu"] == ("percpu", 72)
    again = scan_with_old_pointers(guest, next(a for a, kind in lost.items() if kind == "vmalloc"))
    assert {lost[a] for a in set(lost) - {block.address for block in again.leaks}} == set()
    usage = {each.cache: each.objects for each in cache_usage(scan.heap)}
    earlier = {each.cache: each.objects for each in cache_usage(before.heap)}
    assert "planted_own" not in earlier
    assert usage["planted_own"] == 1


def test_fragments_are_one_block_with_those_they_share_it_with(
    planted_in: Callable[[str], Any],
) -> None:
    guest = planted_in("6.12")
    guest.load("lost_fragments")
    scan = guest.scan()
    lost, kept = guest.told("lost"), guest.told("kept")
    assert sorted(lost.values()) == ["block", "head", "packet"]
    assert sorted(kept.values()) == ["block_of_cpu", "shared_block"]
    found = {block.address: block for block in scan.leaks}
    assert set(lost) <= set(found)
    assert not set(kept) & set(found)
    (block,) = [found[address] for address, kind in lost.items() if kind == "block"]
    assert (block.cache, block.size_bytes) == ("pages", 8 * 4096)
