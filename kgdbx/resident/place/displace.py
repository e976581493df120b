"""Which instructions give way to a probe's jump, and which must not.

A jump takes five bytes. What lies there is refused if the kernel forbids probes in it, patches
it, looks it up by its address or jumps into it.
"""

from collections.abc import Mapping
from types import MappingProxyType

from iced_x86 import Code, Decoder, FlowControl, Instruction, Mnemonic, OpKind
from iced_x86 import Register as Reg

from kgdbx.arch.instruction import (
    MAX_INSTRUCTION_BYTES,
    branch_target,
    decode,
    format_instruction,
)
from kgdbx.errors import ProbeError
from kgdbx.resident.place.displacement import (
    FLOW_ENDS,
    FTRACE_NOP,
    JUMP_BYTES,
    CannotDisplace,
    Displacement,
)
from kgdbx.resident.place.flow import check_flow, is_kernel_code, live_code
from kgdbx.resident.place.occupants import Occupant, busy_addresses, tasks_inside
from kgdbx.symbols.blacklist import Blacklist
from kgdbx.symbols.kernel import Function, Kernel

__all__ = (
    "CannotDisplace",
    "Displacement",
    "JUMP_BYTES",
    "NOTHING_PATCHED",
    "Occupant",
    "busy_addresses",
    "displace",
    "tasks_inside",
)

NOTHING_PATCHED: Mapping[int, bytes] = MappingProxyType({})
"""No patch of ours is in the guest."""

_BITS = 64
# A probe's code lies above the kernel's in the top 2 GiB: what lies there is in reach of both.
_TOP = (1 << _BITS) - (1 << 31)
_HALF = 1 << (_BITS - 1)
# endbr64, and what the kernel writes over it where no indirect branch goes: gen_endbr_poison() in
# arch/x86/include/asm/ibt.h. An indirect call has to find it.
_ENDBR = tuple(bytes.fromhex(code) for code in ("f30f1efa", "660f1f00", "0f1f40d6"))
_ENDBR_BYTES = 4
_DS_PREFIX = 0x3E
_FTRACE_CALLS = ("ftrace_caller", "ftrace_regs_caller", "__fentry__")
_TRAPS = (FlowControl.INTERRUPT, FlowControl.EXCEPTION, FlowControl.XBEGIN_XABORT_XEND)


def displace(
    kernel: Kernel,
    function: Function,
    address: int,
    blacklist: Blacklist,
    patched: Mapping[int, bytes] = NOTHING_PATCHED,
) -> Displacement:
    """Find the instructions that a jump at an address has to replace.

    At a function's entry an ``endbr64`` stays where it is: the jump goes behind it.

    :param kernel: a stopped kernel
    :param function: the function that holds *address*
    :param address: guest-virtual address of an instruction in it
    :param patched: original bytes by address of what is patched by us already
    :raises CannotDisplace: if a jump there would not be safe
    """
    if not kernel.memory.booted:
        raise CannotDisplace(
            "the kernel has not patched its own code yet; wait until it has booted",
            address,
            "booting",
        )
    reason = blacklist.reason(address)
    if reason is not None:
        raise CannotDisplace(reason, address, "blacklist")
    code = live_code(kernel, address, 2 * MAX_INSTRUCTION_BYTES, patched)
    at_entry = address == function.address
    if at_entry and code[:_ENDBR_BYTES] in _ENDBR:
        address, code = address + _ENDBR_BYTES, code[_ENDBR_BYTES:]
    if code.startswith(FTRACE_NOP):
        size = JUMP_BYTES
    else:
        size = _displaced_size(kernel, function, address, code)
    displacement = Displacement(address, code[:size])
    _check_free(displacement, kernel, patched)
    conflict = blacklist.tables.of(function.module).conflict(address, displacement.resume)
    if conflict is not None:
        raise CannotDisplace(
            f"{conflict.reason}: {kernel.symbolize(conflict.address)}",
            conflict.address,
            conflict.kind,
        )
    if displacement.is_ftrace_nop and at_entry:
        return displacement
    single = _check_movable(kernel, displacement) == 1
    if not (single and at_entry):
        check_flow(kernel, function, displacement, blacklist.tables, patched, single=single)
    return displacement


def _displaced_size(kernel: Kernel, function: Function, address: int, code: bytes) -> int:
    # Bytes of the least number of whole instructions that a jump covers.
    end = function.address + function.size_bytes
    size, ended = 0, False
    while size < JUMP_BYTES and not ended and address + size < end:
        try:
            instruction = decode(code[size:], address + size)
        except ProbeError as e:
            raise CannotDisplace(str(e), address + size, "not decoded") from e
        if instruction.code == Code.INT3:
            raise CannotDisplace(
                f"an int3 is at {kernel.symbolize(instruction.ip)}: a kprobe, or a debugger's "
                "breakpoint",
                instruction.ip,
                "int3",
            )
        size += instruction.len
        ended = instruction.flow_control in FLOW_ENDS
    if size >= JUMP_BYTES:
        return size
    room = max(end, _next_symbol(kernel, function)) - address
    if ended and room >= JUMP_BYTES and _is_padding(code[size:JUMP_BYTES], address + size):
        return JUMP_BYTES
    raise CannotDisplace(
        f"too short: {size} bytes of code up to its end or a jump, and {JUMP_BYTES} are needed",
        address,
        "too short",
    )


