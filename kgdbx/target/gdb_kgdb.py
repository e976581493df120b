"""A kernel behind KGDB over gdb's own connection; runs inside gdb's Python.

To gdb the threads of KGDB are tasks, and which CPU stopped, it does not know. Software breakpoints
are gdb's, as over QEMU's stub. Debug registers are ours: KGDB tells nobody which of them was hit,
and gdb would take such a stop for a stray SIGTRAP.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import gdb

from kgdbx.arch.registers import Registers
from kgdbx.errors import TargetTimeout, Unsupported
from kgdbx.target.base import BreakpointKind, Stop, StopReason
from kgdbx.target.gdb_breakpoints import GdbBreakpoint, user_breakpoints
from kgdbx.target.gdb_inferior import GdbInferior
from kgdbx.target.gdb_kgdb_packets import GdbKgdbPackets
from kgdbx.target.gdb_settings import GdbSettings
from kgdbx.target.kgdb_access import KgdbAccess
from kgdbx.target.kgdb_breakpoints import KgdbBreakpoints
from kgdbx.target.kgdb_cpus import KgdbCpus
from kgdbx.target.kgdb_debug_registers import KgdbDebugRegisters
from kgdbx.target.kgdb_memory import KgdbMemory
from kgdbx.target.kgdb_state import KgdbSymbols
from kgdbx.target.kgdb_stops import KgdbStepper, reason_of_stop, watch_in_the_way
from kgdbx.target.kgdb_threads import cpu_of_shadow

__all__ = ("GdbKgdbTarget", "is_kgdb")

_SOFTWARE, _HARDWARE = BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE
_SIGTRAP = 5
_ANSWER_S = 20


class GdbKgdbTarget(KgdbAccess, GdbInferior):
    """A target over KGDB inside gdb, which is connected and whose kernel stands.

    Stops that gdb has no breakpoint for are seen by a catchpoint of SIGTRAP, whose condition asks
    this target. The user sees it in ``info breakpoints``.

    :param name: what it was attached by, for messages
    :raises TargetError: if gdb is not connected
    """

    def __init__(self, name: str) -> None:
        self._known = False  # which CPU stopped, and where
        self._by_debug_exception = False
        self._trap: Any = None
        super().__init__(None)
        self._connection.name = name

    def _change_settings(self) -> GdbSettings:
        return GdbSettings({"print thread-events": "off", "remotetimeout": str(_ANSWER_S)})

    def _learn(self) -> None:
        self._packets = GdbKgdbPackets(self._connection.exchange, self._settle)
        self._memory = KgdbMemory(self._packets)
        self._cpus = KgdbCpus(self._packets, self._memory)
        self._hardware = KgdbBreakpoints(self._packets)
        self._stepper = KgdbStepper(self._cpus, self._memory, self._go)
        self._debug_registers = KgdbDebugRegisters(self._cpus, self._go)
        gdb.events.cont.connect(self._on_cont)
        _Trapped(lambda: self._hits.ask(self._trapped))
        self._catch_traps()
        self._packets.select_stopped()
        self._cpus.list()
        self._hits.stop = Stop(self._selected_cpu(), StopReason.INTERRUPT, None, 2)

    def _settle(self) -> None:
        # gdb selects in the stub the thread that its user looks at, to read this.
        if not self.in_hit:
            gdb.execute("maint flush register-cache", to_string=True)
            gdb.newest_frame().pc()

    def use_symbols(self, symbols: KgdbSymbols) -> None:
        super().use_symbols(symbols)
        self._known = False
        self._require_stopped("the kernel's debugger")
        state, behind = self._cpus.state, self._cpus.rip - 1
        if state is not None:
            self._debug_registers.changed()  # by a debugger that died, perhaps
            if self._reason()[0] is not StopReason.INTERRUPT and state.was_breakpoint(behind):
                self._cpus.write_through(self._cpus.stopped, "rip", behind)
                self._general_thread.forget_registers()

    def write_memory(self, address: int, data: bytes, *, cpu: int | None = None) -> None:
        super().write_memory(address, data, cpu=cpu)
        gdb.execute("maint flush dcache", to_string=True)

    def write_registers(self, cpu: int, registers: Registers) -> None:
        self._require_stopped("registers")
        for name, value in registers.changed.items():
            self._cpus.write_through(cpu, name, value)
            if name == "rip" and cpu == self._cpus.stopped:
                self._cpus.rip = value
                self._hits.moved(cpu, value)
        if registers.changed:
            self._general_thread.forget_registers()

    def looked_at(self) -> int:
        """CPU number of the thread that gdb's user has selected; of a task, that stopped last."""
        thread = gdb.selected_thread()
        shadow = None if thread is None else cpu_of_shadow(int(thread.ptid[1]))
        if shadow is not None:
            return shadow
        return self._cpus.stopped if thread is None or self.running else self._selected_cpu()

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        self._require_stopped("a breakpoint")
        self._catch_traps()
        if kind is not _SOFTWARE:
            self._hardware.insert(kind, address, size_bytes)
            if self._cpus.state is not None:
                self._cpus.state.activate(address, self._cpus.numbers)
            self._change_debug_registers()
            return
        key = (kind, address, size_bytes)
        self._breakpoints.check_new(key)
        if not any(user_breakpoints(address)) and not self._breakpoints.is_retired(key):
            # gdb inserts its breakpoints when the kernel goes on: too late to be refused.
            self._hardware.insert(kind, address, size_bytes)
            self._hardware.remove(kind, address, size_bytes)
        super().insert_breakpoint(kind, address, size_bytes)

    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        if kind is _SOFTWARE:
            super().remove_breakpoint(kind, address, size_bytes)
            return
        self._require_stopped("a breakpoint")
        self._hardware.remove(kind, address, size_bytes)
        self._change_debug_registers()

    # Run control

    def step(self, cpu: int) -> Stop:
        self._require_stopped("a step")
        if cpu != self._cpus.stopped:
            raise Unsupported(f"KGDB steps the CPU that stopped, {self._cpus.stopped}, no other")
        place = b"0,%x,1" % self._cpus.registers(cpu).rip
        watch = watch_in_the_way(self._cpus, self._memory, self._hardware)
        under = self._packets.exchange(b"z" + place)[0] == b"OK"
        if watch is not None:
            self.remove_breakpoint(*watch)
        try:
            self._load_debug_registers()
            stop = self._stepper.step(cpu)
        finally:
            if under:
                self._packets.exchange(b"Z" + place)
            if watch is not None:
                self.insert_breakpoint(*watch)
            self._packets.give_back()
            self._general_thread.forget_registers()
        if watch is not None:
            stop = dataclasses.replace(stop, reason=StopReason.WATCHPOINT, address=watch[1])
        self._hits.stop = stop
        return stop

    def _go(self, command: bytes) -> Stop:
        if self._cpus.moved is not None and self._cpus.moved != self._cpus.rip:
            command = b"%b%x" % (command, self._cpus.moved)
        self._packets.exchange(b"Hc-1")  # KGDB refuses to step another thread than the stopped one
        self._memory.forget()
        reply, _ = self._packets.exchange(command)
        if reply[:1] not in (b"T", b"S"):
            raise TargetTimeout(f"the kernel at {self.name} did not stop in {_ANSWER_S} s")
        self._packets.stopped()
        self._cpus.at_stop(reply)
        behind = self._cpus.rip - 1
        if self._breakpoints.at(behind) is not None or any(user_breakpoints(behind)):
            self._cpus.moved = behind
        reason, watched = self._reason(stepped=command[:1] == b"s")
        self._by_debug_exception = command[:1] == b"s"
        return Stop(self._cpus.stopped, reason, watched)

    def _leave(self, resume: bool) -> None:
        self._breakpoints.delete_all()
        for kind, address, size_bytes in self._hardware:
            self.remove_breakpoint(kind, address, size_bytes)
        self._trap.delete()
        gdb.events.cont.disconnect(self._on_cont)
        super()._leave(resume)

    # Stops

    def _require_stopped(self, what: str) -> None:
        GdbInferior._require_stopped(self, what)
        self._selected_cpu()

    def _selected_cpu(self) -> int:
        if not self._known:
            self._packets.select_stopped()
            self._at_stop()
        return self._cpus.stopped

    def _at_stop(self) -> None:
        self._memory.forget()
        self._cpus.at_stop(b"T05")
        self._known = True
        self._by_debug_exception = self._reason()[0] is not StopReason.INTERRUPT and not (
            self._breakpoints.at(self._cpus.rip) or any(user_breakpoints(self._cpus.rip))
        )

    def _reason(self, *, stepped: bool = False) -> tuple[StopReason, int | None]:
        return reason_of_stop(_SIGTRAP, self._cpus, self._memory, self._hardware, stepped=stepped)

    def _change_debug_registers(self) -> None:
        self._debug_registers.changed()
        if not self.in_hit:
            self._load_debug_registers()

    # Nobody asks before gdb lets the kernel run, so they are loaded when they are changed, or when
    # the handlers of a stop are through.
    def _load_debug_registers(self) -> None:
        stop, rip = self._hits.stop, self._cpus.registers(self._cpus.stopped).rip
        self._debug_registers.load(by_debug_exception=self._by_debug_exception)
        if self._cpus.rip != rip:
            self._cpus.write_through(self._cpus.stopped, "rip", rip)
            self._cpus.rip, self._cpus.moved = rip, None
            self._packets.give_back()
            self._general_thread.forget_registers()
        self._hits.stop = stop

    def _handle(
        self, reason: StopReason, watched: int | None, elsewhere_than: int | None = None
    ) -> bool:
        stops = super()._handle(reason, watched, elsewhere_than)
        self._load_debug_registers()
        return stops

    def _hit(self, ours: GdbBreakpoint) -> bool:
        self._packets.stopped()
        self._at_stop()
        watched = self._hardware.watched
        if watched is not None and self._cpus.has_hit(watched):
            self._handle(StopReason.WATCHPOINT, watched)  # on the way to the breakpoint
        return super()._hit(ours)

    def _trapped(self) -> bool:
        # Called at each SIGTRAP; whether gdb shall stop.
        pc = int(gdb.newest_frame().pc())
        if self._breakpoints.at(pc) is not None or any(user_breakpoints(pc)):
            return False  # gdb asks it
        self._packets.stopped()
        self._at_stop()
        reason, watched = self._reason()
        if reason is StopReason.INTERRUPT:
            return self._hits.stop_at_interrupt()
        if reason is StopReason.TRAP and not self._hardware.is_at(_HARDWARE, pc):
            return False  # a step of gdb's, or a debug register that is gone
        return self._handle(reason, watched)

    def _catch_traps(self) -> None:
        if self._trap is None or not self._trap.is_valid():  # the user may delete it
            before = {each.number for each in gdb.breakpoints()}
            gdb.execute("catch signal SIGTRAP", to_string=True)
            self._trap = next(b for b in gdb.breakpoints() if b.number not in before)
            self._trap.condition = "$_kgdbx_trapped()"
            self._trap.silent = True

    def _on_cont(self, event: Any) -> None:
        self._known = False

    def _on_stop_event(self, event: Any) -> None:
        if not self.in_hit:
            self._known = False
        super()._on_stop_event(event)


class _Trapped(gdb.Function):
    # Convenience function that is the catchpoint's condition.

    def __init__(self, ask: Callable[[], bool]) -> None:
        super().__init__("_kgdbx_trapped")
        self._ask = ask

    def invoke(self) -> bool:
        """Whether gdb shall stop."""
        return self._ask()


def is_kgdb() -> bool:
    """Whether the stub that gdb is connected to is KGDB: it answers nothing to ``qSupported``."""
    connection = gdb.selected_inferior().connection
    if not isinstance(connection, gdb.RemoteTargetConnection):
        return False
    return not connection.send_packet(b"qSupported")
