"""The slab caches, as ``slabtop`` shows them."""

from typing import Any

import drgn
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.slab import for_each_slab_cache

from kgdbx.session import Session

__all__ = ("slabs",)

_PAGE_BYTES = 4096


def slabs(session: Session) -> dict[str, Any]:
    """All slab caches, the largest first.

    Objects are counted from the slabs of each node (``struct kmem_cache_node``); those that a vCPU
    holds in its own slabs count as in use.

    :return: ``rows`` of name, object size in bytes, objects, objects in use, slabs and KiB;
        ``errors`` says what could not be read
    """
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    try:
        for cache in for_each_slab_cache(session.kernel.program):
            try:
                rows.append(_row(cache))
            except (drgn.FaultError, LookupError, AttributeError) as e:
                errors.append(f"cache {cache.value_():#x}: {e}")
    except drgn.FaultError as e:
        errors.append(f"the list ends early: {e}")
    return {"rows": sorted(rows, key=lambda row: -int(row["kib"])), "errors": errors}


def _row(cache: drgn.Object) -> dict[str, Any]:
    slabs_, objects, free = 0, 0, 0
    nodes = cache.prog_["nr_node_ids"].value_()
    for number in range(nodes):
        node = cache.node[number]
        if not node:
            continue
        slabs_ += node.nr_slabs.counter.value_()
        objects += node.total_objects.counter.value_()
        free += _free_in_partial(node)
    order = cache.oo.x.value_() >> 16  # OO_SHIFT, mm/slub.c
    return {
        "cache": cache.name.string_().decode("utf-8", "backslashreplace"),
        "bytes": cache.size.value_(),
        "objects": objects,
        "used": objects - free,
        "slabs": slabs_,
        "kib": slabs_ * (_PAGE_BYTES << order) // 1024,
    }


def _free_in_partial(node: drgn.Object) -> int:
    # Linux kernel commit bb192ed9aa71 ("mm/slub: Convert most struct page to struct slab by
    # spatch") (in v5.17) made slabs of what were pages.
    free = 0
    for slab in list_for_each_entry("struct slab", node.partial.address_of_(), "slab_list"):
        free += slab.objects.value_() - slab.inuse.value_()
    return free
