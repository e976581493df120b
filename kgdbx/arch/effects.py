"""What each kind of instruction does to registers, flags and memory.

Each function here takes an instruction and returns a function ``run(regs, memory)`` that does it.
The order inside is always: read everything, write memory, write registers; so a fault in memory
changes no register. Source: the "Operation" paragraphs of the Intel SDM, Vol. 2.
"""

from collections.abc import Callable

from iced_x86 import Instruction, OpKind

from kgdbx.arch import alu
from kgdbx.arch.operands import Memory, Reader, address_of, operand_bits, reader, writer
from kgdbx.arch.registers import Registers
from kgdbx.errors import MemoryFault

__all__ = (
    "Binary",
    "Run",
    "Unary",
    "binary",
    "call",
    "cmovcc",
    "extend_rax",
    "extend_rdx",
    "jcc",
    "jmp",
    "lea",
    "leave",
    "mov",
    "nothing",
    "pop",
    "push",
    "ret",
    "setcc",
    "unary",
    "xchg",
)

Run = Callable[[Registers, Memory], None]
Binary = Callable[[int, int, int, int], tuple[int, int]]
Unary = Callable[[int, int, int], tuple[int, int]]


def nothing(instruction: Instruction) -> Run:
    """The next instruction, and no other effect."""
    after = instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        regs.rip = after

    return run


def mov(instruction: Instruction, *, signed: bool = False) -> Run:
    """Operand 1 to operand 0; with zero or sign extension if their sizes differ."""
    bits = operand_bits(instruction, 0)
    mask = (1 << bits) - 1
    read, write, after = reader(instruction, 1, bits), writer(instruction, 0), instruction.next_ip
    if signed:
        source_bits = operand_bits(instruction, 1)

        def run_signed(regs: Registers, memory: Memory) -> None:
            write(regs, memory, alu.sign_extend(read(regs, memory), source_bits) & mask)
            regs.rip = after

        return run_signed

    def run(regs: Registers, memory: Memory) -> None:
        write(regs, memory, read(regs, memory))
        regs.rip = after

    return run


def lea(instruction: Instruction) -> Run:
    """The memory operand's address, cut to the register's size."""
    mask = (1 << operand_bits(instruction, 0)) - 1
    address, write, after = address_of(instruction), writer(instruction, 0), instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        write(regs, memory, address(regs) & mask)
        regs.rip = after

    return run


def binary(operation: Binary, instruction: Instruction, *, keep: bool = True) -> Run:
    """An operation of two values. With three operands the first is only written.

    :param keep: whether the result is written; otherwise only the flags are
    """
    bits = operand_bits(instruction, 0)
    sources = instruction.op_count - 2
    left = reader(instruction, sources, bits)
    right = reader(instruction, sources + 1, bits)
    write = writer(instruction, 0) if keep else None
    after = instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        result, flags = operation(left(regs, memory), right(regs, memory), regs.eflags, bits)
        if write is not None:
            write(regs, memory, result)
        regs.eflags = flags
        regs.rip = after

    return run


def unary(operation: Unary, instruction: Instruction) -> Run:
    """An operation of one value."""
    bits = operand_bits(instruction, 0)
    read, write, after = reader(instruction, 0), writer(instruction, 0), instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        result, flags = operation(read(regs, memory), regs.eflags, bits)
        write(regs, memory, result)
        regs.eflags = flags
        regs.rip = after

    return run


def xchg(instruction: Instruction) -> Run:
    """Two registers swapped."""
    read, read_other = reader(instruction, 0), reader(instruction, 1)
    write, write_other = writer(instruction, 0), writer(instruction, 1)
    after = instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        old, other = read(regs, memory), read_other(regs, memory)
        write(regs, memory, other)
        write_other(regs, memory, old)
        regs.rip = after

    return run


def extend_rax(half_bits: int, instruction: Instruction) -> Run:
    """``cbw``, ``cwde`` and ``cdqe``: the sign of the lower half fills the whole accumulator.

    :param half_bits: 8, 16 or 32
    """
    mask = (1 << 2 * half_bits) - 1
    keep = ~mask if half_bits == 8 else 0
    after = instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        rax = regs.rax
        regs.rax = rax & keep | alu.sign_extend(rax, half_bits) & mask
        regs.rip = after

    return run


