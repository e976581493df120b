"""What a stop of KGDB means, and one instruction of the CPU that stopped."""

import contextlib
from collections.abc import Callable

from kgdbx.arch.accesses import memory_accesses
from kgdbx.arch.instruction import MAX_INSTRUCTION_BYTES
from kgdbx.arch.registers import Registers
from kgdbx.errors import MemoryFault, TargetTimeout
from kgdbx.target.base import BreakpointKind, Stop, StopReason
from kgdbx.target.kgdb_breakpoints import KgdbBreakpoints
from kgdbx.target.kgdb_cpus import KgdbCpus
from kgdbx.target.kgdb_memory import KgdbMemory

__all__ = ("KgdbStepper", "reason_of_stop", "watch_in_the_way")

_INT3 = b"\xcc"
_SIGTRAP = 5
_IF, _TF = 1 << 9, 1 << 8
# Instructions that show or change the flags, behind prefixes: pushf, popf, iret, cli, sti.
_FLAG_CODES = frozenset(b"\x9c\x9d\xcf\xfa\xfb")
_PREFIXES = b"\x66\x48"
_STEPS = 64


def reason_of_stop(
    signal: int, cpus: KgdbCpus, memory: KgdbMemory, breakpoints: KgdbBreakpoints, *, stepped: bool
) -> tuple[StopReason, int | None]:
    """Why the kernel stopped, which KGDB does not tell, if not at a software breakpoint.

    :param signal: of the stop reply
    :param stepped: a step was asked for
    :return: the reason, and the address that a watchpoint watches
    """
    if signal != _SIGTRAP:
        return StopReason.SIGNAL, None
    watched = breakpoints.watched
    if watched is not None and cpus.has_hit(watched):
        return StopReason.WATCHPOINT, watched
    if breakpoints.is_at(BreakpointKind.HARDWARE, cpus.rip) or stepped:
        return StopReason.TRAP, None
    with contextlib.suppress(MemoryFault):
        if memory.read(cpus.rip - 1, 1) == _INT3:
            return StopReason.INTERRUPT, None  # kgdb_breakpoint()'s own
    return StopReason.TRAP, None


def watch_in_the_way(
    cpus: KgdbCpus, memory: KgdbMemory, breakpoints: KgdbBreakpoints
) -> tuple[BreakpointKind, int, int] | None:
    """The watchpoint that the next instruction of the CPU that stopped will hit, if any.

    It has to be taken out for a step: QEMU's processors without KVM take two exceptions then, one
    within the other and on the same stack, which is the end of the kernel.
    """
    if breakpoints.watch is None:
        return None
    kind, address, size_bytes = breakpoints.watch
    registers = cpus.registers(cpus.stopped)
    code = memory.read(registers.rip, MAX_INSTRUCTION_BYTES)
    for access in memory_accesses(code, registers):
        counts = access.writes or kind is BreakpointKind.WATCH_ACCESS
        if counts and access.overlaps(address, size_bytes):
            return breakpoints.watch
    return None


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
        state, cpus = self._cpus.state, self._cpus.numbers
        command, held = b"s", False
        for _ in range(_STEPS):
            if state is not None and command == b"s":
                held = state.hold_others(cpu, cpus)
            stop = self._go(command)
            if state is not None and held:
                state.release_others(cpus)
            if stop.cpu == cpu:
                return stop
            # Another CPU came in meanwhile; it will reach its breakpoint again, and the one that
            # is stepped ends its step when it is let.
            command = b"c"
        raise TargetTimeout(f"CPU {cpu} does not come to the end of its step")

    def _mask_interrupts(self, cpu: int, registers: Registers) -> bool:
        # A handler of an interrupt would run whole within the step, with the other CPUs held.
        code = self._memory.read(registers.rip, 4).lstrip(_PREFIXES)
        if not registers.eflags & _IF or code[0] in _FLAG_CODES:
            return False
        self._cpus.write_through(cpu, "eflags", registers.eflags & ~_IF)
        return True
