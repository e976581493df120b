"""Blocks of the heap as drgn objects, for one more look at what was reported."""

from collections.abc import Callable
from typing import Any

import drgn
from drgn.helpers.linux.percpu import per_cpu_ptr

from kgdbx.errors import CommandError, Unsupported
from kgdbx.leaks.blocks import Block, BlockKind, Heap
from kgdbx.leaks.describe import typed_object
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.scan import scan_heap
from kgdbx.leaks.slab import ALLOCATED
from kgdbx.session import Session

__all__ = ("leak_functions",)

_WORD = 8


def leak_functions(session: Session, *, standing: bool = False) -> dict[str, Callable[..., Any]]:
    """What Python on a kernel has for its heap: ``leak(ADDRESS)`` and ``leaks()``.

    :param standing: the kernel does not run on between calls: its heap is read once
    """
    known: list[Heap] = []

    def heap_now() -> Heap:
        heap = known[0] if known else read_heap(session.kernel, _ram(session))
        known[:] = [heap] if standing else []
        return heap

    def leak(address: int, type: str | drgn.Type = "", cpu: int = 0) -> drgn.Object:  # noqa: A002
        """The block at an address, as a pointer: ``leak(0xffff8eac41155b80)``.

        :param address: in the block; of per-CPU memory what ``alloc_percpu()`` gave
        :param type: such as ``"struct dentry"``; without it the one that goes by the name of the
            block's cache, and if there is none, an array of words
        :param cpu: whose copy of per-CPU memory
        :raises CommandError: if nothing is allocated there
        """
        heap = heap_now()
        return _pointer(heap, _block_at(heap, int(address)), type, cpu)

    def leaks() -> list[drgn.Object]:
        """All blocks that nothing points to, as the kernel stands now, as pointers."""
        registers = [session.target.read_registers(cpu) for cpu in session.target.cpus()]
        own = session.resident.engine.taken
        scan = scan_heap(session.kernel, _ram(session), registers, own)
        return [_pointer(scan.heap, block, "", 0) for block in scan.leaks]

    return {"leak": leak, "leaks": leaks}


def _ram(session: Session) -> Any:
    if session.ram is None:
        raise Unsupported("the heap is read from the RAM of a VM of ours, or from a core file")
    return session.ram


def _block_at(heap: Heap, address: int) -> Block:
    node = heap.node_of(address)
    if node is None:
        node = heap.percpu_node_of(address)
    if node is None or not heap.node_flags[node] & ALLOCATED:
        what = "what is there is free" if node is not None else "it is in no block of the heap"
        raise CommandError(f"nothing is allocated at {address:#x}: {what}")
    return heap.block(node)


def _pointer(heap: Heap, block: Block, wanted: str | drgn.Type, cpu: int) -> drgn.Object:
    program = heap.kernel.program
    guess = typed_object(heap, block)
    if wanted:
        type_ = program.type(wanted) if isinstance(wanted, str) else wanted
    elif guess is not None:
        type_ = guess.type_
    else:
        type_ = program.array_type(program.type("unsigned long"), block.size_bytes // _WORD)
    found = drgn.Object(program, program.pointer_type(type_), block.address)
    if block.kind is BlockKind.PERCPU:
        found = per_cpu_ptr(found, cpu)
    return found
