"""What is reached in a kernel that stands at KGDB, whoever has the connection to it."""

import abc

from kgdbx.arch.registers import Registers
from kgdbx.errors import MemoryFault, Unsupported
from kgdbx.target.base import DEBUG_REGISTERS, Capabilities, Target
from kgdbx.target.kgdb_breakpoints import MAX_SOFTWARE_BREAKPOINTS
from kgdbx.target.kgdb_cpus import KgdbCpus
from kgdbx.target.kgdb_memory import KgdbMemory
from kgdbx.target.kgdb_state import KgdbState, KgdbSymbols

__all__ = ("KgdbAccess",)


class KgdbAccess(Target):
    """Memory and registers of a target over KGDB; mixed into one that has a connection.

    Registers that KGDB does not know are not there, never zero.
    """

    _memory: KgdbMemory
    _cpus: KgdbCpus

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            hardware_breakpoints=DEBUG_REGISTERS,
            software_breakpoints=MAX_SOFTWARE_BREAKPOINTS,
            physical_memory=self._cpus.state is not None,  # by way of the kernel's direct map
            reads_while_running=False,
            writes_while_running=False,
            writes_code=False,  # kernel text is write-protected for M
        )

    def cpus(self) -> tuple[int, ...]:
        return self._cpus.numbers

    def use_symbols(self, symbols: KgdbSymbols) -> None:
        """Learn where the kernel's debugger keeps what its packets do not tell; the kernel stands.

        From then on every register can be written, a step holds the other CPUs, and memory is read
        ahead. If the kernel was stopped by a breakpoint of a debugger that died, that is undone.
        """
        self._cpus.state = KgdbState(self._memory, symbols)
        self._cpus.state.release_others(self._cpus.numbers)

    def read_ahead_in(self, *ram: range) -> None:
        """Say which virtual addresses are RAM, of which more may be read than is asked for."""
        self._memory.read_ahead_in(*ram)

    # Memory

    def read_memory(self, address: int, size_bytes: int, *, cpu: int | None = None) -> bytes:
        self._require_stopped("memory")
        return self._memory.read(address, size_bytes)

    def write_memory(self, address: int, data: bytes, *, cpu: int | None = None) -> None:
        self._require_stopped("memory")
        self._memory.write(address, data)

    def read_physical(self, address: int, size_bytes: int) -> bytes:
        self._require_stopped("memory")
        try:
            return self._memory.read(self._direct_mapped(address, size_bytes), size_bytes)
        except MemoryFault:
            raise MemoryFault(address, size_bytes, physical=True) from None

    def write_physical(self, address: int, data: bytes) -> None:
        self._require_stopped("memory")
        try:
            self._memory.write(self._direct_mapped(address, len(data)), data)
        except MemoryFault:
            raise MemoryFault(address, len(data), physical=True, write=True) from None

    def flush_translations(self) -> None:
        raise Unsupported("KGDB has no way to flush translations")

    def _direct_mapped(self, address: int, size_bytes: int) -> int:
        if self._cpus.state is None:
            raise Unsupported(f"KGDB at {self.name} reads virtual memory only")
        symbols = self._cpus.state.symbols
        if address + size_bytes > symbols.ram_end:
            raise MemoryFault(address, size_bytes, physical=True)
        return symbols.direct_map + address

    # Registers

    def read_registers(self, cpu: int) -> Registers:
        self._require_stopped("registers")
        return self._cpus.registers(cpu)

    def read_thread(self, pid: int) -> Registers:
        """Registers of a task; of one that sleeps, ``rsp`` and ``rbp`` only.

        :raises TargetError: if there is no such task
        """
        self._require_stopped("registers")
        return self._cpus.thread(pid)

    def write_registers(self, cpu: int, registers: Registers) -> None:
        self._require_stopped("registers")
        for name, value in registers.changed.items():
            self._cpus.write(cpu, name, value)

    @abc.abstractmethod
    def _require_stopped(self, what: str) -> None:
        # The connection knows whether the kernel runs.
        raise NotImplementedError
