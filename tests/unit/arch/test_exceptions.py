import random
import struct

from kgdbx.arch.exceptions import Trap, gate_handlers


def _gate(address: int, *, present: bool = True) -> bytes:
    # As pack_gate() does, arch/x86/include/asm/desc.h: __KERNEL_CS, interrupt gate, DPL 0, IST 0.
    bits = 0xE << 8 | present << 15
    low, middle, high = address & 0xFFFF, address >> 16 & 0xFFFF, address >> 32
    return struct.pack("<HHHHII", low, 0x10, bits, middle, high, 0)


def test_names_and_numbers() -> None:
    assert Trap.X86_TRAP_PF == 14
    assert Trap(13).name == "X86_TRAP_GP"
    assert Trap.X86_TRAP_BP == 3
    assert Trap.X86_TRAP_VC == 29
    assert [t.value for t in Trap] == [*range(22), 29]


def test_gate_handlers() -> None:
    rng = random.Random(32)
    handlers = {vector: 0xFFFF_FFFF_8000_0000 | rng.getrandbits(30) for vector in range(256)}
    idt = b"".join(_gate(handlers[vector]) for vector in range(256))
    assert gate_handlers(idt) == {handlers[vector]: vector for vector in range(32)}


def test_absent_gates_are_left_out() -> None:
    idt = _gate(0x1111) + _gate(0x2222, present=False) + bytes(16) + _gate(0x123456789ABCDEF0)
    assert gate_handlers(idt) == {0x1111: 0, 0x123456789ABCDEF0: 3}


def test_shared_handler_is_the_first_vector() -> None:
    assert gate_handlers(_gate(0x1111) * 5) == {0x1111: 0}


def test_an_idt_cut_short() -> None:
    assert gate_handlers((_gate(0x1111) + _gate(0x2222))[:-1]) == {0x1111: 0}
    assert gate_handlers(b"") == {}
