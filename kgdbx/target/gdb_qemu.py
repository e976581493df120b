"""A kernel behind QEMU's stub over gdb's own connection; runs inside gdb's Python."""

import contextlib
from collections.abc import Callable, Iterator

import gdb

from kgdbx.arch.registers import Registers
from kgdbx.errors import Unsupported
from kgdbx.target import stub
from kgdbx.target.base import (
    DEBUG_REGISTERS,
    IDLE_S,
    BreakpointKind,
    Capabilities,
    Stop,
    StopReason,
)
from kgdbx.target.gdb_inferior import GdbInferior
from kgdbx.target.gdb_run_in_hit import RunInHit
from kgdbx.target.gdb_settings import GdbSettings
from kgdbx.target.ram import GuestRam

__all__ = ("GdbTarget",)


class GdbTarget(GdbInferior):
    """A target over QEMU's stub inside gdb.

    Two settings of gdb are changed until :meth:`close`:

    - ``set remote swbreak-feature-packet on``. gdb otherwise takes a stop one byte behind a
      breakpoint for a hit of it and moves the program counter back, although QEMU reports it
      exactly: an instruction of one byte (``push %rbp``) would be executed twice.
    - ``handle SIGTRAP nostop noprint``. With several vCPUs QEMU can report a vCPU again whose
      breakpoint has been dealt with; gdb then runs on silently. A breakpoint's stop is no signal
      to gdb and is shown as before.

    :param address: what ``target remote`` takes; None for the connection that gdb has
    :param ram: the guest's RAM seen from the host, if it can be
    :raises TargetError: if gdb is not connected to a stub, or cannot be
    """

    def __init__(self, address: str | None = None, *, ram: GuestRam | None = None) -> None:
        self._ram = ram
        super().__init__(address)

    def _change_settings(self) -> GdbSettings:
        return GdbSettings({"remote swbreak-feature-packet": "on"})

    def _learn(self) -> None:
        self._run_in_hit = RunInHit(self._connection, self._general_thread, self._breakpoints)
        exchange = self._connection.exchange
        self._packet_bytes = self._connection.max_packet_bytes()
        self._hits.stop = Stop(self._selected_cpu(), StopReason.INTERRUPT, None, 2)
        self._layout = stub.read_layout(exchange, self._packet_bytes)
        physical = self._ram is not None or exchange(b"Qqemu.PhyMemMode:0") == b"OK"
        self._capabilities = Capabilities(
            hardware_breakpoints=DEBUG_REGISTERS,
            software_breakpoints=None,
            physical_memory=physical,
            reads_while_running=self._ram is not None,
            writes_while_running=self._ram is not None,
            cheap_watchpoints=True,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(self._connection.threads()))

    # Memory

    def read_memory(self, address: int, size_bytes: int, *, cpu: int | None = None) -> bytes:
        self._require_stopped("memory through the stub")
        with self._about(cpu):
            return stub.read_memory(self._exchange, self._packet_bytes, address, size_bytes)

    def write_memory(self, address: int, data: bytes, *, cpu: int | None = None) -> None:
        self._require_stopped("memory through the stub")
        with self._about(cpu):
            stub.write_memory(self._exchange, self._packet_bytes, address, data)
        gdb.execute("maint flush dcache", to_string=True)

    def read_physical(self, address: int, size_bytes: int) -> bytes:
        if self._ram is not None:
            return self._ram.read(address, size_bytes)
        with self._physical_mode():
            return stub.read_memory(
                self._exchange, self._packet_bytes, address, size_bytes, physical=True
            )

    def write_physical(self, address: int, data: bytes) -> None:
        if self._ram is not None and self.running:
            self._ram.write(address, data)
            return
        # At a stop never through the mapped RAM: only the stub makes TCG drop translated code.
        with self._physical_mode():
            stub.write_memory(self._exchange, self._packet_bytes, address, data, physical=True)
        gdb.execute("maint flush dcache", to_string=True)

    @contextlib.contextmanager
    def _physical_mode(self) -> Iterator[None]:
        self._require_stopped("physical memory through the stub")
        if self._exchange(b"Qqemu.PhyMemMode:1") != b"OK":
            raise Unsupported(f"the stub at {self.name} reads virtual memory only")
        try:
            yield
        finally:
            self._connection.expect_ok(b"Qqemu.PhyMemMode:0")

    # Registers

    def flush_translations(self) -> None:
        self._require_stopped("flushing translations")
        stub.flush_translations(self._exchange)

    def read_registers(self, cpu: int) -> Registers:
        self._require_stopped("registers")
        with self._about(cpu):
            return Registers(self._layout.unpack(stub.decode_hex(self._exchange(b"g"))))

    def write_registers(self, cpu: int, registers: Registers) -> None:
        self._require_stopped("registers")
        changed = registers.changed
        if not changed:
            return
        with self._about(cpu):
            for name, value in changed.items():
                number = self._layout.number[name]
                size = self._layout.sizes_bytes[number]
                value_hex = value.to_bytes(size, "little").hex().encode()
                self._connection.expect_ok(b"P%x=%b" % (number, value_hex))
        if "rip" in changed:
            self._hits.moved(cpu, changed["rip"])
        self._general_thread.forget_registers()

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        super().insert_breakpoint(kind, address, size_bytes)
        self._run_in_hit.insert((kind, address, size_bytes))

    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        super().remove_breakpoint(kind, address, size_bytes)
        self._run_in_hit.remove((kind, address, size_bytes))

    # Run control

    def look_at(self, cpu: int) -> None:
        if self.in_hit:
            self._hits.look_at(cpu)
        else:
            self._connection.select(cpu)

    def run(
        self,
        on_stop: Callable[[Stop], bool] | None = None,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] | None = None,
        idle_s: float = IDLE_S,
    ) -> Stop | None:
        hit = self._hits.number
        if hit is None:
            return super().run(on_stop, timeout_s, on_idle, idle_s)
        before = self._hits.stop
        try:
            return self._run_in_hit.run(hit, lambda s: self._stop_in_hit(s, on_stop), timeout_s)
        finally:
            self._hits.stop = before

    def _stop_in_hit(self, stop: Stop, on_stop: Callable[[Stop], bool] | None) -> bool:
        self._hits.stop = stop
        return on_stop is not None and on_stop(stop)

    def _next_stop(self, cpu: int) -> Stop | None:
        if not self._run_in_hit.has_run:
            return None
        self._run_in_hit.has_run = False
        at_ours = self._breakpoints.at(self.read_registers(cpu).rip) is not None
        return Stop(cpu, StopReason.TRAP) if at_ours else None

    # Steps

    def step(self, cpu: int) -> Stop:
        self._require_stopped("a step")
        before = self.read_registers(cpu).rip
        for _ in range(stub.STEP_TRIES):
            self._step_once(cpu)
            reason = self._hits.stop.reason
            if reason is not StopReason.TRAP or self.read_registers(cpu).rip != before:
                break
        return self._hits.stop

    def _step_once(self, cpu: int) -> None:
        packet = b"vCont;s:" + self._connection.threads()[cpu]
        hit = self._hits.number
        with contextlib.nullcontext() if hit is None else self._run_in_hit.breakpoints(hit):
            self._hits.stop = self._general_thread.run_past_gdb(packet)

    def _about(self, cpu: int | None) -> contextlib.AbstractContextManager[None]:
        # Packets about memory and registers mean this vCPU.
        return self._general_thread.selected(self._hits.stop.cpu if cpu is None else cpu)

    def _exchange(self, packet: bytes) -> bytes:
        return self._connection.exchange(packet)
