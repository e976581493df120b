"""Debug registers as the CPUs have them, which is not what KGDB has been given.

A CPU that was stopped by a debug exception, or by the NMI of another CPU's stop, takes back at its
end the DR7 of its beginning (``local_db_restore()`` in arch/x86/include/asm/debugreg.h): without a
debug register that was inserted meanwhile, and with one that was removed.
"""

from collections.abc import Callable

from kgdbx.errors import TargetTimeout
from kgdbx.target.base import Stop
from kgdbx.target.kgdb_cpus import KgdbCpus

__all__ = ("KgdbDebugRegisters",)

_IF, _TF = 1 << 9, 1 << 8
_INT3_BYTES = 1


class KgdbDebugRegisters:
    """Has each CPU load what was changed, before it runs on.

    :param go: lets the kernel run by a command until its next stop
    """

    def __init__(self, cpus: KgdbCpus, go: Callable[[bytes], Stop]) -> None:
        self._cpus = cpus
        self._go = go
        self._stale: set[int] = set()  # CPUs that may take an old DR7 back

    def changed(self) -> None:
        """A debug register was inserted or removed, perhaps by a debugger that died."""
        self._stale = set(self._cpus.numbers)

    def load(self, *, by_debug_exception: bool) -> None:
        """Make all CPUs right that can be; others are when they stop. Needs the kernel's state.

        The registers of this stop are to be read again.

        :param by_debug_exception: whether the CPU that stopped did so by one
        :raises TargetTimeout: if a CPU does not come back
        """
        cpus, state = self._cpus, self._cpus.state
        if not self._stale or state is None:
            return
        if by_debug_exception and cpus.stopped in self._stale:
            self._reload()
        state.forget_saved_dr7(cpus.numbers)
        # Those that have hit a debug register of their own will stop by it.
        self._stale.intersection_update(state.waiting(cpus.stopped, cpus.numbers))

    # From where an exception takes its DR7 back, nobody knows. That of a breakpoint takes back
    # nothing, so the CPU is made to go through one: the int3 that KGDB itself stops at, with its
    # interrupts off and the others held.
    def _reload(self) -> None:
        cpus, state, cpu = self._cpus, self._cpus.state, self._cpus.stopped
        assert state is not None
        registers = cpus.registers(cpu)
        flags, rip = registers.eflags & ~_TF, registers.rip
        cpus.write_through(cpu, "eflags", flags & ~_IF)
        state.hold_others(cpu, cpus.numbers)
        cpus.moved = state.symbols.int3
        stop = self._go(b"c")
        state.release_others(cpus.numbers)
        if stop.cpu != cpu or cpus.rip != state.symbols.int3 + _INT3_BYTES:
            raise TargetTimeout(f"CPU {cpu} does not stop when it is made to; detach")
        cpus.write_through(cpu, "eflags", flags)
        cpus.moved = rip
