"""The task that runs on a vCPU."""

import dataclasses
from typing import NamedTuple

import drgn

from kgdbx.arch.registers import Registers
from kgdbx.symbols.elf import ElfSymbols
from kgdbx.symbols.memory import KernelMemory

__all__ = ("CurrentTask", "Task")

_KERNEL_HALF = 1 << 63
_COMM_BYTES = 16  # TASK_COMM_LEN, include/linux/sched.h


class Task(NamedTuple):
    """What identifies a task in an event.

    ``address`` is its ``struct task_struct *``; ``pid`` is the thread's own number.
    """

    address: int
    pid: int
    tgid: int
    comm: str


@dataclasses.dataclass(frozen=True)
class _Layout:
    current: int
    pid: int
    tgid: int
    comm: int


class CurrentTask:
    """Finds ``current`` from a vCPU's registers, without an object per hit.

    :param program: for the layout of ``struct task_struct``
    """

    def __init__(self, program: drgn.Program, memory: KernelMemory, vmlinux: ElfSymbols) -> None:
        self._memory = memory
        task = program.type("struct task_struct")
        # Linux kernel commit e57ef2ed97c1 ("x86: Put hot per CPU variables into a struct") (in
        # v6.2) moved current_task into pcpu_hot.
        if vmlinux.lookup("current_task"):
            current = vmlinux.address("current_task")
        else:
            hot = program.type("struct pcpu_hot")
            current = vmlinux.address("pcpu_hot") + _offset(hot, "current_task")
        self._layout = _Layout(
            current, _offset(task, "pid"), _offset(task, "tgid"), _offset(task, "comm")
        )

    def address(self, registers: Registers) -> int:
        """``struct task_struct *`` of the task on a vCPU.

        Between a system call's entry and its ``swapgs`` the user's GS base is still loaded; the
        kernel's is the other one.
        """
        base = registers.gs_base
        if base < _KERNEL_HALF:
            base = registers.k_gs_base
        return self._memory.read_u64((base + self._layout.current) & ((1 << 64) - 1))

    def task(self, registers: Registers) -> Task:
        """Identity of the task on a vCPU."""
        return self.at(self.address(registers))

    def at(self, address: int) -> Task:
        """Identity of a task by its ``struct task_struct *``."""
        layout, memory = self._layout, self._memory
        comm = memory.read(address + layout.comm, _COMM_BYTES).split(b"\0")[0]
        return Task(
            address,
            memory.read_u32(address + layout.pid),
            memory.read_u32(address + layout.tgid),
            comm.decode("utf-8", "replace"),
        )


def _offset(type_: drgn.Type, member: str) -> int:
    return int(type_.member(member).offset)
