"""What the kernel's debugger keeps in memory, and its packets do not tell."""

import dataclasses
from collections.abc import Iterable

from kgdbx.target.base import DEBUG_REGISTERS
from kgdbx.target.kgdb_memory import KgdbMemory
from kgdbx.target.kgdb_threads import PT_REGS_OFFSETS

__all__ = ("KgdbState", "KgdbSymbols")

_IMAGE_MAP = 0xFFFFFFFF80000000  # __START_KERNEL_map, Documentation/x86/x86_64/mm.rst
_WORD = (1 << 64) - 1
# enum perf_event_state, include/linux/perf_event.h.
_EVENT_ACTIVE = 1
_SLOT_ENABLED_BYTES = 4
# What a CPU in the debugger waits for, DCPU_WANT_MASTER and DCPU_IS_SLAVE in
# kernel/debug/debug_core.h, and a bit that the kernel does not know: it waits because of us.
_CPU_STATE_BYTES = 4
_WANT_MASTER, _IS_SLAVE, _HELD = 1 << 0, 1 << 2, 1 << 16


@dataclasses.dataclass(frozen=True)
class KgdbSymbols:
    """Where things are in the running kernel: guest-virtual addresses, and sizes in bytes.

    :ivar active: ``kgdb_active``, the CPU that stopped
    :ivar single_step: ``kgdb_single_step``: if set, the other CPUs are held during a step
    :ivar stepping: ``kgdb_cpu_doing_single_step``
    :ivar info: ``kgdb_info``, one ``struct debuggerinfo_struct`` a CPU
    :ivar info_bytes: size of one
    :ivar info_registers: offset of ``debuggerinfo`` in it
    :ivar info_state: offset of ``exception_state`` in it
    :ivar breaks: ``kgdb_break``, its software breakpoints, used from the first on
    :ivar breaks_bytes: size of one
    :ivar breaks_count: how many there are
    :ivar slots: ``breakinfo``, its debug registers, one ``struct hw_breakpoint`` each
    :ivar slot_bytes: size of one
    :ivar slot_addr: offset of ``addr`` in it
    :ivar slot_pev: offset of ``pev`` in it
    :ivar nmi_dr7: per-CPU offset of ``nmi_dr7``; None if the kernel has no such thing
    :ivar event_state: offset of ``state`` in ``struct perf_event``
    :ivar event_count: offset of ``count`` in it
    :ivar int3: the breakpoint instruction of ``kgdb_breakpoint()``
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
    info_registers: int
    info_state: int
    breaks: int
    breaks_bytes: int
    breaks_count: int
    slots: int
    slot_bytes: int
    slot_addr: int
    slot_pev: int
    event_state: int
    event_count: int
    nmi_dr7: int | None
    int3: int
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
        self._events: dict[tuple[int, int], int] = {}  # by what a debug register holds, and CPU
        self._counts: dict[int, int] = {}  # by event: its hits so far

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
        symbols = self.symbols
        info = symbols.info + cpu * symbols.info_bytes
        frame = self._u64(info + symbols.info_registers)
        return frame + PT_REGS_OFFSETS[name]

    def hold_others(self, stopped: int, cpus: tuple[int, ...]) -> bool:
        """Have the other CPUs stand still during the next step, as other architectures do
        (kgdb_cpu_enter() in kernel/debug/debug_core.c). The kernel forgets it at the next stop.

        A CPU that has reached a breakpoint of its own waits for its turn to be the one that stops.
        During a step it takes it after a hundred looks, finds the breakpoint removed, and goes on:
        that hit would be lost. So it is made to wait as those do that only stand by.

        :param stopped: the CPU that is to be stepped
        :return: whether there was such a CPU; then :meth:`release_others` at the next stop
        """
        waiting = self.waiting(stopped, cpus)
        for cpu in waiting:
            self._write_cpu_state(cpu, _IS_SLAVE | _HELD)
        self._memory.write(self.symbols.single_step, (1).to_bytes(4, "little"))
        return bool(waiting)

    def waiting(self, stopped: int, cpus: tuple[int, ...]) -> list[int]:
        """CPUs that have reached a breakpoint or a debug register of their own, and wait for
        their turn to be the one that stops.
        """
        return self._cpus_in_state(_WANT_MASTER, (cpu for cpu in cpus if cpu != stopped))

    def release_others(self, cpus: tuple[int, ...]) -> None:
        """Have CPUs wait for their turn again that :meth:`hold_others` took it from, perhaps of a
        debugger that died.
        """
        for cpu in self._cpus_in_state(_HELD, cpus):
            self._write_cpu_state(cpu, _WANT_MASTER)

    def activate(self, address: int, cpus: tuple[int, ...]) -> None:
        """Have the hits of a debug register reported.

        KGDB's debug registers are perf events that were never enabled. Newer kernels (such as
        6.1.192) drop the hits of such events (perf_swevent_event() in kernel/events/core.c), so
        that KGDB never hears of them.

        :param address: what the debug register holds
        """
        symbols = self.symbols
        self._memory.forget()  # KGDB has just written there
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
                self._events[address, cpu] = event
                self._counts[event] = self._u64(event + symbols.event_count)

    def hit_again(self, address: int, cpu: int) -> bool:
        """Whether a CPU has hit a debug register since this was asked last, or since
        :meth:`activate`. KGDB does not tell, but perf counts (perf_swevent_event()).

        :param address: what the debug register holds
        """
        event = self._events[address, cpu]
        before, count = self._counts[event], self._u64(event + self.symbols.event_count)
        self._counts[event] = count
        return count != before

    def forget_saved_dr7(self, cpus: tuple[int, ...]) -> None:
        """Have the CPUs that were stopped by another one's NMI keep the DR7 that KGDB sets: they
        do if they have none to take back (``exc_nmi()`` in arch/x86/kernel/nmi.c).
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

    def _cpus_in_state(self, bit: int, cpus: Iterable[int]) -> list[int]:
        def state(cpu: int) -> int:
            data = self._memory.read(self._cpu_state_address(cpu), _CPU_STATE_BYTES)
            return int.from_bytes(data, "little")

        return [cpu for cpu in cpus if state(cpu) & bit]

    def _write_cpu_state(self, cpu: int, state: int) -> None:
        data = state.to_bytes(_CPU_STATE_BYTES, "little")
        self._memory.write(self._cpu_state_address(cpu), data)

    def _cpu_state_address(self, cpu: int) -> int:
        symbols = self.symbols
        return symbols.info + cpu * symbols.info_bytes + symbols.info_state

    def _u64(self, address: int) -> int:
        return int.from_bytes(self._memory.read(address, 8), "little")
