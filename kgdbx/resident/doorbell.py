"""Stops for Python handlers without a breakpoint: the probed function itself rings for the host.

A breakpoint makes QEMU drop all the code that it has translated, at every stop. A watchpoint does
not, so a jump at the function's entry to code that writes a watched word stops the guest many
times faster. Which of the two stopped it makes no difference to a handler.
"""

from collections.abc import Iterator

from kgdbx.arch.registers import GENERAL_REGISTERS, Registers
from kgdbx.errors import ProbeError
from kgdbx.resident.bells import BELL_WATCH_BYTES, Bell
from kgdbx.resident.engine import Engine
from kgdbx.resident.program import Program
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import BreakpointKind, Stop, StopReason

__all__ = ("Doorbell",)

# It is only ever written. But gdb compares values for a watchpoint that sees writes alone.
_WATCH = BreakpointKind.WATCH_ACCESS


class Doorbell:
    """Takes the place of breakpoints at functions' entries.

    :param engine: puts code into the guest
    :ivar gave_up: whether a vCPU was not answered in time since this was cleared
    """

    def __init__(self, kernel: Kernel, engine: Engine) -> None:
        self._kernel = kernel
        self._engine = engine
        self._programs: dict[int, Program] = {}  # by the address that the user probes
        self._places: dict[int, int] = {}  # that address by the one of the jump, for ever
        self._missed: dict[int, int] = {}  # hits by the address that the user probes, so far
        self._watched: int | None = None
        self.gave_up = False

    @property
    def is_ready(self) -> bool:
        """Whether the guest has code of ours already."""
        return self._engine.is_open

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being placed, and the guest makes no calls for us."""
        return self._engine.is_idle

    def insert(self, address: int, *, only_looks: bool) -> int:
        """Have a function ring; in a batch of the engine's, at its end.

        The vCPU that rang does the displaced instructions in our code. Where a handler has it
        leave, or the kernel stand, it would skip them, so they are a NOP, as ftrace leaves it.

        :param address: of its entry
        :param only_looks: handlers only look: any instructions may give way
        :return: the address that it goes on at
        :raises ProbeError: if its code cannot be patched, or the guest has no memory left
        """
        function = self._kernel.function_at(address)
        assert function is not None, "a probe is in a function"
        displacement = self._engine.displacement(function, address)
        if not displacement.is_ftrace_nop:
            if not only_looks:
                raise ProbeError("the function does not begin with the NOP that ftrace patches")
            target = self._kernel.target
            if any(target.read_registers(n).rip == displacement.address for n in target.cpus()):
                raise ProbeError("a vCPU stands where the jump would be")
        if self._engine.is_lifted(displacement):
            raise ProbeError("the guest's own ftrace traces the function")
        program = Program("bell", displacement)
        self._engine.install([program])
        self._programs[address] = program
        self._places[displacement.address] = address
        return displacement.resume

    def remove(self, address: int) -> None:
        """Put the function's code back."""
        program = self._programs.pop(address)
        self._missed.pop(address, None)
        for bell in self._engine.waiting():
            if bell.address == program.displacement.address:
                self._send_back(bell, address)
        self._engine.uninstall([program])

    def place(self, address: int) -> int:
        """Where the jump is that is there for an address: behind an ``endbr64``."""
        return self._programs[address].displacement.address

    def rang(self, stop: Stop) -> bool:
        """Whether a stop is one of ours, and no one else's.

        QEMU may report a vCPU in the stop of another, and then says nothing of a watchpoint.
        """
        if self._watched is None:
            return False
        if stop.reason is StopReason.WATCHPOINT:
            return stop.address == self._watched
        if stop.reason is not StopReason.TRAP:
            return False
        return self._engine.owns(self._kernel.target.read_registers(stop.cpu).rip)

    def hits(self) -> Iterator[tuple[int, int, Registers, int]]:
        """vCPU, probed address, registers and time stamp of each vCPU that waits, in the order
        of the hits. One that was on its way when its probe was taken out is sent back."""
        engine = self._engine
        for n, bell in enumerate(sorted(engine.waiting(), key=lambda bell: bell.tsc)):
            # A handler may have let the guest run: then one may have given up, and rung again.
            if n and not self.waits(bell.cpu, bell.tsc):
                continue
            self.gave_up = self.gave_up or bell.gave_up
            address = self._places[bell.address]
            if address not in self._programs and engine.rings(bell.address):
                engine.answer(bell.cpu)  # being taken out: it would come here again
            elif address not in self._programs:
                self._send_back(bell, address)
            else:
                bell.regs.rip = address
                yield bell.cpu, address, bell.regs, bell.tsc

    def waits(self, cpu: int, tsc: int | None) -> bool:
        """Whether a vCPU still waits with what :meth:`hits` gave."""
        return any((bell.cpu, bell.tsc) == (cpu, tsc) for bell in self._engine.waiting())

    def missed(self, address: int) -> int:
        """How many hits were missed there since it was asked last: nobody answered."""
        if not self._engine.is_open:
            return 0
        program = self._programs[address]
        missed = self._engine.counts(program).nmissed
        before, self._missed[address] = self._missed.get(address, 0), missed
        return missed - before

    def release(self, cpu: int, regs: Registers, resume: int | None, *, stands: bool) -> None:
        """Let a vCPU go on.

        :param regs: what it shall go on with
        :param resume: where it would go on by itself; None if its probe is gone
        :param stands: the kernel is left standing: show the vCPU where the user expects it
        """
        leaves = regs.rip != resume
        if stands:
            # Out of our code altogether, with a whole new set of registers.
            self._engine.free_bell(cpu)
            target = self._kernel.target
            actual = target.read_registers(cpu)
            for name in (*GENERAL_REGISTERS, "eflags"):
                actual[name] = regs[name]
            target.write_registers(cpu, actual)
        elif leaves or regs.changed.keys() - {"rip"}:
            self._engine.answer(cpu, regs, leaves=leaves)
        else:
            self._engine.answer(cpu)

    def is_lifted(self, address: int) -> bool:
        """Whether the guest's own ftrace is where it rings, and there is no jump."""
        return self._engine.is_lifted(self._programs[address].displacement)

    def is_shared(self, address: int) -> bool:
        """Whether there is more than one probe of ours in the guest where it rings."""
        return self._engine.is_shared(self._programs[address].displacement)

    def _send_back(self, bell: Bell, address: int) -> None:
        # To where it came from: there is what was there before, or a breakpoint that it has to hit.
        bell.regs.rip = address
        self._engine.answer(bell.cpu, bell.regs, leaves=True)

    def watch(self) -> None:
        """Have the stub stop the kernel when one rings."""
        watched = self._engine.watched
        if self._watched is None and watched is not None:
            self._kernel.target.insert_breakpoint(_WATCH, watched, BELL_WATCH_BYTES)
            self._watched = watched

    def close(self) -> None:
        """Stop watching. Until then it is watched, with a probe or without: somebody may be on the
        way to it.
        """
        if self._watched is not None:
            self._kernel.target.remove_breakpoint(_WATCH, self._watched, BELL_WATCH_BYTES)
            self._watched = None
