"""Doing a displaced instruction's work without stepping over it: the "boost" of kprobes.

A breakpoint's instruction is usually single-stepped, which costs a second stop. For the common
ones their effect on registers and memory is done here instead: a table maps mnemonics to what
:mod:`kgdbx.arch.effects` does for them. What it does not hold is left to the processor.
"""

import dataclasses
import functools
from collections.abc import Callable

from iced_x86 import Instruction, Mnemonic, OpKind

from kgdbx.arch import alu, effects
from kgdbx.arch.instruction import decode
from kgdbx.arch.operands import is_plain, is_register, operand_bits
from kgdbx.errors import ProbeError

__all__ = ("Emulator", "emulator_for")


@dataclasses.dataclass(frozen=True, slots=True)
class Emulator:
    """One instruction at one address, ready to be done any number of times.

    .. warning::
        Memory is accessed through the stub, so a data watchpoint on it does not fire. While one
        is armed, step over instructions whose emulator ``touches_memory``.

    :ivar run: ``run(regs, memory)`` does all that the instruction does: ``rip``, registers, flags
        and memory. It raises :class:`~kgdbx.errors.MemoryFault`, with no register changed, if
        memory cannot be accessed or the processor should do the access itself; single-step then.
    :ivar touches_memory: whether it reads or writes memory, the stack included
    """

    run: effects.Run
    touches_memory: bool


def emulator_for(code: bytes, address: int) -> Emulator | None:
    """An emulator of the first instruction of *code*, or None if it has to be single-stepped.

    None is the answer for whatever can trap on purpose or reaches beyond general registers, flags
    and plain memory: ``lock`` and ``rep`` prefixes, ``%fs`` and ``%gs``, string, vector, privileged
    and interrupt-flag instructions, 16-bit stack operations, 32-bit addresses, division.

    .. warning::
        Under hardware CET-IBT an ``endbr64`` that is the target of an indirect branch has to be
        executed by the processor: single-step it if ``CR4.CET`` (bit 23) is set.

    :param code: the instruction's own bytes, without a breakpoint in them
    :param address: guest-virtual address that it runs at
    """
    try:
        instruction = decode(code, address)
    except ProbeError:
        return None
    row = _TABLE.get(instruction.mnemonic)
    if row is None or not _legacy_prefixes(code) <= row.prefixes:
        return None
    if row.operands is not None and not all(
        row.operands(instruction, index) for index in range(instruction.op_count)
    ):
        return None
    has_memory = any(instruction.op_kind(n) == OpKind.MEMORY for n in range(instruction.op_count))
    touches_memory = row.stack or (row.memory and has_memory)
    return Emulator(row.build(instruction), touches_memory)


_LOCK, _REPNE, _REP = 0xF0, 0xF2, 0xF3
_OPERAND_SIZE, _ADDRESS_SIZE = 0x66, 0x67
_FS, _GS = 0x64, 0x65
# These four do nothing in 64-bit mode; compilers and alternatives pad with them.
_IGNORED = frozenset((0x26, 0x2E, 0x36, 0x3E))
_LEGACY = _IGNORED | {_LOCK, _REPNE, _REP, _OPERAND_SIZE, _ADDRESS_SIZE, _FS, _GS}
# With an operand-size prefix AMD and Intel branch differently.
_BRANCH_PREFIXES = _IGNORED | {_ADDRESS_SIZE}
_REX = range(0x40, 0x50)


def _legacy_prefixes(code: bytes) -> set[int]:
    # Intel SDM Vol. 2A, section 2.1.1.
    found = set()
    for byte in code:
        if byte in _LEGACY:
            found.add(byte)
        elif byte not in _REX:
            break
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    # build: makes the function. prefixes: legacy prefixes that change nothing or are understood.
    # operands: what every operand must be; None if operands mean nothing. memory: whether a memory
    # operand is accessed. stack: whether the stack is.
    build: Callable[[Instruction], effects.Run]
    prefixes: frozenset[int] = _IGNORED | {_OPERAND_SIZE}
    operands: Callable[[Instruction, int], bool] | None = is_plain
    memory: bool = True
    stack: bool = False


def _is_register_or_immediate(instruction: Instruction, index: int) -> bool:
    return is_plain(instruction, index) and instruction.op_kind(index) != OpKind.MEMORY


def _is_of_several(instruction: Instruction, index: int) -> bool:
    return is_plain(instruction, index) and instruction.op_count > 1


def _is_near_target(instruction: Instruction, index: int) -> bool:
    # Direct, or a 64-bit register or memory: not a far pointer.
    return instruction.op_kind(index) == OpKind.NEAR_BRANCH64 or (
        is_plain(instruction, index) and operand_bits(instruction, index) == 64
    )


