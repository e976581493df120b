"""Whether code besides the first byte of a range can be jumped to: ``can_optimize()`` of kprobes.

What runs now is decoded, not what vmlinux has: alternatives, static keys and ftrace rewrite it.
"""

from collections.abc import Iterator, Mapping

from iced_x86 import Code, Decoder, FlowControl, Instruction

from kgdbx.arch.instruction import branch_target
from kgdbx.errors import MemoryFault, SymbolError
from kgdbx.resident.place.displacement import FLOW_ENDS, CannotDisplace, Displacement
from kgdbx.symbols.kernel import Function, Kernel
from kgdbx.symbols.text_tables import TextTables

__all__ = ("check_flow", "is_kernel_code", "live_code")

_BITS = 64
_COLD = ".cold"  # gcc's suffix for the part of a function that it moves away from the rest
_PREFIX_SYMBOL = "__pfx_"  # objtool's name for the padding before a function
_ENDBR_BYTES = 4


def live_code(kernel: Kernel, address: int, size_bytes: int, patched: Mapping[int, bytes]) -> bytes:
    """Code as it is in memory, without our own patches.

    :param patched: original bytes by address of what we patched
    :return: fewer bytes if the following page is not mapped
    :raises CannotDisplace: if nothing is mapped at *address*
    """
    try:
        code = kernel.read_code(address, size_bytes)
    except MemoryFault as e:
        raise CannotDisplace("not mapped", address, "not mapped") from e
    end = address + len(code)
    for start, original in patched.items():
        if start < end and address < start + len(original):
            low, high = max(start, address), min(start + len(original), end)
            own = original[low - start : high - start]
            code = code[: low - address] + own + code[high - address :]
    return code


def is_kernel_code(kernel: Kernel, address: int) -> bool:
    """Whether an address lies in the kernel image or in a module, not in generated code."""
    if kernel.address("_text") <= address < kernel.address("_end"):
        return True
    return kernel.modules.containing(address) is not None


def check_flow(
    kernel: Kernel,
    function: Function,
    displacement: Displacement,
    tables: TextTables,
    patched: Mapping[int, bytes],
    *,
    single: bool,
) -> None:
    """Check that an instruction starts where the jump goes, and that nothing jumps behind it.

    :param single: one instruction is displaced, so that only its start can be a target
    :raises CannotDisplace: if that is not so, or cannot be known
    """
    if not single:
        _check_compiled(kernel, function)
    parts = _parts(kernel, function, tables)
    starts: set[int] = set()
    left: set[int] = set()  # targets outside of the function
    for part in parts:
        for instruction in _instructions(kernel, part, patched):
            if part is function:
                starts.add(instruction.ip)
            if instruction.flow_control == FlowControl.NEXT:
                continue
            target = branch_target(instruction)
            if target is None:
                if instruction.flow_control == FlowControl.INDIRECT_BRANCH and not single:
                    _check_indirect(kernel, instruction)
            elif displacement.address < target < displacement.resume:
                raise CannotDisplace(
                    f"{kernel.symbolize(instruction.ip)} jumps into the displaced instructions",
                    instruction.ip,
                    "jump target",
                )
            elif instruction.flow_control != FlowControl.CALL and not _inside(parts, target):
                left.add(target)
    if displacement.address not in starts:
        raise CannotDisplace("no instruction starts here", displacement.address, "boundary")
    for target in left:
        _check_leaving(kernel, target, single)
    if not single:
        _check_fixups(parts, tables, function)


def _check_compiled(kernel: Kernel, function: Function) -> None:
    # A clone has no type of its own, but only a compiler makes clones.
    try:
        known = "." in function.name or kernel.function_type(function) is not None
    except SymbolError:
        known = False
    if not known:
        raise CannotDisplace(
            "no debug information says that it is C; in assembler any other function may jump "
            "behind its first instruction",
            function.address,
            "assembler",
        )


