"""The leak scan against leaks that were planted, and against blocks that only look lost."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kgdbx.leaks.scan import Scan, cache_usage
from kgdbx.leaks.slab import ALLOCATED


def allocated(scan: Scan) -> set[int]:
    nodes = np.flatnonzero(scan.heap.node_flags & ALLOCATED)
    return set(scan.heap.addresses(nodes).tolist())


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
