"""What KGDB's threads and registers mean."""

import copy

import pytest

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProtocolError
from kgdbx.target.kgdb_threads import (
    KGDB_LAYOUT,
    PACKET_DIGITS,
    PT_REGS_OFFSETS,
    KgdbRegisters,
    cpu_of_shadow,
    shadow_thread,
    thread_ids,
)


def packet(**values: int) -> bytes:
    sizes = zip(KGDB_LAYOUT.names, KGDB_LAYOUT.sizes_bytes, strict=True)
    return b"".join(values.get(name, 7).to_bytes(size, "little") for name, size in sizes)


def test_a_packet_is_as_long_as_the_kernel_says() -> None:
    assert PACKET_DIGITS == 2 * (17 * 8 + 5 * 4)  # NUMREGBYTES, arch/x86/include/asm/kgdb.h
    assert PT_REGS_OFFSETS["rip"] == 16 * 8  # struct pt_regs
    assert PT_REGS_OFFSETS["rsp"] == 19 * 8


def test_each_cpu_has_a_shadow() -> None:
    assert shadow_thread(0) == b"fffffffe"
    assert shadow_thread(3) == b"fffffffb"
    assert [cpu_of_shadow(n) for n in thread_ids(b"mfffffffe,fffffffd,01,1a2b")] == [
        0,
        1,
        None,
        None,
    ]
    with pytest.raises(ProtocolError):
        thread_ids(b"m01,xyz")


def test_a_running_task_has_what_kgdb_knows() -> None:
    registers = Registers(KgdbRegisters(lambda: packet(rip=0x1234, rax=5), more={"cr3": lambda: 9}))
    assert (registers.rip, registers.rax, registers.cr3) == (0x1234, 5, 9)
    assert "ds" not in registers
    with pytest.raises(AttributeError, match="not available"):
        _ = registers.es


def test_a_sleeping_task_has_hardly_anything() -> None:
    registers = Registers(KgdbRegisters(lambda: packet(rip=0, rax=0, rsp=0x99)))
    assert set(registers) == {"rsp", "rbp"}
    assert registers.rsp == 0x99
    for name in ("rip", "rax", "eflags"):
        with pytest.raises(AttributeError, match="not available"):
            getattr(registers, name)


def test_the_packet_is_asked_for_when_it_is_needed() -> None:
    asked = []

    def load() -> bytes:
        asked.append(1)
        return packet(rip=0x1000, rbx=3)

    registers = Registers(KgdbRegisters(load, rip=0x1000))
    registers.rip += 5
    registers.rax = 1
    assert not asked
    assert registers.rbx == 3
    assert (registers.rip, registers.rax) == (0x1005, 1)  # what was written stays
    assert registers.changed == {"rip": 0x1005, "rax": 1}
    assert len(asked) == 1


def test_a_copy_outlives_the_stop() -> None:
    stands = True

    def load() -> bytes:
        assert stands
        return packet(rip=0x1000, rbx=3)

    values = KgdbRegisters(load, rip=0x1000)
    other = copy.copy(values)
    stands = False
    assert other["rbx"] == 3
