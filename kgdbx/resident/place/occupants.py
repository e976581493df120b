"""Who is inside of a piece of code, or will come back to it: vCPUs and the stacks of all tasks.

Stacks are not unwound: every word that looks like an address in the code counts.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import drgn
import numpy as np
import numpy.typing as npt

from kgdbx.arch.registers import Registers
from kgdbx.errors import SymbolError
from kgdbx.resident.place.task_walk import TaskWalk
from kgdbx.symbols.kernel import Kernel

__all__ = ("Occupant", "busy_addresses", "tasks_inside")

_KERNEL_HALF = 1 << 63
_USER_MODE = 3  # CPL, in the low bits of cs
_WORD_BYTES = 8

_Words = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class Occupant:
    """Somebody inside of a range of code.

    :ivar who: a vCPU or a task, for messages
    :ivar address: the guest-virtual address in the range
    :ivar text: all of it for a message, such as ``task 12 (kworker/0:1) returns to func+0x3``
    """

    who: str
    address: int
    text: str


def tasks_inside(
    kernel: Kernel, ranges: Sequence[tuple[int, int]], *, include_start: bool = False
) -> list[str]:
    """Who has an instruction pointer or a return address inside of any range, as messages.

    :param ranges: guest-virtual ``(start, end)`` of code
    :param include_start: an address at the very start counts too, as for code that is to be
        freed; for instructions that become one jump it is fine
    """
    return [each.text for each in busy_addresses(kernel, ranges, include_start=include_start)]


def busy_addresses(
    kernel: Kernel, ranges: Sequence[tuple[int, int]], *, include_start: bool = False
) -> list[Occupant]:
    """Who has an instruction pointer or a return address inside of any range.

    Some may be no longer there: old words on a stack look like return addresses. They go away
    when the kernel runs on.

    :param kernel: a stopped kernel
    :param ranges: guest-virtual ``(start, end)`` of code
    :param include_start: an address at the very start counts too
    """
    if not ranges:
        return []
    inside = _Ranges(ranges, include_start)
    target = kernel.target
    registers = {cpu: target.read_registers(cpu) for cpu in target.cpus()}
    found = []
    for cpu, regs in registers.items():
        if inside.find(np.array([regs.rip], dtype=np.uint64)):
            who = f"CPU {cpu}"
            found.append(Occupant(who, regs.rip, f"{who} is at {_short(kernel, regs.rip)}"))
    for who, words in _Stacks(kernel, registers).live():
        for address in dict.fromkeys(inside.find(words)):
            found.append(Occupant(who, address, f"{who} returns to {_short(kernel, address)}"))
    return found


class _Ranges:
    """Sorted ranges that many words are looked up in at once."""

    def __init__(self, ranges: Sequence[tuple[int, int]], include_start: bool) -> None:
        table = np.array(sorted(ranges), dtype=np.uint64)
        self._starts = table[:, 0] if include_start else table[:, 0] + np.uint64(1)
        # Ranges may overlap: an address is inside of one if it is below the highest end so far.
        self._ends: _Words = np.maximum.accumulate(table[:, 1])

    def find(self, words: _Words) -> list[int]:
        words = words[(words >= self._starts[0]) & (words < self._ends[-1])]
        at = np.searchsorted(self._starts, words, side="right") - 1
        found: list[int] = words[words < self._ends[at]].tolist()
        return found


class _Stacks:
    """The parts of all kernel stacks that are in use."""

    def __init__(self, kernel: Kernel, registers: dict[int, Registers]) -> None:
        self._kernel = kernel
        self._memory = kernel.memory
        self._stack_bytes = _stack_bytes(kernel)
        self._walk = TaskWalk(kernel)
        # Tasks on vCPUs have no saved stack pointer. In user mode, and before the kernel's stack
        # is loaded on the way in, nothing is on theirs.
        self._current: set[int] = set()
        self._empty: set[int] = set()
        self._pointers: set[int] = set()
        self._cpu_stacks: list[tuple[str, int, int]] = []
        for cpu, regs in registers.items():
            task = kernel.current.address(regs)
            self._current.add(task)
            if regs.cs & _USER_MODE or regs.rsp < _KERNEL_HALF:
                self._empty.add(task)
            else:
                self._pointers.add(regs.rsp)
                self._add_interrupt_stack(cpu, regs)

    def live(self) -> Iterator[tuple[str, _Words]]:
        """Who a stack belongs to, and its words in use."""
        placed: set[int] = set()
        for task in self._walk.tasks():
            top = task.stack + self._stack_bytes
            used = [sp for sp in self._pointers if task.stack <= sp < top]
            placed.update(used)
            if used:
                start = min(used)
            elif task.address in self._empty:
                continue
            else:
                # A vCPU on the stack of an exception may have come from anywhere on its task's.
                start = task.stack if task.address in self._current else task.sp
            if task.stack <= start < top:
                yield f"task {task.pid} ({task.comm})", self._words(start, top)
        interrupts = self._cpu_stacks
        placed.update(sp for sp in self._pointers for _, low, top in interrupts if low <= sp < top)
        for who, start, top in interrupts:
            if self._pointers - placed:
                yield who, self._words(start, top)
            else:
                used = [sp for sp in self._pointers if start <= sp < top]
                if used:
                    yield who, self._words(min(used), top)
        if self._pointers - placed:
            yield from self._exception_stacks()

    def _add_interrupt_stack(self, cpu: int, regs: Registers) -> None:
        kernel = self._kernel
        place = _percpu_member(kernel, "hardirq_stack_ptr")
        base = regs.gs_base if regs.gs_base >= _KERNEL_HALF else regs.k_gs_base
        if place is None:
            return
        last_word = self._memory.read_u64((base + place) % (1 << 64))
        top = last_word + _WORD_BYTES
        start = top - drgn.sizeof(kernel.program.type("struct irq_stack"))
        self._cpu_stacks.append((f"an interrupt on CPU {cpu}", start, top))
        if start <= regs.rsp < top:
            # call_on_stack() in arch/x86/include/asm/irq_stack.h leaves the stack pointer of
            # the interrupted task in the first word.
            self._pointers.add(self._memory.read_u64(last_word))

    def _exception_stacks(self) -> Iterator[tuple[str, _Words]]:
        # Of NMIs, machine checks, debug exceptions and double faults. They are mapped elsewhere
        # once more; these are the same pages.
        kernel = self._kernel
        offset = kernel.object_address("exception_stacks")
        if offset is None:
            return
        size = drgn.sizeof(kernel.program.type("struct exception_stacks"))
        for cpu, base in enumerate(self._walk.percpu_bases()):
            start = (base + offset) % (1 << 64)
            yield f"an exception on CPU {cpu}", self._words(start, start + size)

    def _words(self, start: int, end: int) -> _Words:
        start &= -_WORD_BYTES
        data = self._memory.read(start, end - start)
        return np.frombuffer(data, dtype="<u8")


def _stack_bytes(kernel: Kernel) -> int:
    # THREAD_SIZE is a macro. The linker script has kept as much room for the first task's stack.
    for name in ("stack", "task"):
        end = kernel.object_address(f"__end_init_{name}")
        start = kernel.object_address(f"__start_init_{name}")
        if start is not None and end is not None:
            return end - start
    raise SymbolError("vmlinux does not say how large a kernel stack is: no __end_init_stack")


def _percpu_member(kernel: Kernel, name: str) -> int | None:
    # Linux kernel commit e57ef2ed97c1 ("x86: Put hot per CPU variables into a struct") (in v6.2)
    # moved some per-CPU variables into pcpu_hot.
    address = kernel.object_address(name)
    hot = kernel.object_address("pcpu_hot")
    if address is None and hot is not None:
        return hot + int(drgn.offsetof(kernel.program.type("struct pcpu_hot"), name))
    return address


def _short(kernel: Kernel, address: int) -> str:
    function = kernel.function_at(address)
    if function is None:
        return f"{address:#x}"
    return f"{function.qualified_name}+{address - function.address:#x}"
