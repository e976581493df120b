"""What the kernel's debugger keeps in memory, and its packets do not tell."""

import dataclasses

from kgdbx.target.base import DEBUG_REGISTERS
from kgdbx.target.kgdb_memory import KgdbMemory
from kgdbx.target.kgdb_threads import PT_REGS_OFFSETS

__all__ = ("KgdbState", "KgdbSymbols")

_IMAGE_MAP = 0xFFFFFFFF80000000  # __START_KERNEL_map, Documentation/x86/x86_64/mm.rst
_WORD = (1 << 64) - 1
# enum perf_event_state, include/linux/perf_event.h.
_EVENT_ACTIVE = 1
_SLOT_ENABLED_BYTES = 4


@dataclasses.dataclass(frozen=True)
class KgdbSymbols:
    """Where things are in the running kernel: guest-virtual addresses, and sizes in bytes.

    :ivar active: ``kgdb_active``, the CPU that stopped
    :ivar single_step: ``kgdb_single_step``: if set, the other CPUs are held during a step
    :ivar stepping: ``kgdb_cpu_doing_single_step``
    :ivar info: ``kgdb_info``, one ``struct debuggerinfo_struct`` a CPU
    :ivar info_bytes: size of one
    :ivar breaks: ``kgdb_break``, its software breakpoints, used from the first on
    :ivar breaks_bytes: size of one
    :ivar breaks_count: how many there are
    :ivar slots: ``breakinfo``, its debug registers, one ``struct hw_breakpoint`` each
    :ivar slot_bytes: size of one
    :ivar slot_addr: offset of ``addr`` in it
    :ivar slot_pev: offset of ``pev`` in it
    :ivar nmi_dr7: per-CPU offset of ``nmi_dr7``; None if the kernel has no such thing
    :ivar event_state: offset of ``state`` in ``struct perf_event``
    :ivar per_cpu_offset: ``__per_cpu_offset``, an array
    :ivar loaded_mm: per-CPU offset of ``cpu_tlbstate.loaded_mm``
    :ivar pgd: offset of ``pgd`` in ``struct mm_struct``
    :ivar direct_map: virtual address of physical address 0
    :ivar phys_base: ``phys_base``, its value
    :ivar ram_end: physical end of RAM
    """

    active: int
    single_step: int
    stepping: int
    info: int
    info_bytes: int
    breaks: int
    breaks_bytes: int
    breaks_count: int
    slots: int
    slot_bytes: int
    slot_addr: int
    slot_pev: int
    event_state: int
    nmi_dr7: int | None
    per_cpu_offset: int
    loaded_mm: int
    pgd: int
    direct_map: int
    phys_base: int
    ram_end: int


class KgdbState:
    """Reads and writes that state at a stop, through ``m`` and ``M``."""

    def __init__(self, memory: KgdbMemory, symbols: KgdbSymbols) -> None:
        self.symbols = symbols
        self._memory = memory
        self._gs_bases: dict[int, int] = {}

    def active_cpu(self) -> int:
        """The CPU that stopped."""
        return int.from_bytes(self._memory.read(self.symbols.active, 4), "little", signed=True)

    def gs_base(self, cpu: int) -> int:
        """The kernel's GS base of a CPU, which is its per-CPU area."""
        if cpu not in self._gs_bases:
            self._gs_bases[cpu] = self._u64(self.symbols.per_cpu_offset + 8 * cpu)
        return self._gs_bases[cpu]

    def cr3(self, cpu: int) -> int:
        """Physical address of the page tables that a CPU uses."""
        mm = self._u64(self.gs_base(cpu) + self.symbols.loaded_mm)
        pgd = self._u64(mm + self.symbols.pgd)
        if pgd >= _IMAGE_MAP:
            return (pgd - _IMAGE_MAP + self.symbols.phys_base) & _WORD
        return pgd - self.symbols.direct_map

    def register_address(self, cpu: int, name: str) -> int:
        """Where a register of a stopped CPU lies in the ``struct pt_regs`` of its exception; it
        has that value when the CPU goes on.
        """
        frame = self._u64(self.symbols.info + cpu * self.symbols.info_bytes)
        return frame + PT_REGS_OFFSETS[name]

    def hold_others(self) -> None:
        """Have the other CPUs stand still during the next step, as other architectures do
        (kgdb_cpu_enter() in kernel/debug/debug_core.c). The kernel forgets it at the next stop.
        """
        self._memory.write(self.symbols.single_step, (1).to_bytes(4, "little"))

    def activate(self, address: int, cpus: tuple[int, ...]) -> None:
        """Have the hits of a debug register reported.

        KGDB's debug registers are perf events that were never enabled. Newer kernels (such as
        6.1.192) drop the hits of such events (perf_swevent_event() in kernel/events/core.c), so
        that KGDB never hears of them.

        :param address: what the debug register holds
        """
        symbols = self.symbols
        for slot in range(DEBUG_REGISTERS):
            base = symbols.slots + slot * symbols.slot_bytes
            enabled = self._memory.read(base, _SLOT_ENABLED_BYTES) != bytes(_SLOT_ENABLED_BYTES)
            if not enabled or self._u64(base + symbols.slot_addr) != address:
                continue
            per_cpu = self._u64(base + symbols.slot_pev)
            for cpu in cpus:
                event = self._u64((per_cpu + self.gs_base(cpu)) & _WORD)
                state = _EVENT_ACTIVE.to_bytes(4, "little")
                if self._memory.read(event + symbols.event_state, 4) != state:
                    self._memory.write(event + symbols.event_state, state)

    def forget_debug_registers(self, cpus: tuple[int, ...]) -> None:
        """Have removed debug registers stay removed.

        A CPU that was stopped by another one's NMI takes back the DR7 that it had before
        (``local_db_restore()`` in arch/x86/include/asm/debugreg.h), and would reach a breakpoint
        that KGDB has removed meanwhile. With nothing to take back it keeps what KGDB sets.
        """
        if self.symbols.nmi_dr7 is None:
            return
        for cpu in cpus:
            saved = (self.gs_base(cpu) + self.symbols.nmi_dr7) & _WORD
            if self._u64(saved):
                self._memory.write(saved, bytes(8))

    def was_breakpoint(self, address: int) -> bool:
        """Whether KGDB knows a software breakpoint at an address, removed or not, and the last
        stop was not the end of a step.
        """
        if self._memory.read(self.symbols.stepping, 4) != b"\xff" * 4:
            return False
        size = self.symbols.breaks_bytes
        for index in range(self.symbols.breaks_count):
            found = self._u64(self.symbols.breaks + index * size)
            if found == address:
                return True
            if found == 0:
                return False
        return False

    def _u64(self, address: int) -> int:
        return int.from_bytes(self._memory.read(address, 8), "little")
