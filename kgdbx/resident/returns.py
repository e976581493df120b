"""Calls in progress whose return address names a slot of ours: found, told, and put right."""

import contextlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import drgn

from kgdbx.errors import MemoryFault
from kgdbx.resident.host import HostView
from kgdbx.resident.memory import Window
from kgdbx.resident.program import Program
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.memory import KernelMemory

__all__ = (
    "NEXT_AT",
    "PendingReturn",
    "Returns",
    "SLOT_BYTES",
    "empty_slot",
    "never_returns",
    "pending_returns",
    "stands_at",
    "true_return",
)

_SLOT = struct.Struct("<QQQQQQQQ")  # struct slot, prelude.h, without what it keeps

SLOT_BYTES = _SLOT.size
"""Size of a slot that keeps nothing."""

NEXT_AT = 48
"""Where a return probe's ``struct probe`` names the next."""

_TASK_DEAD = 0x80  # include/linux/sched.h: it is never scheduled again
_WAITED_FOR, _SETTLED = 1, 2  # slot.busy; what is settled is taken for no other call
_RET_ADDR_AT = 8
_TASK_AT = 24


@dataclass(frozen=True)
class PendingReturn:
    """One call.

    :ivar slot: address of its slot
    :ivar ret_addr: where it returns to, unless that names a slot as well
    :ivar place: where its return address lies on the stack
    :ivar task: ``struct task_struct *``; 0 while the slot is being filled or set free
    :ivar stub: what stands there instead
    :ivar pid: the task's at the entry
    """

    slot: int
    ret_addr: int
    place: int
    task: int
    stub: int
    pid: int


def empty_slot(probe: int, stub: int, size_bytes: int) -> bytes:
    """A slot as the guest finds it first."""
    return _SLOT.pack(0, 0, 0, 0, 0, probe, stub, 0).ljust(size_bytes, b"\0")


def pending_returns(data: bytes, address: int, size_bytes: int) -> Iterator[PendingReturn]:
    """The slots in use.

    :param data: all slots of a probe
    :param address: of the first
    """
    for at in range(0, len(data), size_bytes):
        busy, ret_addr, place, task, _, _, stub, pid = _SLOT.unpack_from(data, at)
        if busy == _WAITED_FOR:
            yield PendingReturn(address + at, ret_addr, place, task, stub, pid)


def true_return(kernel: Kernel, address: int, start: int, end: int) -> int:
    """Where a call returns to in truth.

    :param address: what stands on the stack
    :param start: of the window where the stubs are
    """
    while start <= address < end:
        code = kernel.read_code(address, 5)  # push $slot
        slot = int.from_bytes(code[1:], "little", signed=True) & (1 << 64) - 1
        address = kernel.memory.read_u64(slot + _RET_ADDR_AT)
    return address


def never_returns(kernel: Kernel, pending: PendingReturn) -> bool:
    """Whether a call's task is dead. In doubt it lives: a call whose slot is taken away would
    return to nowhere.
    """
    if not pending.task:
        return False  # it is being filled, or set free
    task = kernel.program.type("struct task_struct")
    # Linux kernel commit 2f064a59a11f ("sched: Change task_struct::state") (in v5.14).
    state = "__state" if task.has_member("__state") else "state"
    state_at, on_cpu_at, pid_at = (drgn.offsetof(task, name) for name in (state, "on_cpu", "pid"))
    memory = kernel.memory
    try:
        if memory.read_u32(pending.task + pid_at) == pending.pid:
            if memory.read_u32(pending.task + state_at) != _TASK_DEAD:
                return False
            return not memory.read_u32(pending.task + on_cpu_at)
    except MemoryFault:
        pass  # its task_struct is gone, and may be anything now
    # Another task is there. One that executes a program may have got its leader's number, but
    # then what the slot put on its stack is still there.
    return not stands_at(memory, pending)


