"""Where a kernel keeps the state of its own debugger, and which addresses are its RAM."""

import drgn
from iced_x86 import Mnemonic

from kgdbx.arch.instruction import decode_all
from kgdbx.errors import SymbolError
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.kgdb_state import KgdbSymbols

__all__ = ("kgdb_ram", "kgdb_symbols")

_PAGE_BYTES = 4096


def kgdb_symbols(kernel: Kernel) -> KgdbSymbols:
    """What :meth:`~kgdbx.target.kgdb.KgdbTarget.use_symbols` needs.

    :raises SymbolError: if the kernel has no KGDB, or no debug information
    """
    info, breaks = kernel.program["kgdb_info"], kernel.program["kgdb_break"]
    slots = kernel.program["breakinfo"]
    event = kernel.program.type("struct perf_event")
    tlb_state = kernel.program.type("struct tlb_state")
    return KgdbSymbols(
        active=kernel.address("kgdb_active"),
        single_step=kernel.address("kgdb_single_step"),
        stepping=kernel.address("kgdb_cpu_doing_single_step"),
        info=kernel.address("kgdb_info"),
        info_registers=_offset(info[0].type_, "debuggerinfo"),
        info_bytes=drgn.sizeof(info[0].type_),
        info_state=_offset(info[0].type_, "exception_state"),
        breaks=kernel.address("kgdb_break") + _offset(breaks[0].type_, "bpt_addr"),
        breaks_bytes=drgn.sizeof(breaks[0].type_),
        breaks_count=len(breaks),
        slots=slots.address_of_().value_(),
        slot_bytes=drgn.sizeof(slots[0].type_),
        slot_addr=_offset(slots[0].type_, "addr"),
        slot_pev=_offset(slots[0].type_, "pev"),
        event_state=_offset(event, "state"),
        event_count=_offset(event, "count"),
        nmi_dr7=kernel.object_address("nmi_dr7"),
        int3=_int3(kernel),
        per_cpu_offset=kernel.address("__per_cpu_offset"),
        loaded_mm=kernel.vmlinux.address("cpu_tlbstate") + _offset(tlb_state, "loaded_mm"),
        pgd=_offset(kernel.program.type("struct mm_struct"), "pgd"),
        direct_map=kernel.memory.direct_map,
        phys_base=kernel.memory.phys_base,
        ram_end=_ram_end(kernel),
    )


def kgdb_ram(kernel: Kernel) -> tuple[range, ...]:
    """Virtual addresses that are RAM or nothing: the direct map, and the kernel's data.

    Text is left out: of that a few bytes are read at a time.
    """
    start = kernel.memory.direct_map
    return (
        range(start, start + _ram_end(kernel)),
        range(kernel.address("_sdata"), kernel.address("_end")),
    )


def _int3(kernel: Kernel) -> int:
    (function,) = kernel.functions("kgdb_breakpoint")
    code = kernel.read_code(function.address, function.size_bytes)
    for instruction in decode_all(code, function.address):
        if instruction.mnemonic == Mnemonic.INT3:
            return instruction.ip
    raise SymbolError("kgdb_breakpoint() of this kernel has no breakpoint; is it patched?")


def _ram_end(kernel: Kernel) -> int:
    return kernel.memory.read_u64(kernel.address("max_pfn")) * _PAGE_BYTES


def _offset(type_: drgn.Type, member: str) -> int:
    return int(type_.member(member).offset)
