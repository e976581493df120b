"""Return slots of tasks that died inside a probed function, or will never return from it."""

import time

import drgn

from kgdbx.errors import MemoryFault
from kgdbx.resident.engine import Engine
from kgdbx.resident.program import Program
from kgdbx.resident.returns import PendingReturn
from kgdbx.symbols.kernel import Kernel

__all__ = ("Reaper",)

_TASK_DEAD = 0x80  # include/linux/sched.h: it is never scheduled again
_INTERVAL_S = 0.25
_SHARE = 20  # at most one part in as many of the time is spent


class Reaper:
    """Frees slots when calls are missed for want of them.

    As ``kprobe_flush_task()`` does in the kernel, except that the host has to look for the dead.
    """

    def __init__(self, kernel: Kernel, engine: Engine) -> None:
        self._kernel = kernel
        self._engine = engine
        self._due_s = 0.0
        self._missed: dict[Program, int] = {}
        self._offsets: tuple[int, int, int] | None = None

    def visit(self) -> None:
        """Look after all return probes, unless that was done just now.

        The guest may run where the host sees its RAM; elsewhere nothing is done until it stands.
        """
        started = time.monotonic()
        if started < self._due_s or (self._kernel.target.running and not self._engine.host.live):
            return
        programs = [p for p in self._engine.programs.values() if p.maxactive]
        self._missed = {p: n for p, n in self._missed.items() if p in programs}
        for program in programs:
            missed = self._engine.counts(program).nmissed
            if missed != self._missed.get(program, 0):
                self._missed[program] = missed
                self._engine.returns.reap(program, self._is_dead)
        now = time.monotonic()
        self._due_s = now + max(_INTERVAL_S, _SHARE * (now - started))

    def _is_dead(self, pending: PendingReturn) -> bool:
        # In doubt it lives: a call whose slot is taken away would return to nowhere.
        if not pending.task:
            return False  # it is being filled, or set free
        if self._offsets is None:
            self._offsets = _task_offsets(self._kernel)
        state_at, on_cpu_at, pid_at = self._offsets
        memory = self._kernel.memory
        try:
            if memory.read_u32(pending.task + pid_at) == pending.pid:
                state = memory.read_u32(pending.task + state_at)
                return state == _TASK_DEAD and not memory.read_u32(pending.task + on_cpu_at)
        except MemoryFault:
            pass  # its task_struct is gone, and may be anything now
        # Another task is there. One that executes a program may have got its leader's number, but
        # then what the slot put on its stack is still there.
        try:
            return memory.read_u64(pending.place) != pending.stub
        except MemoryFault:
            return True


def _task_offsets(kernel: Kernel) -> tuple[int, int, int]:
    task = kernel.program.type("struct task_struct")
    # Linux kernel commit 2f064a59a11f ("sched: Change task_struct::state") (in v5.14).
    state = "__state" if task.has_member("__state") else "state"
    at = (drgn.offsetof(task, name) for name in (state, "on_cpu", "pid"))
    return next(at), next(at), next(at)
