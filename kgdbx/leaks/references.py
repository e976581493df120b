"""Who points somewhere: all words of memory in use that lead into some ranges of addresses."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kgdbx.arch.registers import Registers
from kgdbx.leaks.blocks import NO_SCAN, Block, Heap
from kgdbx.leaks.native import load_native, pointer
from kgdbx.leaks.roots import NONE
from kgdbx.leaks.slab import ALLOCATED
from kgdbx.leaks.walk import IN_SLABS, Piece, used_memory

__all__ = ("Reference", "find_references")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A word that points into a range.

    :ivar what: where it is: ``register``, ``variable``, ``percpu``, ``stack``, ``vmalloc``,
        ``pages``, ``struct page`` or ``slab``
    :ivar address: guest-virtual address of the word; of a register its vCPU, times 256, and number
    :ivar value: the word
    :ivar holder: the block that it is in, if it is in one
    """

    what: str
    address: int
    value: int
    holder: Block | None


def find_references(
    heap: Heap,
    registers: Sequence[Registers] | None,
    ranges: Sequence[tuple[int, int]],
    most: int = 1000,
) -> tuple[tuple[Reference, ...], bool]:
    """Find the words in memory in use that point into ranges.

    Free objects and pages are not looked at, nor what is left on unused parts of stacks.

    :param ranges: ``(start, size_bytes)`` of guest-virtual addresses
    :param most: stop at this many
    :return: them, and whether there may be more
    :raises MachineError: if there is no gcc
    """
    native = load_native()
    wanted = sorted((start, start + size) for start, size in ranges if size > 0)
    if not wanted:
        return (), False
    starts = np.array([start for start, _ in wanted], np.uint64)
    ends = np.array([end for _, end in wanted], np.uint64)
    found: list[Reference] = []
    for piece in used_memory(heap, registers):
        hits = np.zeros(max(len(piece.words), 1), np.uint64)
        count = native.find_words(
            pointer(piece.words),
            len(piece.words),
            len(wanted),
            *(pointer(a) for a in (starts, ends, hits)),
            len(hits),
        )
        for word in hits[:count].tolist():
            reference = _reference(heap, piece, word)
            if reference is not None:
                found.append(reference)
            if len(found) >= most:
                return tuple(found), True
    return tuple(found), False


def _reference(heap: Heap, piece: Piece, word: int) -> Reference | None:
    source = piece.source_of(word)
    address = piece.address_of(word)
    if source == NONE:
        return None
    if source == IN_SLABS:
        node = heap.node_of(address)
        if node is None or not heap.node_flags[node] & ALLOCATED:
            return None
        source = node
    if source >= 0 and heap.node_flags[source] & NO_SCAN:
        return None
    holder = heap.block(source) if source >= 0 else None
    return Reference(piece.what, address, int(piece.words[word]), holder)
