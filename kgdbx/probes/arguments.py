"""Typed values of a function's parameters and of its result, as drgn objects."""

import errno
from collections.abc import Callable

import drgn

from kgdbx.arch.calling import Parameter, ParameterKind, locate_parameters
from kgdbx.errors import MemoryFault, ProbeError
from kgdbx.probes.probe import Hit, Point
from kgdbx.symbols.kernel import Kernel

__all__ = ("argument_suppliers", "return_value_supplier")

_INTEGERS = (drgn.TypeKind.INT, drgn.TypeKind.BOOL, drgn.TypeKind.ENUM, drgn.TypeKind.POINTER)
_AGGREGATES = (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS)


def argument_suppliers(kernel: Kernel, point: Point) -> dict[str, Callable[[Hit], drgn.Object]]:
    """A getter for each parameter that can be named at a point.

    At the entry of a function they come from the registers and the stack that the calling
    convention says. Elsewhere, and for clones and inlined copies, the debug information tells
    where they are; one that the compiler optimised out is an absent object.

    :return: by name, in order; empty if there is no debug information
    """
    type_ = kernel.function_type(point.function)
    if point.is_entry and type_ is not None:
        return _entry_suppliers(kernel, type_)
    if type_ is not None and point.inlined is None:
        names = [p.name for p in type_.parameters if p.name]
    else:
        names = _frame_parameters(kernel, point)
    return {name: _frame_supplier(name) for name in names}


def return_value_supplier(kernel: Kernel, point: Point) -> Callable[[Hit], drgn.Object | None]:
    """A getter for what a function returns: None for ``void``, an ``unsigned long`` if the type
    is not known.
    """
    program = kernel.program
    type_ = kernel.function_type(point.function)
    result = type_.type if type_ is not None else program.type("unsigned long")
    kind = _bare(result).kind
    if kind is drgn.TypeKind.VOID:
        return lambda hit: None
    if kind in _AGGREGATES:
        size = drgn.sizeof(result)
        if size <= 16:
            return lambda hit: drgn.Object.from_bytes_(
                program,
                result,
                (hit.regs.rax | hit.regs.rdx << 64).to_bytes(16, "little")[:size],
            )
        return lambda hit: drgn.Object(program, result, address=hit.regs.rax)
    return lambda hit: _scalar(program, result, hit.regs.rax)


def _entry_suppliers(kernel: Kernel, type_: drgn.Type) -> dict[str, Callable[[Hit], drgn.Object]]:
    program = kernel.program
    result = _bare(type_.type)
    in_memory = result.kind in _AGGREGATES and drgn.sizeof(result) > 16
    parameters = [_abi_parameter(p.type) for p in type_.parameters]
    suppliers: dict[str, Callable[[Hit], drgn.Object]] = {}
    for parameter, location in zip(
        type_.parameters, locate_parameters(parameters, returns_memory=in_memory), strict=True
    ):
        if not parameter.name or location is None:
            continue
        declared = parameter.type
        if location.stack_offset_bytes is not None:
            suppliers[parameter.name] = _on_stack(program, declared, location.stack_offset_bytes)
        elif len(location.registers) == 1 and _bare(declared).kind in _INTEGERS:
            suppliers[parameter.name] = _in_register(program, declared, location.registers[0])
        else:
            suppliers[parameter.name] = _in_registers(program, declared, location.registers)
    return suppliers


def _in_register(
    program: drgn.Program, type_: drgn.Type, register: str
) -> Callable[[Hit], drgn.Object]:
    return lambda hit: _scalar(program, type_, hit.regs[register])


def _in_registers(
    program: drgn.Program, type_: drgn.Type, registers: tuple[str, ...]
) -> Callable[[Hit], drgn.Object]:
    def supply(hit: Hit) -> drgn.Object:
        raw = b"".join(hit.regs[name].to_bytes(8, "little") for name in registers)
        return drgn.Object.from_bytes_(program, type_, raw[: drgn.sizeof(type_)])

    return supply


def _on_stack(
    program: drgn.Program, type_: drgn.Type, offset_bytes: int
) -> Callable[[Hit], drgn.Object]:
    return lambda hit: drgn.Object(program, type_, address=hit.regs.rsp + offset_bytes)


def _frame_supplier(name: str) -> Callable[[Hit], drgn.Object]:
    def supply(hit: Hit) -> drgn.Object:
        try:
            return hit.stack_trace()[0][name]
        except (KeyError, LookupError) as e:
            raise ProbeError(
                f"no variable {name!r} at {hit.kernel.symbolize(hit.address)}", errno.ENOENT
            ) from e
        except drgn.FaultError as e:
            raise MemoryFault(e.address, 8) from e

    return supply


def _frame_parameters(kernel: Kernel, point: Point) -> list[str]:
    # What an inlined copy or a clone can be asked for: the parameters of the source function.
    name = point.inlined or point.function.name.partition(".")[0]
    if not kernel.vmlinux.has_debug_info:
        return []
    try:
        function = kernel.program.function(name)
    except (LookupError, drgn.BadDataError):
        return []
    return [p.name for p in function.type_.parameters if p.name]


def _scalar(program: drgn.Program, type_: drgn.Type, value: int) -> drgn.Object:
    bits = 8 * drgn.sizeof(type_)
    value &= (1 << bits) - 1
    bare = _bare(type_)
    if bare.kind is drgn.TypeKind.BOOL:
        return drgn.Object(program, type_, value=bool(value & 1))
    signed = bare.kind is drgn.TypeKind.INT and bare.is_signed
    if bare.kind is drgn.TypeKind.ENUM and bare.type is not None:
        signed = bare.type.is_signed
    if signed:
        value -= value >> (bits - 1) << bits
    return drgn.Object(program, type_, value=value)


def _abi_parameter(type_: drgn.Type) -> Parameter:
    bare = _bare(type_)
    if bare.kind is drgn.TypeKind.FLOAT:
        return Parameter(drgn.sizeof(bare), ParameterKind.FLOAT)
    if bare.kind in _AGGREGATES:
        return Parameter(drgn.sizeof(bare), ParameterKind.STRUCT)
    if bare.kind in _INTEGERS:
        size = drgn.sizeof(bare)
        return Parameter(size, alignment_bytes=16 if size == 16 else 8)
    return Parameter(8)  # arrays and functions decay to pointers


def _bare(type_: drgn.Type) -> drgn.Type:
    while type_.kind is drgn.TypeKind.TYPEDEF:
        type_ = type_.type
    return type_
