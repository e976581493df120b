"""Run control of a kernel behind KGDB: steps, runs, break-ins, and what a stop means."""

import contextlib
import math
import time
from collections.abc import Callable

from kgdbx.errors import TargetLost, TargetTimeout, Unsupported
from kgdbx.target.base import IDLE_S, BreakpointKind, Stop, StopReason, Target
from kgdbx.target.break_in import BreakIn
from kgdbx.target.idle import IdleCalls
from kgdbx.target.kgdb_breakpoints import KgdbBreakpoints
from kgdbx.target.kgdb_cpus import KgdbCpus
from kgdbx.target.kgdb_memory import KgdbMemory
from kgdbx.target.kgdb_packets import KgdbConnection
from kgdbx.target.kgdb_stops import KgdbStepper, reason_of_stop
from kgdbx.target.serial_line import SerialLine

__all__ = ("KgdbRunControl",)

_SOFTWARE = BreakpointKind.SOFTWARE
_BY_EITHER = (StopReason.TRAP, StopReason.WATCHPOINT)  # int3, or a debug exception
_BREAK_IN_S = 2.0
_BREAK_IN_TRIES = 4


class KgdbRunControl(Target):
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
        self._stop = Stop(0, StopReason.INTERRUPT)
        self._disarm = False  # a CPU may still have a debug register that was removed
        self._by_debug_exception = False
        self._early: bytes | None = None  # a stop reply that came with an acknowledgment
        self._breaks_under_way = False  # a break-in that a breakpoint has overtaken

    @property
    def name(self) -> str:
        return self._address

    @property
    def running(self) -> bool:
        return self._running

    @property
    def can_break_in(self) -> bool:
        """Whether a kernel that runs can be stopped from here."""
        return self._break_in_way is not None

    def step(self, cpu: int) -> Stop:
        self._require_stopped("a step")
        if cpu != self._stop.cpu:
            raise Unsupported(f"KGDB steps the CPU that stopped, {self._stop.cpu}, and no other")
        rip = self.read_registers(cpu).rip
        under = self._breakpoints.is_at(_SOFTWARE, rip)
        if under:
            self.remove_breakpoint(_SOFTWARE, rip)
        try:
            return self._stepper.step(cpu)
        finally:
            if under and not self._running:
                self.insert_breakpoint(_SOFTWARE, rip)

    def resume(self) -> None:
        if not self._running:
            self._start(b"c")

    def interrupt(self) -> Stop:
        if self._running:
            self._ask_for_stop()
        return self._stop

    def request_stop(self) -> None:
        self._connection.wake.set()

    def forget_stop_request(self) -> None:
        self._connection.wake.clear()

    def run(
        self,
        on_stop: Callable[[Stop], bool] | None = None,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] | None = None,
        idle_s: float = IDLE_S,
    ) -> Stop | None:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        try:
            return self._run(on_stop, deadline, IdleCalls(on_idle, idle_s))
        except TargetLost:
            self._running = False  # what is asked next fails for the same reason
            raise
        except (KeyboardInterrupt, SystemExit):
            self.interrupt()  # so that the way out finds a kernel that stands
            raise

    def _run(
        self, on_stop: Callable[[Stop], bool] | None, deadline: float, idle: IdleCalls
    ) -> Stop | None:
        wake = self._connection.wake
        while True:
            early = self._start(b"c") if not self._running else None
            try:
                idle.call_if_due()
            except BaseException:
                self._break_in(on_stop)
                raise
            until = min(deadline, idle.due)
            packet = early or self._connection.receive_stop(None if until == math.inf else until)
            if packet is None:
                if wake.is_set or time.monotonic() >= deadline:
                    wake.clear()
                    self._break_in(on_stop)
                    return None
                continue
            stop = self._stopped(packet, resumed_by=b"c")
            if stop.reason is StopReason.INTERRUPT and self._breaks_under_way:
                self._breaks_under_way = False
                continue
            if on_stop is None or not on_stop(stop):
                return stop

    def _break_in(self, on_stop: Callable[[Stop], bool] | None) -> None:
        # A breakpoint may have been faster than our break-in: it counts as any other.
        stop = self.interrupt()
        if stop.reason is not StopReason.INTERRUPT and on_stop is not None:
            on_stop(stop)

    def _ask_for_stop(self) -> None:
        if self._break_in_way is None:
            raise Unsupported(
                f"the kernel at {self.name} runs, and KGDB does not listen meanwhile; attach with "
                "--sysrq LINE, or stop it there: echo g > /proc/sysrq-trigger"
            )
        # A second break takes back the first (uart_handle_break() in the kernel), so one that is
        # under way is waited for, and only then is another one sent.
        deadline = time.monotonic() + _BREAK_IN_TRIES * self._answer_s
        packet = None
        while packet is None:
            if time.monotonic() >= deadline:
                raise TargetTimeout(f"the kernel at {self.name} does not stop when it is asked to")
            with contextlib.nullcontext() if self._breaks_under_way else self._break_in_way():
                self._breaks_under_way = True
                packet = self._receive_stop(_BREAK_IN_S)
            self._breaks_under_way = packet is not None
        if self._stopped(packet, resumed_by=b"c").reason is StopReason.INTERRUPT:
            self._breaks_under_way = False

    # Let the kernel go; gives its stop reply if that has come already.
    def _start(self, command: bytes) -> bytes | None:
        if self._cpus.moved is not None and self._cpus.moved != self._cpus.rip:
            # The address of where to go on is part of the command (kgdb_arch_handle_exception()).
            payload = b"%b%x" % (command, self._cpus.moved)
        else:
            payload = command
        self._forget_debug_registers()
        early = self._early = self._connection.start(payload)
        self._running = True
        self._cpus.forget()
        self._memory.forget()
        return early

    def _forget_debug_registers(self) -> None:
        # The CPU that stopped by one takes its DR7 back from where nobody sees it: another stop
        # is needed.
        if self._disarm and self._cpus.state is not None:
            self._cpus.state.forget_debug_registers(self._cpus.numbers)
            self._disarm = self._by_debug_exception

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
                rip, signal, self._memory, self._breakpoints, stepped=stepped
            )
        self._by_debug_exception = reason in _BY_EITHER and self._cpus.moved is None
        self._stop = Stop(self._cpus.stopped, reason, address, signal)
        return self._stop

    def _require_stopped(self, what: str) -> None:
        if self._closed:
            raise TargetLost(f"the line to {self.name} is closed")
        if self._running:
            raise Unsupported(f"{what} needs a stopped kernel; interrupt it first")
