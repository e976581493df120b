"""An instruction's operands turned into functions that read and write them.

All decoding is done when the function is made, none when it is called.
"""

from collections.abc import Callable
from typing import Protocol

from iced_x86 import Instruction, MemorySizeExt, OpKind, Register, RegisterExt

from kgdbx.arch.registers import Registers
from kgdbx.errors import MemoryFault

__all__ = (
    "Memory",
    "Reader",
    "THREAD_SIZE",
    "Writer",
    "address_of",
    "is_plain",
    "is_register",
    "operand_bits",
    "reader",
    "writer",
)


class Memory(Protocol):
    """Guest-virtual memory: every :class:`kgdbx.target.base.Target` is one."""

    def read_memory(self, address: int, size_bytes: int) -> bytes:
        """Read; raises :class:`~kgdbx.errors.MemoryFault` if any byte cannot be read."""

    def write_memory(self, address: int, data: bytes) -> None:
        """Write; raises :class:`~kgdbx.errors.MemoryFault` if any byte cannot be written."""


Reader = Callable[[Registers, Memory], int]
Writer = Callable[[Registers, Memory, int], None]

THREAD_SIZE = 16 << 10
"""Size in bytes and alignment of a kernel stack: arch/x86/include/asm/page_64_types.h."""

_MASK = (1 << 64) - 1

_IMMEDIATES = frozenset(
    (
        OpKind.IMMEDIATE8,
        OpKind.IMMEDIATE16,
        OpKind.IMMEDIATE32,
        OpKind.IMMEDIATE64,
        OpKind.IMMEDIATE8TO16,
        OpKind.IMMEDIATE8TO32,
        OpKind.IMMEDIATE8TO64,
        OpKind.IMMEDIATE32TO64,
    )
)

# In the order of their numbers in instructions.
_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi") + tuple(
    f"r{n}" for n in range(8, 16)
)
# Their lowest bytes in the order of iced-x86, with the four high bytes in between.
_LOW_BYTES = tuple(range(Register.AL, Register.BL + 1)) + tuple(
    range(Register.SPL, Register.R15L + 1)
)
_FULL = dict(zip(range(Register.RAX, Register.R15 + 1), _NAMES, strict=True))
# iced-x86 register to (name of the whole register, lowest bit in it, bits).
_PARTS: dict[int, tuple[str, int, int]] = {
    **{reg: (name, 0, 64) for reg, name in _FULL.items()},
    **{Register.EAX + n: (name, 0, 32) for n, name in enumerate(_NAMES)},
    **{Register.AX + n: (name, 0, 16) for n, name in enumerate(_NAMES)},
    **{reg: (name, 0, 8) for reg, name in zip(_LOW_BYTES, _NAMES, strict=True)},
    **{Register.AH + n: (name, 8, 8) for n, name in enumerate(_NAMES[:4])},
}


def is_register(instruction: Instruction, index: int) -> bool:
    """Whether operand *index* is a general register or a part of one."""
    return (
        instruction.op_kind(index) == OpKind.REGISTER and instruction.op_register(index) in _PARTS
    )


def is_plain(instruction: Instruction, index: int) -> bool:
    """Whether operand *index* is a general register, an immediate, a direct branch target, or
    memory at a 64-bit address; all others (segment, control, vector registers) are not for here.
    """
    kind = instruction.op_kind(index)
    if kind == OpKind.REGISTER:
        return instruction.op_register(index) in _PARTS
    if kind == OpKind.MEMORY:
        base, index_register = instruction.memory_base, instruction.memory_index
        if base == index_register == Register.NONE and instruction.memory_displ_size != 8:
            return False
        return (base in _FULL or base in (Register.NONE, Register.RIP)) and (
            index_register in _FULL or index_register == Register.NONE
        )
    return kind == OpKind.NEAR_BRANCH64 or kind in _IMMEDIATES


def operand_bits(instruction: Instruction, index: int) -> int:
    """Size in bits of operand *index*, a register or memory."""
    if instruction.op_kind(index) == OpKind.MEMORY:
        return 8 * MemorySizeExt.size(instruction.memory_size)
    return 8 * RegisterExt.size(instruction.op_register(index))


def address_of(instruction: Instruction) -> Callable[[Registers], int]:
    """A function that computes the guest-virtual address of the memory operand."""
    displacement = instruction.memory_displacement
    base = _FULL.get(instruction.memory_base)
    index = _FULL.get(instruction.memory_index)
    scale = instruction.memory_index_scale
    # A %rip-relative operand comes here as an absolute address.
    if base is None and index is None:
        return lambda regs: displacement
    if index is None:
        name = str(base)
        return lambda regs: (getattr(regs, name) + displacement) & _MASK
    if base is None:
        return lambda regs: (getattr(regs, index) * scale + displacement) & _MASK
    return lambda regs: (getattr(regs, base) + getattr(regs, index) * scale + displacement) & _MASK


def reader(instruction: Instruction, index: int, bits: int | None = None) -> Reader:
    """A function that reads operand *index* as an unsigned number.

    :param bits: size of the value, needed for an immediate: that of the operation
    """
    kind = instruction.op_kind(index)
    if kind == OpKind.REGISTER:
        return _register_reader(instruction.op_register(index))
    if kind == OpKind.MEMORY:
        address = address_of(instruction)
        size_bytes = operand_bits(instruction, index) // 8
        return lambda regs, memory: int.from_bytes(
            memory.read_memory(address(regs), size_bytes), "little"
        )
    if kind == OpKind.NEAR_BRANCH64:
        value = instruction.near_branch_target
    else:
        value = instruction.immediate(index) & ((1 << (bits or 64)) - 1)
    return lambda regs, memory: value


def writer(instruction: Instruction, index: int) -> Writer:
    """A function that writes operand *index*.

    Memory is written on the current kernel stack only. Elsewhere the function raises
    :class:`~kgdbx.errors.MemoryFault`, so that the processor does the store: one through a stub
    skips copy-on-write, write protection, dirty bits and devices.
    """
    if instruction.op_kind(index) == OpKind.REGISTER:
        return _register_writer(instruction.op_register(index))
    address = address_of(instruction)
    size_bytes = operand_bits(instruction, index) // 8

    def write(regs: Registers, memory: Memory, value: int) -> None:
        where = address(regs)
        rsp = regs.rsp
        if where < rsp or (where ^ rsp) >= THREAD_SIZE:
            raise MemoryFault(where, size_bytes, write=True)
        memory.write_memory(where, value.to_bytes(size_bytes, "little"))

    return write


def _register_reader(register: int) -> Reader:
    name, shift, bits = _PARTS[register]
    if bits == 64:
        return lambda regs, memory: int(getattr(regs, name))
    mask = (1 << bits) - 1
    return lambda regs, memory: getattr(regs, name) >> shift & mask


def _register_writer(register: int) -> Writer:
    # A 32-bit result clears the upper half, smaller ones leave the rest: SDM Vol. 1, 3.4.1.1.
    name, shift, bits = _PARTS[register]
    if bits >= 32:
        return lambda regs, memory, value: setattr(regs, name, value)
    keep = _MASK ^ ((1 << bits) - 1) << shift
    return lambda regs, memory, value: setattr(
        regs, name, getattr(regs, name) & keep | value << shift
    )
