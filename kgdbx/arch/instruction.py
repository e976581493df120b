"""Machine instructions: decoding, lengths, boundaries and text. Decoder: iced-x86."""

import errno
from collections.abc import Iterator

from iced_x86 import Decoder, Formatter, FormatterSyntax, Instruction, OpKind, Register

from kgdbx.errors import ProbeError

__all__ = (
    "MAX_INSTRUCTION_BYTES",
    "boundaries",
    "branch_target",
    "decode",
    "decode_all",
    "format_instruction",
    "instruction_length",
    "is_boundary",
)

MAX_INSTRUCTION_BYTES = 15
"""Longest instruction in bytes: Intel SDM Vol. 2A, section 2.3.11."""

_ADDRESS_BITS = 64


def decode(code: bytes, address: int) -> Instruction:
    """Decode the first instruction of *code*.

    :param code: live bytes; 15 are always enough, more are ignored
    :param address: guest-virtual address of the first byte
    :raises ProbeError: EINVAL if the bytes are no instruction or end inside one
    """
    instruction = Decoder(_ADDRESS_BITS, code[:MAX_INSTRUCTION_BYTES], ip=address).decode()
    if instruction.is_invalid:
        raise _undecodable(code, address)
    return instruction


def decode_all(code: bytes, start: int) -> Iterator[Instruction]:
    """Decode *code* from its first byte to its last.

    An instruction that traps, such as the ``ud2`` of ``BUG()``, is an instruction like others.

    :param code: live bytes of a whole function: alternatives, jump labels and ftrace rewrite
        kernel text, so those of vmlinux are not the ones that run
    :param start: guest-virtual address of the first byte
    :raises ProbeError: EINVAL at the first bytes that are no instruction, or if the last
        instruction is cut short; what comes before has been yielded
    """
    for instruction in Decoder(_ADDRESS_BITS, code, ip=start):
        if instruction.is_invalid:
            raise _undecodable(code[instruction.ip - start :], instruction.ip)
        yield instruction


def instruction_length(code: bytes, address: int = 0) -> int:
    """Length in bytes of the first instruction of *code*.

    :raises ProbeError: EINVAL if the bytes are no instruction or end inside one
    """
    return decode(code, address).len


def boundaries(code: bytes, start: int) -> list[int]:
    """Guest-virtual addresses of all instructions of a function, ascending.

    :param code: live bytes of the whole function
    :param start: guest-virtual address of the first byte
    :raises ProbeError: EINVAL if some bytes are no instruction
    """
    return [instruction.ip for instruction in decode_all(code, start)]


def is_boundary(code: bytes, start: int, address: int) -> bool:
    """Whether an instruction starts at *address*: ``can_probe()``, arch/x86/kernel/kprobes/core.c.

    :param code: live bytes of the function that holds *address*
    :param start: guest-virtual address of the first byte
    :raises ProbeError: EINVAL if bytes before *address* are no instruction, so that nobody knows
    """
    if not start <= address < start + len(code):
        return False
    for instruction in decode_all(code, start):
        if instruction.ip >= address:
            return instruction.ip == address
    return False


def format_instruction(instruction: Instruction) -> str:
    """Text of an instruction in AT&T syntax, like that of ``objdump -d``.

    ::

        >>> format_instruction(decode(bytes.fromhex("488b4708"), 0))
        'mov 0x8(%rdi),%rax'
    """
    # A formatter is not shared between threads, and making one costs a microsecond.
    formatter = Formatter(FormatterSyntax.GAS)
    formatter.uppercase_hex = False
    formatter.small_hex_numbers_in_decimal = False
    formatter.signed_immediate_operands = False
    formatter.branch_leading_zeros = False
    formatter.show_branch_size = False
    formatter.space_after_operand_separator = False
    formatter.always_show_scale = instruction.memory_index != Register.NONE
    formatter.rip_relative_addresses = True
    text = formatter.format(instruction)
    if instruction.is_ip_rel_memory_operand:
        return f"{text} # {instruction.ip_rel_memory_address:#x}"
    return text


def branch_target(instruction: Instruction) -> int | None:
    """Guest-virtual address that a direct call or jump goes to, or None for other instructions."""
    if instruction.op_count and instruction.op_kind(0) == OpKind.NEAR_BRANCH64:
        return instruction.near_branch_target
    return None


def _undecodable(code: bytes, address: int) -> ProbeError:
    # The bytes themselves are the best hint at what went wrong: data, or a missed boundary.
    shown = code[:MAX_INSTRUCTION_BYTES].hex(" ") or "nothing"
    return ProbeError(
        f"no instruction at {address:#x}: {shown}; give the start of an instruction", errno.EINVAL
    )
