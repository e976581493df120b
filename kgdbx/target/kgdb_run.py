"""Run control of a kernel behind KGDB: steps, runs, break-ins, and what a stop means."""

import contextlib
import dataclasses
import math
import time

from kgdbx.errors import TargetLost, TargetTimeout, Unsupported
from kgdbx.target.base import BreakpointKind, Stop, StopReason
from kgdbx.target.break_in import BreakIn
from kgdbx.target.kgdb_breakpoints import KgdbBreakpoints
from kgdbx.target.kgdb_cpus import KgdbCpus
from kgdbx.target.kgdb_debug_registers import KgdbDebugRegisters
from kgdbx.target.kgdb_memory import KgdbMemory
from kgdbx.target.kgdb_packets import KgdbConnection
from kgdbx.target.kgdb_stops import KgdbStepper, reason_of_stop, watch_in_the_way
from kgdbx.target.run_loop import RunLoop
from kgdbx.target.serial_line import SerialLine

__all__ = ("KgdbRunControl",)

_SOFTWARE = BreakpointKind.SOFTWARE
_BY_EITHER = (StopReason.TRAP, StopReason.WATCHPOINT)  # int3, or a debug exception
_BREAK_IN_S = 5.0
_BREAK_IN_TRIES = 4


class KgdbRunControl(RunLoop):
    """The part of :class:`~kgdbx.target.kgdb.KgdbTarget` that lets the kernel run and stop.

    :param address: ``/dev/ttyS0[,115200]``, path of a Unix socket, or ``host:port``
    :param break_in: stops a kernel that runs; None if there is no way but its own breakpoints
    :param answer_s: seconds that KGDB has for an answer
    """

    def __init__(self, address: str, break_in: BreakIn | None, answer_s: float) -> None:
        self._address = address
        self._break_in_way = break_in
        self._answer_s = answer_s
        self._running = False
        self._closed = False
        self._connection = KgdbConnection(SerialLine(address, answer_s), answer_s)
        self._memory = KgdbMemory(self._connection)
        self._breakpoints = KgdbBreakpoints(self._connection)
        self._cpus = KgdbCpus(self._connection, self._memory)
        self._stepper = KgdbStepper(self._cpus, self._memory, self._go)
        self._debug_registers = KgdbDebugRegisters(self._cpus, self._go)
        self._stop = Stop(0, StopReason.INTERRUPT)
        self._by_debug_exception = False
        self._early: bytes | None = None  # a stop reply that came with an acknowledgment
        self._breaks_under_way = False  # a break-in that a breakpoint has overtaken

    @property
    def name(self) -> str:
        return self._address

    @property
    def can_break_in(self) -> bool:
        """Whether a kernel that runs can be stopped from here."""
        return self._break_in_way is not None

    def step(self, cpu: int) -> Stop:
        self._require_stopped("a step")
        if cpu != self._stop.cpu:
            raise Unsupported(f"KGDB steps the CPU that stopped, {self._stop.cpu}, and no other")
        rip = self.read_registers(cpu).rip
        under = (_SOFTWARE, rip, 1) if self._breakpoints.is_at(_SOFTWARE, rip) else None
        watch = watch_in_the_way(self._cpus, self._memory, self._breakpoints)
        taken = [each for each in (under, watch) if each is not None]
        for each in taken:
            self.remove_breakpoint(*each)
        try:
            self._load_debug_registers()
            stop = self._stepper.step(cpu)
        finally:
            if not self._running:
                for each in taken:
                    self.insert_breakpoint(*each)
        if watch is not None:
            stop = dataclasses.replace(stop, reason=StopReason.WATCHPOINT, address=watch[1])
        self._stop = stop
        return stop

    def resume(self) -> None:
        if not self._running:
            self._load_debug_registers()
            self._start(b"c")

    def interrupt(self) -> Stop:
        if self._running:
            self._ask_for_stop()
        return self._stop

    def request_stop(self) -> None:
        self._connection.wake.set()

    def forget_stop_request(self) -> None:
        self._connection.wake.clear()

    @property
    def _stop_is_requested(self) -> bool:
        return self._connection.wake.is_set

    def _next_stop(self, until: float) -> Stop | None:
        packet, self._early = self._early, None
        if packet is None:
            packet = self._connection.receive_stop(None if until == math.inf else until)
        if packet is None:
            return None
        stop = self._stopped(packet, resumed_by=b"c")
        if stop.reason is StopReason.INTERRUPT and self._breaks_under_way:
            self._breaks_under_way = False  # a break-in that came late: the run goes on
            return None
        return stop

    def _ask_for_stop(self) -> None:
        if self._break_in_way is None:
            raise Unsupported(
                f"the kernel at {self.name} runs, and KGDB does not listen meanwhile; attach with "
                "--sysrq LINE, or stop it there: echo g > /proc/sysrq-trigger"
            )
        # A second break takes back the first (uart_handle_break() in the kernel), so one that is
        # under way is waited for, and only then is another one sent.
        deadline = time.monotonic() + _BREAK_IN_TRIES * self._answer_s
        packet, asked = None, 0
        while packet is None:
            if time.monotonic() >= deadline:
                raise TargetTimeout(f"the kernel at {self.name} does not stop when it is asked to")
            asked += not self._breaks_under_way
            with contextlib.nullcontext() if self._breaks_under_way else self._break_in_way():
                self._breaks_under_way = True
                packet = self._receive_stop(_BREAK_IN_S)
            self._breaks_under_way = packet is not None
        if self._stopped(packet, resumed_by=b"c").reason is StopReason.INTERRUPT:
            self._breaks_under_way = asked > 1  # the others come late

    def _start(self, command: bytes) -> None:
        if self._cpus.moved is not None and self._cpus.moved != self._cpus.rip:
            # The address of where to go on is part of the command (kgdb_arch_handle_exception()).
            payload = b"%b%x" % (command, self._cpus.moved)
        else:
            payload = command
        self._early = self._connection.start(payload)
        self._running = True
        self._cpus.forget()
        self._memory.forget()

    def _load_debug_registers(self) -> None:
        stop = self._stop
        self._debug_registers.load(by_debug_exception=self._by_debug_exception)
        self._stop = stop

    def _go(self, command: bytes) -> Stop:
        self._start(command)
        packet = self._receive_stop(self._answer_s)
        if packet is None:
            raise TargetTimeout(f"the kernel at {self.name} did not stop in {self._answer_s:g} s")
        return self._stopped(packet, resumed_by=command)

    # What is awaited here is no run, which a wake would end.
    def _receive_stop(self, timeout_s: float) -> bytes | None:
        packet, self._early = self._early, None
        if packet is not None:
            return packet
        wake = self._connection.wake
        woken = wake.is_set
        wake.clear()
        try:
            return self._connection.receive_stop(time.monotonic() + timeout_s)
        finally:
            if woken:
                wake.set()

    def _stopped(self, packet: bytes, *, resumed_by: bytes) -> Stop:
        self._running = False
        self._early = None
        signal = int(packet[1:3], 16)
        self._cpus.at_stop(packet)
        rip = self._cpus.rip
        reason, address = StopReason.TRAP, None
        if self._breakpoints.is_at(_SOFTWARE, rip - 1):
            self._cpus.moved = rip - 1  # int3 is reported behind itself
        else:
            stepped = resumed_by == b"s"
            reason, address = reason_of_stop(
                signal, self._cpus, self._memory, self._breakpoints, stepped=stepped
            )
        self._by_debug_exception = reason in _BY_EITHER and self._cpus.moved is None
        self._stop = Stop(self._cpus.stopped, reason, address, signal)
        return self._stop

    def _require_stopped(self, what: str) -> None:
        if self._closed:
            raise TargetLost(f"the line to {self.name} is closed")
        if self._running:
            raise Unsupported(f"{what} needs a stopped kernel; interrupt it first")
