"""What a stop of KGDB means, and one instruction of the CPU that stopped."""

import contextlib
from collections.abc import Callable

from kgdbx.arch.registers import Registers
from kgdbx.errors import MemoryFault, TargetTimeout
from kgdbx.target.base import BreakpointKind, Stop, StopReason
from kgdbx.target.kgdb_breakpoints import KgdbBreakpoints
from kgdbx.target.kgdb_cpus import KgdbCpus
from kgdbx.target.kgdb_memory import KgdbMemory

__all__ = ("KgdbStepper", "reason_of_stop")

_INT3 = b"\xcc"
_SIGTRAP = 5
_IF, _TF = 1 << 9, 1 << 8
# Instructions that show or change the flags, behind prefixes: pushf, popf, iret, cli, sti.
_FLAG_CODES = frozenset(b"\x9c\x9d\xcf\xfa\xfb")
_PREFIXES = b"\x66\x48"
_STEPS = 64


def reason_of_stop(
    rip: int, signal: int, memory: KgdbMemory, breakpoints: KgdbBreakpoints, *, stepped: bool
) -> tuple[StopReason, int | None]:
    """Why the kernel stopped, which KGDB does not tell, if not at a software breakpoint.

    :param rip: of the CPU that stopped
    :param signal: of the stop reply
    :param stepped: a step was asked for
    :return: the reason, and the address that a watchpoint watches
    """
    if signal != _SIGTRAP:
        return StopReason.SIGNAL, None
    if breakpoints.is_at(BreakpointKind.HARDWARE, rip) or stepped:
        return StopReason.TRAP, None
    with contextlib.suppress(MemoryFault):
        if memory.read(rip - 1, 1) == _INT3:
            return StopReason.INTERRUPT, None  # kgdb_breakpoint()'s own
    if breakpoints.watched is not None:
        return StopReason.WATCHPOINT, breakpoints.watched
    return StopReason.TRAP, None


class KgdbStepper:
    """Steps the CPU that stopped, with its interrupts off and the others held.

    :param go: lets the kernel run by a command, ``s`` or ``c``, until its next stop
    """

    def __init__(self, cpus: KgdbCpus, memory: KgdbMemory, go: Callable[[bytes], Stop]) -> None:
        self._cpus = cpus
        self._memory = memory
        self._go = go

    def step(self, cpu: int) -> Stop:
        """Execute one instruction; no breakpoint lies under it.

        :raises TargetTimeout: if other CPUs stop again and again
        """
        masked = self._mask_interrupts(cpu, self._cpus.registers(cpu))
        stop = self._until_stepped(cpu)
        if masked:
            flags = self._cpus.registers(cpu).eflags
            self._cpus.write_through(cpu, "eflags", flags & ~_TF | _IF)
        return stop

    def _until_stepped(self, cpu: int) -> Stop:
        command = b"s"
        for _ in range(_STEPS):
            if self._cpus.state is not None and command == b"s":
                self._cpus.state.hold_others()
            stop = self._go(command)
            if stop.cpu == cpu:
                return stop
            # Another CPU had reached a breakpoint of its own before; it will reach it again, and
            # the one that is stepped ends its step when it is let.
            command = b"c"
        raise TargetTimeout(f"CPU {cpu} does not come to the end of its step")

    def _mask_interrupts(self, cpu: int, registers: Registers) -> bool:
        # A handler of an interrupt would run whole within the step, with the other CPUs held.
        code = self._memory.read(registers.rip, 4).lstrip(_PREFIXES)
        if not registers.eflags & _IF or code[0] in _FLAG_CODES:
            return False
        self._cpus.write_through(cpu, "eflags", registers.eflags & ~_IF)
        return True
