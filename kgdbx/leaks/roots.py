"""What keeps memory alive without being a block of the heap: variables, stacks, registers."""

from collections.abc import Sequence

import numpy as np

from kgdbx.arch.registers import Registers
from kgdbx.leaks.blocks import Heap
from kgdbx.leaks.memory import I64, PAGE_BYTES, U64
from kgdbx.leaks.pages import PageKind

__all__ = (
    "NONE",
    "ROOT",
    "percpu_sources",
    "root_frames",
    "stack_nodes",
    "stack_sources",
)

ROOT, NONE = -1, -2
"""Sources that are no node: memory that is always in use, and memory that nobody uses."""

_KERNEL_HALF = 1 << 63
_WORD = 8
_WORD_MAX = (1 << 64) - 1
_INT_MASK = 0xFFFFFFFF
_VM_STACK_BYTES = 32  # struct vm_stack, kernel/fork.c
_USER_MODE = 3  # CPL, in the low bits of cs
# Of kernel/fork.c: alloc_thread_stack_node(), and what it is inlined into.
_MAKERS = ("alloc_thread_stack_node", "dup_task_struct", "copy_process", "kernel_clone")
# Static per-CPU stacks of arch/x86/include/asm/processor.h and cpu_entry_area.h: what is below the
# stack pointer in them was left by interrupts that are over.
_CPU_STACKS = ("irq_stack_backing_store", "exception_stacks")