def extend_rdx(bits: int, instruction: Instruction) -> Run:
    """``cwd``, ``cdq`` and ``cqo``: the accumulator's sign fills the data register.

    :param bits: 16, 32 or 64
    """
    mask = (1 << bits) - 1
    keep = ~mask if bits == 16 else 0
    after = instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        sign = mask if regs.rax >> (bits - 1) & 1 else 0
        regs.rdx = regs.rdx & keep | sign
        regs.rip = after

    return run


def push(instruction: Instruction) -> Run:
    """A 64-bit push of a register, an immediate or memory."""
    read, after = reader(instruction, 0, 64), instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        _push_value(regs, memory, read(regs, memory))
        regs.rip = after

    return run


def pop(instruction: Instruction) -> Run:
    """A 64-bit pop to a register."""
    write, after = writer(instruction, 0), instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        value = _read_u64(memory, regs.rsp)
        regs.rsp += 8
        write(regs, memory, value)  # after the increment: pop %rsp
        regs.rip = after

    return run


def leave(instruction: Instruction) -> Run:
    """``rsp`` from ``rbp``, and ``rbp`` popped."""
    after = instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        frame = regs.rbp
        regs.rbp = _read_u64(memory, frame)
        regs.rsp = frame + 8
        regs.rip = after

    return run


def call(instruction: Instruction) -> Run:
    """A near call, direct or not."""
    target, after = _branch_target(instruction), instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        rip = target(regs, memory)
        _push_value(regs, memory, after)
        regs.rip = rip

    return run


def jmp(instruction: Instruction) -> Run:
    """A near jump, direct or not."""
    target = _branch_target(instruction)

    def run(regs: Registers, memory: Memory) -> None:
        regs.rip = target(regs, memory)

    return run


def ret(instruction: Instruction) -> Run:
    """A near return, which may release parameters."""
    released = 8 + (instruction.immediate(0) if instruction.op_count else 0)

    def run(regs: Registers, memory: Memory) -> None:
        regs.rip = _canonical(_read_u64(memory, regs.rsp))
        regs.rsp += released

    return run


def jcc(number: int, instruction: Instruction) -> Run:
    """A conditional jump.

    :param number: the condition, as :func:`kgdbx.arch.alu.condition` numbers them
    """
    holds, after = alu.condition(number), instruction.next_ip
    target = instruction.near_branch_target

    def run(regs: Registers, memory: Memory) -> None:
        regs.rip = target if holds(regs.eflags) else after

    return run


def setcc(number: int, instruction: Instruction) -> Run:
    """A condition as a byte; *number* as in :func:`jcc`."""
    holds, write, after = alu.condition(number), writer(instruction, 0), instruction.next_ip

    def run(regs: Registers, memory: Memory) -> None:
        write(regs, memory, int(holds(regs.eflags)))
        regs.rip = after

    return run


def cmovcc(number: int, instruction: Instruction) -> Run:
    """A conditional move; *number* as in :func:`jcc`."""
    # The source is read and a 32-bit destination's upper half cleared whatever the condition.
    holds, write, after = alu.condition(number), writer(instruction, 0), instruction.next_ip
    old, new = reader(instruction, 0), reader(instruction, 1)

    def run(regs: Registers, memory: Memory) -> None:
        value = new(regs, memory)
        write(regs, memory, value if holds(regs.eflags) else old(regs, memory))
        regs.rip = after

    return run


def _push_value(regs: Registers, memory: Memory, value: int) -> None:
    rsp = (regs.rsp - 8) & 0xFFFF_FFFF_FFFF_FFFF
    memory.write_memory(rsp, value.to_bytes(8, "little"))
    regs.rsp = rsp


def _read_u64(memory: Memory, address: int) -> int:
    return int.from_bytes(memory.read_memory(address, 8), "little")


def _branch_target(instruction: Instruction) -> Reader:
    read = reader(instruction, 0)
    if instruction.op_kind(0) == OpKind.NEAR_BRANCH64:
        return read
    return lambda regs, memory: _canonical(read(regs, memory))


def _canonical(address: int) -> int:
    # A branch to any other address faults at the branch itself: the processor's business.
    if 1 << 47 <= address < (1 << 64) - (1 << 47):
        raise MemoryFault(address, 1)
    return address