def _alu(operation: effects.Binary, *, keep: bool = True) -> _Row:
    return _Row(functools.partial(effects.binary, operation, keep=keep))


def _no_operation() -> _Row:
    return _Row(effects.nothing, _LEGACY - {_LOCK}, operands=None, memory=False)


def _stack(
    build: Callable[[Instruction], effects.Run],
    operands: Callable[[Instruction, int], bool] = is_plain,
) -> _Row:
    # An operand-size prefix would move 16 bits.
    return _Row(build, _BRANCH_PREFIXES, operands, stack=True)


# In the order of the low four bits of the opcodes.
_CC = ("O", "NO", "B", "AE", "E", "NE", "BE", "A", "S", "NS", "P", "NP", "L", "GE", "LE", "G")


def _conditional(
    prefix: str,
    build: Callable[[int, Instruction], effects.Run],
    prefixes: frozenset[int] = _IGNORED,
) -> dict[int, _Row]:
    # The sixteen mnemonics of jcc, setcc or cmovcc.
    return {
        getattr(Mnemonic, prefix + name): _Row(functools.partial(build, number), prefixes)
        for number, name in enumerate(_CC)
    }


_TABLE: dict[int, _Row] = {
    Mnemonic.NOP: _no_operation(),
    Mnemonic.ENDBR64: _no_operation(),
    Mnemonic.PREFETCHNTA: _no_operation(),
    Mnemonic.PREFETCHT0: _no_operation(),
    Mnemonic.PREFETCHT1: _no_operation(),
    Mnemonic.PREFETCHT2: _no_operation(),
    Mnemonic.PREFETCHW: _no_operation(),
    Mnemonic.MOV: _Row(effects.mov),
    Mnemonic.MOVZX: _Row(effects.mov),
    Mnemonic.MOVSX: _Row(functools.partial(effects.mov, signed=True)),
    Mnemonic.MOVSXD: _Row(functools.partial(effects.mov, signed=True), _IGNORED),
    Mnemonic.LEA: _Row(effects.lea, memory=False),
    Mnemonic.XCHG: _Row(effects.xchg, operands=is_register),  # with memory it locks
    Mnemonic.ADD: _alu(alu.add),
    Mnemonic.ADC: _alu(alu.adc),
    Mnemonic.SUB: _alu(alu.sub),
    Mnemonic.SBB: _alu(alu.sbb),
    Mnemonic.CMP: _alu(alu.sub, keep=False),
    Mnemonic.AND: _alu(alu.and_),
    Mnemonic.OR: _alu(alu.or_),
    Mnemonic.XOR: _alu(alu.xor),
    Mnemonic.TEST: _alu(alu.and_, keep=False),
    Mnemonic.SHL: _alu(alu.shl),
    Mnemonic.SHR: _alu(alu.shr),
    Mnemonic.SAR: _alu(alu.sar),
    Mnemonic.IMUL: _Row(functools.partial(effects.binary, alu.imul), operands=_is_of_several),
    Mnemonic.BT: _Row(
        functools.partial(effects.binary, alu.bt, keep=False), operands=_is_register_or_immediate
    ),
    Mnemonic.INC: _Row(functools.partial(effects.unary, alu.inc)),
    Mnemonic.DEC: _Row(functools.partial(effects.unary, alu.dec)),
    Mnemonic.NEG: _Row(functools.partial(effects.unary, alu.neg)),
    Mnemonic.NOT: _Row(functools.partial(effects.unary, alu.not_)),
    Mnemonic.BSWAP: _Row(functools.partial(effects.unary, alu.bswap), _IGNORED),
    Mnemonic.CBW: _Row(functools.partial(effects.extend_rax, 8)),
    Mnemonic.CWDE: _Row(functools.partial(effects.extend_rax, 16)),
    Mnemonic.CDQE: _Row(functools.partial(effects.extend_rax, 32)),
    Mnemonic.CWD: _Row(functools.partial(effects.extend_rdx, 16)),
    Mnemonic.CDQ: _Row(functools.partial(effects.extend_rdx, 32)),
    Mnemonic.CQO: _Row(functools.partial(effects.extend_rdx, 64)),
    Mnemonic.PUSH: _stack(effects.push),
    Mnemonic.POP: _stack(effects.pop, is_register),
    Mnemonic.LEAVE: _stack(effects.leave),
    Mnemonic.CALL: _stack(effects.call, _is_near_target),
    Mnemonic.RET: _stack(effects.ret),
    Mnemonic.JMP: _Row(effects.jmp, _BRANCH_PREFIXES, _is_near_target),
    **_conditional("J", effects.jcc, _BRANCH_PREFIXES),
    **_conditional("SET", effects.setcc),
    **_conditional("CMOV", effects.cmovcc, _IGNORED | {_OPERAND_SIZE}),
}
