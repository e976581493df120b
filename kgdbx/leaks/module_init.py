"""Memory of modules' init: nothing of it is used when init is over, but it is freed much later."""

import drgn
import numpy as np

from kgdbx.errors import KgdbxError
from kgdbx.leaks.blocks import Heap
from kgdbx.leaks.memory import I64, U64
from kgdbx.leaks.pages import POISON_2

__all__ = ("dead_init_nodes",)

# Of kernel/module/main.c: who asks for the memory of a module, and what it is inlined into.
_LOADERS = ("module_memory_alloc", "move_module", "layout_and_allocate", "load_module")
_WORD = 8


def dead_init_nodes(heap: Heap) -> I64:
    """Areas with the init code and data of modules whose init is over.

    They wait for a grace period. ``simplify_symbols()`` of kernel/module/main.c has left addresses
    in the symbol table there that are of the loader's copy of the file, which was freed before:
    they would keep whatever has that place now.
    """
    areas = heap.areas
    rows = np.flatnonzero(_made_by_loader(heap))
    try:
        regions = [r[:2] for module in heap.kernel.modules for r in module.regions]
        rows = _outside(heap, rows, regions)
        rows = _outside(heap, rows, _going_regions(heap, rows))
    except (KgdbxError, drgn.FaultError) as e:
        heap.errors.append(f"the list of modules cannot be read: {e}")
        rows = rows[:0]
    nodes: I64 = heap.group_first[heap.first_area_group + rows].astype(np.int64)
    return nodes if len(areas.start) else np.zeros(0, np.int64)


def _made_by_loader(heap: Heap) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    made = np.zeros(len(heap.areas.start), bool)
    for symbol in (s for name in _LOADERS for s in heap.kernel.vmlinux.lookup(name)):
        start = symbol.address + heap.kernel.slide
        made |= (heap.areas.caller >= start) & (heap.areas.caller < start + symbol.size_bytes)
    return made


def _outside(heap: Heap, rows: I64, regions: list[tuple[int, int]]) -> I64:
    inside = np.zeros(len(rows), bool)
    for start, size in regions:
        at = heap.areas.start[rows]
        inside |= (at < start + size) & (at + heap.areas.size[rows] > start)
    return rows[~inside]


# A module that is being taken out, or could not be loaded, is in no list any more, and what it has
# allocated may be freed after that: free_module() of kernel/module/main.c. list_del_rcu() has
# poisoned its link.
def _going_regions(heap: Heap, rows: I64) -> list[tuple[int, int]]:
    link = heap.kernel.program.type("struct module").member("list").offset + _WORD
    found: list[tuple[int, int]] = []
    for row in rows.tolist():
        words: U64 = heap.memory.frames(heap.areas.frame_pfns[heap.areas.frame_area == row]).ravel()
        for word in np.flatnonzero(words == POISON_2).tolist():
            struct = int(heap.areas.start[row]) + word * _WORD - link
            try:
                going = heap.kernel.modules.at(struct)
            except (KgdbxError, drgn.FaultError):
                continue  # it is no link of a module
            found += (region[:2] for region in going.regions)
    return found