def root_frames(heap: Heap) -> I64:
    """Page frames that are roots as a whole: the kernel's image, and what was reserved at boot.

    The kernel's text, its struct pages and the units of per-CPU memory are not among them.
    """
    kind = heap.pages.kind == PageKind.RESERVED
    memory, kernel = heap.memory, heap.kernel
    start = memory.image_physical(kernel.address("_stext")) // PAGE_BYTES
    kind[start : memory.image_physical(kernel.address("_etext")) // PAGE_BYTES] = False
    for address in heap.percpu.bases[:1].ravel().tolist():
        pages = np.uint64(address) + np.arange(
            0, heap.percpu.unit_bytes, PAGE_BYTES, dtype=np.uint64
        )
        physical = memory.to_physical(pages)
        kind[physical[physical >= 0] // PAGE_BYTES] = False
    return np.flatnonzero(kind)


def percpu_sources(heap: Heap, registers: Sequence[Registers] | None) -> tuple[U64, I64, U64]:
    """All units of per-CPU memory: their words, the source of each word, and its address."""
    percpu, memory = heap.percpu, heap.memory
    words: list[U64] = []
    sources: list[I64] = []
    addresses: list[U64] = []
    length = percpu.unit_bytes // _WORD
    base_node = int(heap.group_first[heap.first_percpu_group]) if len(percpu.start) else 0
    for chunk in range(len(percpu.bases)):
        source = np.full(length, NONE, np.int64)
        source[: int(percpu.fixed[chunk]) // _WORD] = ROOT
        for n in np.flatnonzero(percpu.of_chunk == chunk).tolist():
            at = int(percpu.offset[n])
            source[-(-at // _WORD) : (at + int(percpu.size[n])) // _WORD] = base_node + n
        for base in percpu.bases[chunk].tolist():
            own = source.copy()
            if chunk == 0:
                _leave_out_stacks(heap, own, base, registers)
            words.append(memory.read_array(base, percpu.unit_bytes)[0])
            sources.append(own)
            addresses.append(np.uint64(base) + np.arange(length, dtype=np.uint64) * np.uint64(8))
    if not words:
        empty = np.zeros(0, np.uint64)
        return empty, np.zeros(0, np.int64), empty
    return np.concatenate(words), np.concatenate(sources), np.concatenate(addresses)


def _leave_out_stacks(
    heap: Heap, source: I64, base: int, registers: Sequence[Registers] | None
) -> None:
    # Only if it is known that no vCPU is on one of them.
    if registers is None:
        return
    for name in _CPU_STACKS:
        for symbol in heap.kernel.vmlinux.lookup(name):
            start, end = symbol.address, symbol.address + symbol.size_bytes
            if not any(_stands_on(heap, r.rsp, base + start, base + end) for r in registers):
                source[start // _WORD : end // _WORD] = NONE


# The stacks are mapped a second time, with guard pages: compare physical addresses.
def _stands_on(heap: Heap, rsp: int, start: int, end: int) -> bool:
    if rsp < _KERNEL_HALF:
        return False
    here, first = heap.memory.to_physical(np.array([rsp, start], np.uint64)).tolist()
    return bool(here < 0 or first <= here < first + end - start)


def stack_nodes(heap: Heap) -> I64:
    """Nodes of all areas that were made to be kernel stacks.

    Those without a task are kept for the next one, which only the ``struct vm_struct`` tells.
    """
    rows = np.array(sorted(_made_to_be_stacks(heap)), np.int64)
    nodes: I64 = heap.group_first[heap.first_area_group + rows].astype(np.int64)
    return nodes


def stack_sources(heap: Heap, registers: Sequence[Registers] | None) -> tuple[I64, I64, set[int]]:
    """All kernel stacks: frames, the source of each of their words, and their vmalloc areas.

    Of a stack only what is in use counts, from the stack pointer on. Stacks that no task owns are
    kept for the next one, or wait for a grace period to end: ``struct vm_stack`` is at their start.

    :param registers: of all vCPUs; None if they are not known
    """
    areas = heap.areas
    begins = _begins(heap, registers)
    stacks = sorted(_made_to_be_stacks(heap) | set(begins))
    chosen = np.isin(areas.frame_area, stacks)
    pfns, of = areas.frame_pfns[chosen], areas.frame_area[chosen]
    counts = np.bincount(of, minlength=len(areas.start))
    index = np.arange(len(of)) - (np.cumsum(counts) - counts)[of]
    address = areas.start[of] + index.astype(np.uint64) * np.uint64(PAGE_BYTES)
    words = address[:, None] + np.arange(0, PAGE_BYTES, _WORD, dtype=np.uint64)
    least = np.array([begins.get(n, _WORD_MAX) for n in range(len(areas.start))], np.uint64)
    node = int(heap.group_first[heap.first_area_group]) + of if len(of) else of
    bottom = words < (areas.start[of] + np.uint64(_VM_STACK_BYTES))[:, None]
    source = np.where((words >= least[of][:, None]) | bottom, node[:, None], NONE)
    return pfns, source.astype(np.int64).ravel(), set(stacks)


# The lowest address in use of each stack, by the number of its area.
def _begins(heap: Heap, registers: Sequence[Registers] | None) -> dict[int, int]:
    program, areas = heap.kernel.program, heap.areas
    task = program.type("struct task_struct")
    sp_offset = task.member("thread").offset + (
        program.type("struct thread_struct").member("sp").offset
    )
    tasks = heap.objects_of("task_struct_cachep")
    on_cpu_offset = task.member("on_cpu").offset
    shift = np.uint64(8 * (on_cpu_offset % _WORD))
    on_cpu = heap.members(tasks, on_cpu_offset // _WORD * _WORD) >> shift & np.uint64(_INT_MASK)
    stacks = heap.members(tasks, task.member("stack").offset)
    pointers = heap.members(tasks, sp_offset)
    running = {heap.kernel.current.address(r): r for r in registers or ()}
    rows = np.searchsorted(areas.start, stacks).tolist()
    begins: dict[int, int] = {}
    for address, row, stack, sp, runs in zip(
        tasks.tolist(), rows, stacks.tolist(), pointers.tolist(), on_cpu.tolist(), strict=True
    ):
        if row >= len(areas.start) or int(areas.start[row]) != stack:
            continue
        end = stack + int(areas.size[row])
        if address in running:
            sp = end if running[address].cs & _USER_MODE else running[address].rsp
        elif runs:
            sp = stack
        begins[row] = sp if stack <= sp <= end else stack
    return begins


# By whose code asked for them: also those that are kept for later.
def _made_to_be_stacks(heap: Heap) -> set[int]:
    inside = np.zeros(len(heap.areas.start), bool)
    kernel = heap.kernel
    for symbol in (s for name in _MAKERS for s in kernel.vmlinux.lookup(name)):
        start = symbol.address + kernel.slide
        inside |= (heap.areas.caller >= start) & (heap.areas.caller < start + symbol.size_bytes)
    return set(np.flatnonzero(inside).tolist())
