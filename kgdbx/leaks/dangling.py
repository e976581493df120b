"""Pointers into a module that is gone: who would call or read what is no longer there."""

import dataclasses
from collections.abc import Sequence

import drgn
import numpy as np

from kgdbx.arch.registers import Registers
from kgdbx.leaks.blocks import Block, BlockKind, Heap
from kgdbx.leaks.describe import member_at, symbol_at, typed_object
from kgdbx.leaks.references import Reference, find_references

__all__ = ("Dangling", "find_dangling", "old_pointers", "ranges_in_use")

# Modules are behind the kernel's image, up to here: arch/x86/include/asm/pgtable_64_types.h
_MODULES_END = 0xFFFFFFFFFF000000
_MOST_OLD = 1 << 20
# Nothing is called by way of these.
_NO_HOLDERS = ("struct page", "register")
# Addresses that the kernel notes while it loads a module and does not use later: the bounds of all
# modules (kernel/module/main.c), and the tables being sorted (arch/x86/kernel/unwind_orc.c).
_NOTES = ("mod_tree", "cur_orc_table", "cur_orc_ip_table")


@dataclasses.dataclass(frozen=True)
class Dangling:
    """A pointer into memory of a module that was unloaded.

    :ivar address: guest-virtual address of the pointer
    :ivar value: where it points to
    :ivar offset: of that in the module's range
    :ivar holder: the block that the pointer is in, or None
    :ivar place: where it is, in words: ``ext4_groupinfo_caches+0x8``, ``kmalloc-256+0x28``,
        ``struct dentry.d_op``
    """

    address: int
    value: int
    offset: int
    holder: Block | None
    place: str


def find_dangling(
    heap: Heap, registers: Sequence[Registers] | None, ranges: Sequence[tuple[int, int]]
) -> tuple[tuple[Dangling, ...], bool]:
    """Find pointers into ranges where a module was, in all memory that is in use.

    :param ranges: ``(start, size_bytes)`` of guest-virtual addresses; those in which something
        else is mapped now are left out
    :return: them, by address, and whether there may be more
    :raises MachineError: if there is no gcc
    """
    used = ranges_in_use(heap, ranges)
    free = [each for each in ranges if each not in used]
    references, truncated = find_references(heap, registers, free)
    records = _module_records(heap)
    found = [
        _dangling(heap, each, free)
        for each in references
        if each.what not in _NO_HOLDERS
        and not _tells_of_area(heap, each)
        and not any(start <= each.address < end for start, end in records)
        # Nobody has stored a pointer in what is read-only: it was made by the linker, for init code
        # of another module that was there before.
        and (each.what not in ("variable", "vmalloc") or heap.memory.is_writable(each.address))
    ]
    kept = [d for d in found if d.holder is not None or d.place.partition("+")[0] not in _NOTES]
    return tuple(sorted(kept, key=lambda d: d.address)), truncated


def old_pointers(heap: Heap, registers: Sequence[Registers] | None) -> frozenset[tuple[int, int]]:
    """Pointers to where no module is now: a module that is put there later has not left them.

    :return: ``(address, value)`` of each, and more that only look like some
    :raises MachineError: if there is no gcc
    """
    areas = heap.areas
    at = heap.kernel.address("_end")
    gaps: list[tuple[int, int]] = []
    for start, size in zip(areas.start.tolist(), areas.size.tolist(), strict=True):
        if at < start < _MODULES_END:
            gaps.append((at, start - at))
        at = max(at, start + size)
    gaps.append((at, _MODULES_END - at))
    found, _ = find_references(heap, registers, gaps, _MOST_OLD)
    return frozenset((each.address, each.value) for each in found)


def ranges_in_use(heap: Heap, ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Those of some ranges that something else is mapped in: a pointer may be to that."""
    # Modules, and programs of BPF, are in areas of their own.
    areas = heap.areas
    ends = areas.start + areas.size
    return tuple(
        (start, size)
        for start, size in ranges
        if bool(np.any((areas.start < start + size) & (ends > start)))
    )


# What the module loader keeps of each loaded module: there are addresses in it of init code that is
# gone, whose place another module may have taken later.
def _module_records(heap: Heap) -> list[tuple[int, int]]:
    program = heap.kernel.program
    size = program.type("struct module").size or 0
    records = []
    for loaded in heap.kernel.modules:
        records.append((loaded.struct_address, loaded.struct_address + size))
        module = drgn.Object(program, "struct module", address=loaded.struct_address)
        for member in ("sect_attrs", "notes_attrs"):
            node = heap.node_of(module.member_(member).value_())
            if node is not None:
                block = heap.block(node)
                records.append((block.address, block.address + block.size_bytes))
    return records


# Free address space and what was mapped there is written down by the vmalloc allocator.
def _tells_of_area(heap: Heap, reference: Reference) -> bool:
    holder = reference.holder
    if holder is None or holder.kind is not BlockKind.SLAB:
        return False
    areas = next((s for s in _area_caches(heap) if s == holder.cache), None)
    return areas is not None and not reference.value % 4096


def _area_caches(heap: Heap) -> set[str]:
    address = heap.kernel.object_address("vmap_area_cachep")
    if address is None:
        return set()
    cache = heap.memory.read_u64(address)
    return {c.name for c in heap.slabs.caches if c.address == cache}


def _dangling(heap: Heap, reference: Reference, ranges: Sequence[tuple[int, int]]) -> Dangling:
    start = next(at for at, size in ranges if at <= reference.value < at + size)
    return Dangling(
        reference.address,
        reference.value,
        reference.value - start,
        reference.holder,
        _place(heap, reference),
    )


def _place(heap: Heap, reference: Reference) -> str:
    holder = reference.holder
    if holder is None:
        return symbol_at(heap, reference.address) or reference.what
    offset = reference.address - holder.address
    if reference.what == "stack":
        return f"stack at {holder.address:#x}+{offset:#x}"
    if holder.kind is BlockKind.VMALLOC and (symbol := symbol_at(heap, reference.address)):
        return symbol
    if holder.kind is BlockKind.PERCPU:
        return "per-CPU memory"
    typed = typed_object(heap, holder)
    if typed is not None and (member := member_at(typed.type_, offset)):
        return f"{typed.type_.type_name()}.{member}"
    return f"{holder.cache}+{offset:#x}"
