"""Which memory an instruction accesses, before it is executed."""

import dataclasses

from iced_x86 import (
    InstructionInfoFactory,
    MemorySizeExt,
    OpAccess,
    Register,
    RegisterExt,
    UsedMemory,
)

from kgdbx.arch.instruction import decode
from kgdbx.arch.registers import Registers

__all__ = ("Access", "memory_accesses")

_MASK = (1 << 64) - 1
_WRITES = frozenset(
    (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
)
_SEGMENTS = {Register.GS: "gs_base", Register.FS: "fs_base"}
# In the order of their numbers in instructions.
_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi") + tuple(
    f"r{n}" for n in range(8, 16)
)
# A repeated string instruction ends a step after each element; states of the processor are larger.
_ELEMENT_BYTES, _STATE_BYTES = 8, 4096


@dataclasses.dataclass(frozen=True)
class Access:
    """Memory that one instruction accesses.

    :ivar address: guest-virtual
    :ivar size_bytes: at most so many
    :ivar writes: whether it is written, perhaps
    """

    address: int
    size_bytes: int
    writes: bool

    def overlaps(self, address: int, size_bytes: int) -> bool:
        """Whether other memory is a part of this, or this of it."""
        return self.address < address + size_bytes and address < self.address + self.size_bytes


def memory_accesses(code: bytes, registers: Registers) -> tuple[Access, ...]:
    """What the instruction at ``rip`` accesses; of repeated ones the next element alone.

    :param code: live bytes of it, more are ignored
    :param registers: what they are before it
    :raises AttributeError: if it depends on a register that is not available
    :raises ProbeError: EINVAL if the bytes are no instruction
    """
    instruction = decode(code, registers.rip)
    repeated = instruction.has_rep_prefix or instruction.has_repne_prefix
    unknown_bytes = _ELEMENT_BYTES if repeated else _STATE_BYTES
    return tuple(
        Access(
            _address(used, registers),
            MemorySizeExt.size(used.memory_size) or unknown_bytes,
            used.access in _WRITES,
        )
        for used in InstructionInfoFactory().info(instruction).used_memory()
        if used.access != OpAccess.NO_MEM_ACCESS
    )


def _address(used: UsedMemory, registers: Registers) -> int:
    address = used.displacement
    for register, scale in ((used.base, 1), (used.index, used.scale)):
        if register != Register.NONE:
            full = RegisterExt.full_register(register) - Register.RAX
            value = getattr(registers, _NAMES[full])
            address += scale * (value & ((1 << 8 * RegisterExt.size(register)) - 1))
    if used.segment in _SEGMENTS:
        address += getattr(registers, _SEGMENTS[used.segment])
    return address & _MASK