def _is_padding(code: bytes, address: int) -> bool:
    # What the compiler fills up with behind the end of a block: int3 or NOPs. The last NOP may
    # be longer than what is needed of it, and then be cut.
    at = 0
    for instruction in Decoder(_BITS, code + bytes(MAX_INSTRUCTION_BYTES), ip=address):
        if at >= len(code):
            break
        if instruction.code != Code.INT3 and instruction.mnemonic != Mnemonic.NOP:
            return False
        at += instruction.len
    return True


def _next_symbol(kernel: Kernel, function: Function) -> int:
    end = function.address + function.size_bytes
    if function.module is None:
        following = kernel.vmlinux.next_address(end - 1 - kernel.slide)
        return following + kernel.slide if following else end
    symbols = kernel.modules.symbols(function.module)
    return min((s.address for s in symbols if s.address >= end), default=end)


def _check_free(displacement: Displacement, kernel: Kernel, patched: Mapping[int, bytes]) -> None:
    for start, original in patched.items():
        if start < displacement.resume and displacement.address < start + len(original):
            raise CannotDisplace(
                f"another resident probe is at {kernel.symbolize(start)}", start, "ours"
            )


def _check_movable(kernel: Kernel, displacement: Displacement) -> int:
    # Checks each instruction; how many there are, padding left out.
    code = displacement.original
    count = 0
    for instruction in Decoder(_BITS, code, ip=displacement.address):
        count += 1
        start = instruction.ip - displacement.address
        text = code[start : start + instruction.len]
        reason = _not_movable(instruction)
        if instruction.next_ip != displacement.resume and _is_call(instruction):
            # It returns right behind itself, where the jump is.
            reason = "a call that is not the last displaced instruction"
        if text == FTRACE_NOP and len(code) > len(text):
            reason = "a 5-byte NOP, which ftrace may patch, behind a shorter instruction"
        if text[0] == _DS_PREFIX and _is_uniprocessor(kernel):
            reason = "a lock prefix that the kernel puts back when it gets a second CPU"
        if reason:
            raise CannotDisplace(
                f"{reason}: '{format_instruction(instruction)}'", instruction.ip, "instruction"
            )
        _check_named(kernel, instruction)
        if instruction.flow_control in FLOW_ENDS:
            break
    return count


def _is_call(instruction: Instruction) -> bool:
    return bool(instruction.is_call_near or instruction.is_call_near_indirect)


def _not_movable(instruction: Instruction) -> str | None:
    flow = instruction.flow_control
    if flow in _TRAPS:
        return "the kernel looks this instruction up by its address"
    if flow in (FlowControl.CALL, FlowControl.INDIRECT_CALL) and not _is_call(instruction):
        return "an instruction that depends on its address"
    if flow == FlowControl.RETURN and instruction.mnemonic != Mnemonic.RET:
        return "a return to another privilege level"
    if flow in (FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH) and (
        instruction.is_jmp_far or instruction.is_jmp_far_indirect
    ):
        return "a far jump"
    if instruction.mnemonic == Mnemonic.STI or (
        instruction.op_count
        and instruction.op0_kind == OpKind.REGISTER
        and instruction.op0_register == Reg.SS
    ):
        return "interrupts stay off for the instruction behind it"
    if flow == FlowControl.INDIRECT_CALL and instruction.memory_base in (Reg.RSP, Reg.ESP):
        return "a call through the stack"
    if instruction.is_ip_rel_memory_operand and instruction.memory_base == Reg.EIP:
        return "a 32-bit distance"
    return None


def _check_named(kernel: Kernel, instruction: Instruction) -> None:
    # What the instruction names by its distance: a branch target or a rip-relative operand.
    target = branch_target(instruction)
    if target is not None and not is_kernel_code(kernel, target):
        raise CannotDisplace(
            f"already patched by ftrace, kprobes or another tool: it goes to {target:#x}",
            instruction.ip,
            "patched",
        )
    if _is_call(instruction) and target in map(kernel.object_address, _FTRACE_CALLS):
        raise CannotDisplace(
            "already patched by ftrace: a tracer of the guest's is on it", instruction.ip, "patched"
        )
    named = instruction.ip_rel_memory_address if instruction.is_ip_rel_memory_operand else None
    # Per-CPU variables are named by small offsets from 0, where the address space comes round.
    if named is not None and _HALF <= named < _TOP:
        raise CannotDisplace(
            f"out of reach of a probe's code: '{format_instruction(instruction)}'",
            instruction.ip,
            "reach",
        )


def _is_uniprocessor(kernel: Kernel) -> bool:
    # alternatives_enable_smp() in arch/x86/kernel/alternative.c
    address = kernel.object_address("uniproc_patched")
    return address is not None and kernel.memory.read(address, 1) != b"\0"
