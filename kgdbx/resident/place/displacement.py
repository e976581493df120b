"""Instructions that give way to a jump, and the same instructions at another address."""

import dataclasses

from iced_x86 import BlockEncoder, Code, Decoder, FlowControl, Instruction, Mnemonic

from kgdbx.arch.instruction import branch_target, format_instruction
from kgdbx.errors import KgdbxError

__all__ = ("CannotDisplace", "Displacement", "FLOW_ENDS", "FTRACE_NOP", "JUMP_BYTES")

JUMP_BYTES = 5
"""Length in bytes of the ``jmp`` that a probe puts into the guest."""

FTRACE_NOP = bytes.fromhex("0f1f440000")
"""What ftrace leaves at a function's entry: ``BYTES_NOP5`` in arch/x86/include/asm/nops.h."""

FLOW_ENDS = frozenset(
    (FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.RETURN)
)
"""Kinds of instructions that never go on to the next one."""

_BITS = 64
_REACH = 1 << 31
_SLACK = 64  # bytes that an instruction may grow by when it is moved
_NO_OPERATION = (Mnemonic.NOP, Mnemonic.ENDBR64)
_PUSH_IMM32 = b"\x68"


class CannotDisplace(KgdbxError):
    """Instructions that cannot give way to a jump; the text is shown in listings.

    :ivar address: guest-virtual address of the obstacle
    :ivar kind: one of a few words, to count refusals by
    """

    def __init__(self, reason: str, address: int, kind: str) -> None:
        self.address = address
        self.kind = kind
        super().__init__(reason)


@dataclasses.dataclass(frozen=True)
class Displacement:
    """Instructions that a jump replaces.

    :ivar address: guest-virtual address of the jump
    :ivar original: the live bytes that are replaced, at least 5: whole instructions, or the last
        ones of a function and padding behind them
    """

    address: int
    original: bytes

    @property
    def resume(self) -> int:
        """Guest-virtual address to go on at."""
        return self.address + len(self.original)

    @property
    def is_ftrace_nop(self) -> bool:
        """Whether it is one 5-byte NOP: nobody can be inside of it, and nothing is moved."""
        return self.original == FTRACE_NOP

    def relocated(self, at: int) -> bytes:
        """The same instructions to run at another address, without NOPs.

        A call becomes a push of the true return address and a jump, so that nobody ever returns
        into the copy. What ends the flow, such as a ``ret``, is the last instruction of a copy.

        :param at: guest-virtual address of the copy
        :raises CannotDisplace: if something that an instruction names by its distance is more than
            2 GiB away
        """
        copy = b""
        for instruction in Decoder(_BITS, self.original, ip=self.address):
            if instruction.mnemonic not in _NO_OPERATION:
                copy += _moved(instruction, at + len(copy))
            if instruction.flow_control in FLOW_ENDS:
                break
        return copy


def _moved(instruction: Instruction, at: int) -> bytes:
    moved = instruction.copy()
    push = b""
    if instruction.is_call_near or instruction.is_call_near_indirect:
        push = _push_return_address(instruction)
        moved.code = Code.JMP_REL32_64 if instruction.is_call_near else Code.JMP_RM64
    # An instruction that goes to itself, or back to the jump, shall go to the jump, where the
    # probe is: not to its own copy, as the encoder would have it for an address that it knows.
    moved.ip = at + len(push)
    for named in (
        branch_target(instruction),
        instruction.ip_rel_memory_address if instruction.is_ip_rel_memory_operand else None,
    ):
        if named is not None and abs(_signed(named - at)) > _REACH - _SLACK:
            raise CannotDisplace(
                f"'{format_instruction(instruction)}' names an address that is more than 2 GiB "
                "away from the probe's code",
                instruction.ip,
                "reach",
            )
    encoder = BlockEncoder(_BITS)
    encoder.add(moved)
    code: bytes = encoder.encode(moved.ip)
    return push + code


def _push_return_address(call: Instruction) -> bytes:
    back = _signed(call.next_ip)
    if not -_REACH <= back < _REACH:
        raise CannotDisplace(
            f"the return address {call.next_ip:#x} of a call cannot be pushed by one instruction",
            call.ip,
            "reach",
        )
    return _PUSH_IMM32 + back.to_bytes(4, "little", signed=True)


def _signed(word: int) -> int:
    word &= (1 << _BITS) - 1
    return word - (1 << _BITS) if word >> (_BITS - 1) else word