def _parts(kernel: Kernel, function: Function, tables: TextTables) -> list[Function]:
    # The function and what gcc split off it; of all functions of its name, which does no harm.
    base = function.name.partition(_COLD)[0]
    if function.module is not None:
        symbols = [
            symbol
            for symbol in kernel.modules.symbols(function.module)
            if symbol.name == base or symbol.name.startswith(base + _COLD)
        ]
        slide = 0
    else:
        names = (base, *tables.cold_parts(base))
        symbols = [symbol for name in names for symbol in kernel.vmlinux.lookup(name)]
        slide = kernel.slide
    others = (
        Function(symbol.name, symbol.address + slide, symbol.size_bytes, function.module)
        for symbol in symbols
        # data may have the name, too, and code in memory that was freed after boot
        if symbol.is_function and not symbol.section.startswith((".init", ".exit"))
    )
    return [function, *(part for part in others if part.address != function.address)]


def _instructions(
    kernel: Kernel, part: Function, patched: Mapping[int, bytes]
) -> Iterator[Instruction]:
    code = live_code(kernel, part.address, part.size_bytes, patched)
    if len(code) < part.size_bytes:
        raise CannotDisplace("its code is not mapped as a whole", part.address, "not mapped")
    ended = False
    for instruction in Decoder(_BITS, code, ip=part.address):
        if instruction.is_invalid:
            raise CannotDisplace(
                f"its code cannot be decoded at {kernel.symbolize(instruction.ip)}",
                instruction.ip,
                "not decoded",
            )
        if instruction.code == Code.INT3:
            # Behind the end of a block it is padding against speculation; elsewhere it hides an
            # instruction, and what follows may not be decoded as it runs.
            if not ended:
                raise CannotDisplace(
                    f"an int3 is at {kernel.symbolize(instruction.ip)}: a kprobe, or a debugger's "
                    "breakpoint",
                    instruction.ip,
                    "int3",
                )
            continue
        ended = instruction.flow_control in FLOW_ENDS
        yield instruction


def _inside(parts: list[Function], address: int) -> bool:
    return any(part.address <= address < part.address + part.size_bytes for part in parts)


def _check_indirect(kernel: Kernel, instruction: Instruction) -> None:
    # With retpolines the kernel is built with -fno-jump-tables, so that an indirect jump leaves.
    if not kernel.vmlinux.lookup("__x86_indirect_thunk_rax"):
        raise CannotDisplace(
            f"the indirect jump at {kernel.symbolize(instruction.ip)} may go anywhere in it",
            instruction.ip,
            "indirect jump",
        )


def _check_leaving(kernel: Kernel, target: int, single: bool) -> None:
    if not is_kernel_code(kernel, target):
        raise CannotDisplace(
            f"it jumps to {target:#x}, which is no code of the kernel: an optimized kprobe, or "
            "another tool's patch",
            target,
            "patched",
        )
    if single:
        return
    # A tail call goes to the start of a function; else it is code that was moved out of line and
    # comes back, such as the static_cpu_has() of older kernels.
    other = kernel.function_at(target)
    if other is not None and (
        target in (other.address, other.address + _ENDBR_BYTES)
        or other.name.startswith(_PREFIX_SYMBOL)
    ):
        return
    raise CannotDisplace(
        f"it jumps to {kernel.symbolize(target)}, which may jump back behind its first instruction",
        target,
        "out of line",
    )


def _check_fixups(parts: list[Function], tables: TextTables, function: Function) -> None:
    # Before v5.16 what is done after a fault lay in a section of its own, .fixup, and jumped back.
    known = tables.of(function.module)
    for part in parts:
        for fixup in known.fixups_of(part.address, part.address + part.size_bytes):
            if not _inside(parts, fixup):
                raise CannotDisplace(
                    f"after a fault it goes on at {fixup:#x}, which may jump back behind its first "
                    "instruction",
                    fixup,
                    "out of line",
                )