class Returns:
    """The calls in progress of a guest's return probes.

    :param programs: the probes that are placed, by their numbers
    """

    def __init__(self, kernel: Kernel, host: HostView, programs: Mapping[int, Program]) -> None:
        self._kernel = kernel
        self._host = host
        self._programs = programs
        self._gone: dict[Program, None] = {}  # taken out: calls of theirs may be in progress

    def pending(self, program: Program) -> list[PendingReturn]:
        """Calls of a probe that are in progress."""
        if not program.maxactive:
            return []
        data = self._host.read(program.slots, program.maxactive * program.slot_bytes)
        return list(pending_returns(data, program.slots, program.slot_bytes))

    def reap(self, program: Program) -> int:
        """Free the slots of calls that will never return; how many there were."""
        dead = [each for each in self.pending(program) if never_returns(self._kernel, each)]
        for pending in dead:
            self._host.write(pending.slot + _TASK_AT, bytes(8))
            self._host.write(pending.slot, bytes(8))
        return len(dead)

    @contextlib.contextmanager
    def true_stacks(self, window: Window) -> Iterator[None]:
        """While the block runs, stacks have the true return addresses. The kernel stands.

        :param window: where the stubs are
        """
        memory = self._kernel.memory
        stubs: dict[int, int] = {}
        for program in self._programs.values():
            for pending in self.pending(program):
                if stands_at(memory, pending):
                    stubs[pending.place] = pending.stub
        try:
            for place, stub in stubs.items():
                true = true_return(self._kernel, stub, window.start, window.end)
                memory.write(place, true.to_bytes(8, "little"))
            yield
        finally:
            for place, stub in stubs.items():
                memory.write(place, stub.to_bytes(8, "little"))

    def withdraw(self, gone: Iterable[Program]) -> None:
        """Have calls return as if probes had never been; also those that were taken out before,
        of which a call may have been on its way to our code.
        """
        self._gone.update(dict.fromkeys(p for p in gone if p.kind == "r"))
        memory = self._kernel.memory
        found = [pending for program in self._gone for pending in self.pending(program)]
        behind = {pending.stub: pending.ret_addr for pending in found}
        passed: set[int] = set()  # stubs that nothing leads to any more

        def without_gone(address: int) -> int:
            while address in behind:
                passed.add(address)
                address = behind[address]
            return address  # the stub of a probe that stays, or where the call returns to

        for pending in found:
            if stands_at(memory, pending):
                true = without_gone(pending.stub)
                memory.write(pending.place, true.to_bytes(8, "little"))
        for program in self._programs.values():
            if program in self._gone:
                continue
            for pending in self.pending(program):
                if pending.ret_addr in behind:
                    true = without_gone(pending.ret_addr)
                    self._host.write(pending.slot + _RET_ADDR_AT, true.to_bytes(8, "little"))
        for pending in found:
            if pending.stub in passed:
                self._host.write(pending.slot, _SETTLED.to_bytes(8, "little"))

    @property
    def stubs_waited_for(self) -> set[int]:
        """What stands on stacks in place of return addresses, for the probes that are placed."""
        return {p.stub for program in self._programs.values() for p in self.pending(program)}

    def forget(self) -> None:
        """The guest has its memory back: no slots are left."""
        self._gone.clear()

    def settle(self) -> bool:
        """:meth:`withdraw` what can be by now; whether nothing is left."""
        self.withdraw(())
        return not self.forget_settled()

    def forget_settled(self) -> set[Program]:
        """Forget the probes that were taken out but for those that calls may come back to.

        Such a call's address may be on no stack: where a function jumps to one that a kretprobe of
        the guest's own is at, that one keeps our address, and its own stands in the place.

        :return: those that stay
        """
        kept = {
            program
            for program in self._gone
            if any(not never_returns(self._kernel, each) for each in self.pending(program))
        }
        self._gone = {program: None for program in self._gone if program in kept}
        return kept


def stands_at(memory: KernelMemory, pending: PendingReturn) -> bool:
    """Whether a call's stub is where its return address lay."""
    try:
        return memory.read_u64(pending.place) == pending.stub
    except MemoryFault:
        return False  # the task has died, and its stack is gone
