"""Exceptions of x86: their numbers, and where the kernel handles them."""

import enum
import struct

__all__ = ("Trap", "gate_handlers")


class Trap(enum.IntEnum):
    """Exception vectors by the kernel's names: arch/x86/include/asm/trapnr.h."""

    X86_TRAP_DE = 0  # divide error
    X86_TRAP_DB = 1  # debug
    X86_TRAP_NMI = 2  # non-maskable interrupt
    X86_TRAP_BP = 3  # breakpoint
    X86_TRAP_OF = 4  # overflow
    X86_TRAP_BR = 5  # bound range exceeded
    X86_TRAP_UD = 6  # invalid opcode
    X86_TRAP_NM = 7  # device not available
    X86_TRAP_DF = 8  # double fault
    X86_TRAP_OLD_MF = 9  # coprocessor segment overrun
    X86_TRAP_TS = 10  # invalid TSS
    X86_TRAP_NP = 11  # segment not present
    X86_TRAP_SS = 12  # stack segment fault
    X86_TRAP_GP = 13  # general protection fault
    X86_TRAP_PF = 14  # page fault
    X86_TRAP_SPURIOUS = 15  # spurious interrupt
    X86_TRAP_MF = 16  # x87 floating-point exception
    X86_TRAP_AC = 17  # alignment check
    X86_TRAP_MC = 18  # machine check
    X86_TRAP_XF = 19  # SIMD floating-point exception
    X86_TRAP_VE = 20  # virtualization exception
    X86_TRAP_CP = 21  # control protection exception
    X86_TRAP_VC = 29  # VMM communication exception


_EXCEPTION_VECTORS = 32

# struct gate_struct, arch/x86/include/asm/desc_defs.h: offset_low, segment, bits, offset_middle,
# offset_high, reserved. Intel SDM Vol. 3A, section 6.14.1.
_GATE = struct.Struct("<HHHHII")
_GATE_PRESENT = 1 << 15


def gate_handlers(idt: bytes) -> dict[int, int]:
    """Guest-virtual address of each exception's handler to its vector.

    Execution that arrives at one of these addresses is an exception being taken. Vectors without
    a gate are left out; if two share a handler, the lower one is given.

    :param idt: bytes at the IDT's base; the first 32 gates, 512 bytes, are looked at
    """
    handlers: dict[int, int] = {}
    whole = len(idt) - len(idt) % _GATE.size
    gates = _GATE.iter_unpack(idt[: min(whole, _GATE.size * _EXCEPTION_VECTORS)])
    for vector, (low, _segment, bits, middle, high, _reserved) in enumerate(gates):
        if bits & _GATE_PRESENT:
            handlers.setdefault(low | middle << 16 | high << 32, vector)
    return handlers
