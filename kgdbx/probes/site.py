"""One breakpoint in the guest: who is attached to it, and the instruction that it displaces."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from kgdbx.arch.emulate import Emulator, emulator_for
from kgdbx.arch.exceptions import gate_handlers
from kgdbx.arch.instruction import MAX_INSTRUCTION_BYTES, instruction_length
from kgdbx.arch.registers import Registers
from kgdbx.errors import MemoryFault, TargetTimeout
from kgdbx.probes.probe import Hit, Point, Probe
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import BreakpointKind, Stop, StopReason

__all__ = ("Attachment", "Doorbell", "Site")

_IDT_BYTES = 32 * 16
_ENDBR_BYTES = 4
_PATCHED_BYTES = 5
_FTRACE_NOP = bytes.fromhex("0f1f440000")  # BYTES_NOP5, arch/x86/include/asm/nops.h
_JUMP = b"\xe9"
_STEP_S = 30.0  # a repeated string instruction is one step an iteration


class Attachment(Protocol):
    """What a probe does at one of its addresses."""

    probe: Probe
    point: Point

    def before(self, hit: Hit) -> bool:
        """Runs before the instruction; True if it set the registers up itself and the
        instruction must not be executed."""

    def after(self, hit: Hit) -> None:
        """Runs after the instruction."""

    def fault(self, hit: Hit, trap: int) -> bool:
        """Runs when the instruction takes an exception; True if that is dealt with."""


class Doorbell(Protocol):
    """Stops at functions' entries by other means than a breakpoint, with the same effect.

    :ivar gave_up: whether a vCPU was not answered in time since this was cleared
    """

    gave_up: bool

    @property
    def is_ready(self) -> bool:
        """Whether there is code in the guest already, so that more of it costs little."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being put into the guest just now."""

    def insert(self, address: int, *, only_looks: bool) -> int:
        """Have the function at an address stop the kernel; where it goes on afterwards.

        :param only_looks: no register is changed there, and nothing runs behind the instruction
        :raises ProbeError: if that cannot be done there
        """

    def watch(self) -> None:
        """Look out for what was inserted. It is in the guest now."""

    def remove(self, address: int) -> None:
        """Put the function's code back."""

    def place(self, address: int) -> int:
        """Where the jump is that is there for an address."""

    def is_lifted(self, address: int) -> bool:
        """Whether what was inserted is not in the guest for now."""

    def is_shared(self, address: int) -> bool:
        """Whether code that is in the guest for others sees the hit after it."""

    def rang(self, stop: Stop) -> bool:
        """Whether a stop is one of these."""

    def hits(self) -> Iterator[tuple[int, int, Registers, int]]:
        """vCPU, probed address, registers and time stamp of each vCPU that waits, in the order
        of the hits."""

    def waits(self, cpu: int, tsc: int | None) -> bool:
        """Whether a vCPU still waits with what :meth:`hits` gave."""

    def missed(self, address: int) -> int:
        """How many hits were missed there since it was asked last: nobody answered."""

    def release(self, cpu: int, regs: Registers, resume: int | None, *, stands: bool) -> None:
        """Let a vCPU go on with its registers when the kernel runs."""


