"""A target without a guest, for tests of what is built on targets."""

import dataclasses
import errno
import time
from collections.abc import Callable, Mapping, Sequence

from kgdbx.arch.registers import DEFAULT_LAYOUT, Registers
from kgdbx.errors import MemoryFault, ProbeError, TargetLost, Unsupported
from kgdbx.target.base import (
    DEBUG_REGISTERS,
    IDLE_S,
    BreakpointKind,
    Capabilities,
    Stop,
    StopReason,
    Target,
    check_debug_register,
)
from kgdbx.target.idle import IdleCalls

__all__ = ("FakeInstruction", "FakeTarget")

_INTERRUPTED = Stop(0, StopReason.INTERRUPT, None, 2)


@dataclasses.dataclass(frozen=True)
class FakeInstruction:
    """One instruction of a program.

    :ivar address: guest-virtual
    :ivar writes: guest-virtual address and what the instruction stores there
    """

    address: int
    writes: tuple[int, bytes] | None = None


class FakeTarget(Target):
    """Memory, and vCPUs that go round and round through one program.

    The vCPUs take turns, one instruction each. As in QEMU, a breakpoint is hit before its
    instruction and hit again as long as the program counter stays there; a watchpoint is hit
    after it.

    :param program: instructions in the order of their execution
    :param memory: contents by guest-virtual address; nothing else is mapped
    :param cpus: number of vCPUs
    :param virtual_base: guest-virtual address of guest-physical 0
    :param calls: rounds that each vCPU makes before it halts; None for no end
    :param ram: physical memory can be read and written while the vCPUs run, as with guest RAM
        that is seen from the host
    """

    def __init__(
        self,
        program: Sequence[FakeInstruction],
        memory: Mapping[int, bytes],
        *,
        cpus: int = 1,
        virtual_base: int = 0,
        calls: int | None = None,
        ram: bool = False,
    ) -> None:
        self.calls = calls
        self._ram = ram
        self._program = tuple(program)
        self._bytes = {at + i: byte for at, data in memory.items() for i, byte in enumerate(data)}
        self._virtual_base = virtual_base
        names = dict.fromkeys(DEFAULT_LAYOUT.names, 0)
        self._registers = [names | {"rip": program[0].address} for _ in range(cpus)]
        self._rounds = [0] * cpus
        self._breakpoints: set[tuple[BreakpointKind, int, int]] = set()
        self._stop = _INTERRUPTED
        self._turn = 0
        self._running = False
        self._lost = False
        self._closed = False
        self._stop_requested = False

    @property
    def name(self) -> str:
        return "fake"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            hardware_breakpoints=DEBUG_REGISTERS,
            software_breakpoints=None,
            physical_memory=True,
            reads_while_running=self._ram,
            writes_while_running=self._ram,
        )

    @property
    def running(self) -> bool:
        return self._running

    @property
    def breakpoints(self) -> tuple[tuple[BreakpointKind, int, int], ...]:
        """Kind, address and size of what is inserted."""
        return tuple(sorted(self._breakpoints))

    @property
    def halted(self) -> bool:
        """Whether all vCPUs made their rounds."""
        return self.calls is not None and all(done >= self.calls for done in self._rounds)

    def lose(self) -> None:
        """Be a guest that was killed."""
        self._lost = True

    def cpus(self) -> tuple[int, ...]:
        return tuple(range(len(self._registers)))

    def read_memory(self, address: int, size_bytes: int, *, cpu: int | None = None) -> bytes:
        self._require_stopped("memory")
        return self._read(address, address, size_bytes, physical=False)

    def write_memory(self, address: int, data: bytes, *, cpu: int | None = None) -> None:
        self._require_stopped("memory")
        self._write(address, address, data, physical=False)

    def read_physical(self, address: int, size_bytes: int) -> bytes:
        self._require_reachable()
        return self._read(address + self._virtual_base, address, size_bytes, physical=True)

    def write_physical(self, address: int, data: bytes) -> None:
        self._require_reachable()
        self._write(address + self._virtual_base, address, data, physical=True)

    def _read(self, at: int, address: int, size_bytes: int, *, physical: bool) -> bytes:
        try:
            return bytes(self._bytes[at + i] for i in range(size_bytes))
        except KeyError:
            raise MemoryFault(address, size_bytes, physical=physical) from None

    def _write(self, at: int, address: int, data: bytes, *, physical: bool) -> None:
        if any(at + i not in self._bytes for i in range(len(data))):
            raise MemoryFault(address, len(data), physical=physical, write=True)
        self._bytes.update((at + i, byte) for i, byte in enumerate(data))

    def flush_translations(self) -> None:
        self._require_stopped("flushing translations")

    def read_registers(self, cpu: int) -> Registers:
        self._require_stopped("registers")
        return Registers(dict(self._registers[cpu]))

    def write_registers(self, cpu: int, registers: Registers) -> None:
        self._require_stopped("registers")
        self._registers[cpu].update(registers.changed)

    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        self._require_stopped("a breakpoint")
        key = (kind, address, size_bytes)
        if key in self._breakpoints:
            raise ProbeError(f"there is a {kind.name} breakpoint at {address:#x}", errno.EBUSY)
        check_debug_register(self._breakpoints, kind, size_bytes)
        self._breakpoints.add(key)

    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        self._require_stopped("a breakpoint")
        self._breakpoints.discard((kind, address, size_bytes))

    def step(self, cpu: int) -> Stop:
        self._require_stopped("a step")
        self._stop = self._execute(cpu) or Stop(cpu, StopReason.TRAP)
        return self._stop

    def resume(self) -> None:
        self._require_alive()
        self._running = True

    def interrupt(self) -> Stop:
        self._require_alive()
        if self._running:
            self._stop = self._advance(100) or _INTERRUPTED
            self._running = False
        return self._stop

    def request_stop(self) -> None:
        self._stop_requested = True

    def forget_stop_request(self) -> None:
        self._stop_requested = False

    def run(
        self,
        on_stop: Callable[[Stop], bool] | None = None,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] | None = None,
        idle_s: float = IDLE_S,
    ) -> Stop | None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        idle = IdleCalls(on_idle, idle_s)
        try:
            while True:
                self._require_alive()
                self._running = True
                idle.call_if_due()
                stop = self._advance(1000)
                self._running = False
                if stop is not None:
                    self._stop = stop
                    if on_stop is None or not on_stop(stop):
                        return stop
                elif self.halted:
                    time.sleep(0.001)
                late = deadline is not None and time.monotonic() >= deadline
                if late or self._stop_requested:
                    self._stop_requested = False
                    return None
        finally:
            self._running = False

    def close(self, *, resume: bool = True) -> None:
        self._closed = True
        self._breakpoints.clear()
        self._running = False

    def _advance(self, instructions: int) -> Stop | None:
        for _ in range(instructions):
            cpu = self._turn
            if self.calls is None or self._rounds[cpu] < self.calls:
                pc = self._registers[cpu]["rip"]
                kinds = (BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE)
                if any((kind, pc, 1) in self._breakpoints for kind in kinds):
                    return Stop(cpu, StopReason.TRAP)
                stop = self._execute(cpu)
                if stop is not None:
                    return stop
            self._turn = (cpu + 1) % len(self._registers)
        return None

    def _execute(self, cpu: int) -> Stop | None:
        registers = self._registers[cpu]
        index = next(
            (i for i, each in enumerate(self._program) if each.address == registers["rip"]), 0
        )
        following = (index + 1) % len(self._program)
        registers["rip"] = self._program[following].address
        self._rounds[cpu] += following == 0
        writes = self._program[index].writes
        if writes is None:
            return None
        address, data = writes
        self._bytes.update((address + i, byte) for i, byte in enumerate(data))
        kinds = (BreakpointKind.WATCH_WRITE, BreakpointKind.WATCH_ACCESS)
        for kind, start, size in self.breakpoints:
            if kind in kinds and start < address + len(data) and address < start + size:
                return Stop(cpu, StopReason.WATCHPOINT, start)
        return None

    def _require_alive(self) -> None:
        if self._lost or self._closed:
            raise TargetLost("the fake guest is gone")

    def _require_reachable(self) -> None:
        if self._ram:
            self._require_alive()
        else:
            self._require_stopped("memory")

    def _require_stopped(self, what: str) -> None:
        self._require_alive()
        if self._running:
            raise Unsupported(f"{what} needs a stopped kernel; interrupt it first")