class Site:
    """A breakpoint with its attachments, in the order of their registration.

    :param address: guest-virtual address of an instruction
    :param kind: SOFTWARE or HARDWARE
    """

    def __init__(self, kernel: Kernel, address: int, kind: BreakpointKind) -> None:
        self.address = address
        self.kind = kind
        self.attachments: list[Attachment] = []
        self.watches_returns = False
        self.inserted = False
        self.hits = 0
        self.left_standing: set[int] = set()  # stack pointers, after hits that stop
        self.unpromoted = ""  # why there is no doorbell
        self.resume: int | None = None  # where the code goes on behind a doorbell
        self.only_looks = False  # the doorbell's code does the displaced instructions itself
        self.boosted = 0
        self.stepped = 0
        self._kernel = kernel
        self._code = b""
        self._emulator: Emulator | None = None
        self._doorbell: Doorbell | None = None

    def insert(self) -> None:
        """Put the breakpoint into the guest."""
        if not self.inserted:
            self._kernel.target.insert_breakpoint(self.kind, self.address)
            self.inserted = True

    @property
    def can_ring(self) -> bool:
        """Whether a doorbell may take the breakpoint's place: one that is not there for the
        returns of a call, at the first instruction of a function.
        """
        return (
            self.kind is BreakpointKind.SOFTWARE
            and not self.watches_returns
            and bool(self.attachments)
            and all(attachment.point.is_entry for attachment in self.attachments)
        )

    @property
    def is_ours(self) -> bool:
        """Whether only probes of kgdbx's own are attached. They change no registers."""
        return all(attachment.probe.is_internal for attachment in self.attachments)

    def promote(self, doorbell: Doorbell, resume: int, *, only_looks: bool) -> None:
        """Let a doorbell that is in the guest now take the breakpoint's place.

        :param resume: what its ``insert`` gave
        """
        if not self.inserted:
            doorbell.remove(self.address)  # a handler that ran meanwhile has taken the probe out
            return
        self.resume = resume
        self.only_looks = only_looks
        self._doorbell = doorbell
        self._kernel.target.remove_breakpoint(self.kind, self.address)

    @property
    def is_shared(self) -> bool:
        """Whether there is a doorbell, and code of others behind it that is to see the hit."""
        return self._doorbell is not None and self._doorbell.is_shared(self.address)

    @property
    def jumps_from(self) -> int | None:
        """Where the doorbell's jump is; None without one."""
        return self._doorbell.place(self.address) if self._doorbell is not None else None

    def demote(self) -> None:
        """Put the breakpoint back where the doorbell is."""
        if self._doorbell is not None:
            self._kernel.target.insert_breakpoint(self.kind, self.address)
            self._take_off(self._doorbell)

    def _take_off(self, doorbell: Doorbell) -> None:
        self.note_missed()
        # The guest may run on meanwhile.
        self._doorbell = self.resume = None
        self.only_looks = False
        doorbell.remove(self.address)

    def note_missed(self) -> None:
        """Have the probes count the hits that nobody answered."""
        if self._doorbell is not None:
            missed = self._doorbell.missed(self.address)
            for attachment in self.attachments:
                attachment.probe.nmissed += missed

    def remove(self) -> None:
        """Take the breakpoint out of the guest."""
        if self._doorbell is not None:
            self._take_off(self._doorbell)
            self.inserted = False
        elif self.inserted:
            self._kernel.target.remove_breakpoint(self.kind, self.address)
            self.inserted = False

    def execute_displaced(
        self, hit: Hit, on_watchpoint: Callable[[Hit, Stop], None] | None
    ) -> bool:
        """Do what the instruction under the breakpoint does, with the other vCPUs standing.

        :param on_watchpoint: takes data watchpoints that the instruction triggers; None if none
            is armed
        :return: whether it ended; otherwise it took an exception, which goes its own way
        """
        if self.resume is not None:
            hit.regs.rip = self.resume  # there was a NOP, or nobody looks
            self.boosted += 1
            return True
        emulator = self._current_emulator()
        if emulator is not None and not (on_watchpoint and emulator.touches_memory):
            try:
                emulator.run(hit.regs, self._kernel.target)
            except MemoryFault:
                pass  # the processor takes the fault, or can do what the stub cannot
            else:
                self.boosted += 1
                return True
        return self._step(hit, on_watchpoint)

    def pass_patched(self, hit: Hit) -> None:
        """Do the instruction behind an ``endbr64`` too, where ftrace patches functions: a doorbell
        would go there, and who stands before it would be hit a second time.
        """
        address = self.address + _ENDBR_BYTES
        if self.resume is None and len(self._code) == _ENDBR_BYTES and hit.regs.rip == address:
            code = self._kernel.read_code(address, _PATCHED_BYTES)
            if code == _FTRACE_NOP:
                hit.regs.rip += _PATCHED_BYTES
            elif code[:1] == _JUMP:
                distance = int.from_bytes(code[1:], "little", signed=True)
                hit.regs.rip += _PATCHED_BYTES + distance

    def skip_displaced(self, hit: Hit) -> None:
        """Go on behind the instruction without doing it."""
        if self.resume is not None:
            hit.regs.rip = self.resume
            return
        self._current_emulator()
        hit.regs.rip = self.address + len(self._code)

    @property
    def is_boosted(self) -> bool:
        """Whether the displaced instruction is emulated rather than single-stepped."""
        return self.resume is not None or self._current_emulator() is not None

    def _current_emulator(self) -> Emulator | None:
        # The kernel patches its own text while it runs (jump labels, static calls, ftrace), so
        # what lies here now counts, not what lay here when the probe was registered.
        code = self._kernel.read_code(self.address, len(self._code) or MAX_INSTRUCTION_BYTES)
        if code != self._code:
            code = self._kernel.read_code(self.address, MAX_INSTRUCTION_BYTES)
            self._code = code[: instruction_length(code, self.address)]
            self._emulator = emulator_for(self._code, self.address)
        return self._emulator

    @functools.cached_property
    def _exception_handlers(self) -> dict[int, int]:
        base = self._kernel.object_address("idt_table")
        return gate_handlers(self._kernel.memory.read(base, _IDT_BYTES)) if base else {}

    def _step(self, hit: Hit, on_watchpoint: Callable[[Hit, Stop], None] | None) -> bool:
        target = self._kernel.target
        before = hit.regs.copy()
        target.write_registers(hit.cpu, hit.regs)
        deadline = time.monotonic() + _STEP_S
        while True:
            if time.monotonic() > deadline:
                # Half done, it goes on from here: nothing is lost for the guest.
                raise TargetTimeout(
                    f"the instruction at {self.address:#x} has not ended after {_STEP_S:g} s of "
                    "single steps; probe the one behind it"
                )
            stop = target.step(hit.cpu)
            hit.regs = target.read_registers(hit.cpu)
            if on_watchpoint and stop.reason is StopReason.WATCHPOINT:
                on_watchpoint(hit, stop)
            if hit.regs.rip != self.address:
                break  # a repeated string instruction comes back here once an iteration
        self.stepped += 1
        trap = self._exception_handlers.get(hit.regs.rip)
        if trap is None:
            return True
        for attachment in tuple(self.attachments):
            seen = before.copy()
            after, hit.regs = hit.regs, seen
            handled = attachment.probe.active and attachment.fault(hit, trap)
            hit.regs = after
            if handled:
                self._undo_exception(after, seen)
                return True
        return False

    def _undo_exception(self, regs: Registers, wanted: Registers) -> None:
        # The exception was taken on the stack below rsp; with the registers of before, and the
        # handler's changes to them, it never happened.
        regs.restore(wanted)
        if regs.rip == self.address:
            regs.rip = self.address + len(self._code)
