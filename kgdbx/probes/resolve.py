"""From the text of a probe's place to the addresses that it means in the running kernel."""

import errno

from kgdbx.arch.instruction import MAX_INSTRUCTION_BYTES, decode_all
from kgdbx.errors import MemoryFault, ProbeError, SymbolError
from kgdbx.probes.definition import ProbeDefinition, parse_definition
from kgdbx.probes.probe import Point
from kgdbx.symbols.elf import near_names, read_symbols
from kgdbx.symbols.kernel import Function, Kernel
from kgdbx.symbols.lines import line_addresses
from kgdbx.symbols.modules import LoadedModule

__all__ = ("parse_place", "resolve_points")

_INLINE_SEARCH_S = 20.0
_SYSTEM_FREEING_INITMEM = 2  # enum system_states, include/linux/kernel.h


def parse_place(where: str | int) -> ProbeDefinition:
    """Read ``[module:]function[+offset]``, ``function:line`` or an address.

    :raises DefinitionError: if it is none of these
    """
    place = parse_definition(f"p {where:#x}" if isinstance(where, int) else f"p {where}")
    if place.fields or place.condition:
        raise ProbeError(f"{where!r} is more than a place; give fields in a probe definition")
    return place


def resolve_points(
    kernel: Kernel, place: ProbeDefinition, *, module: LoadedModule | None, inlined: bool
) -> tuple[tuple[Point, ...] | None, tuple[str, ...]]:
    """The addresses of a place, and remarks for the user.

    :param module: the module that the place names, if it is loaded
    :param inlined: take the inlined copies of the function too
    :return: None for a module that is not loaded yet
    :raises ProbeError: ENOENT for an unknown function, EADDRNOTAVAIL for several of one name
        (as the kernel since v6.7), EINVAL for an address outside of code or inside an instruction
    """
    if place.address is not None:
        return (_at_address(kernel, place.address),), ()
    assert place.function is not None
    if place.module and module is None:
        return None, _pending_notes(kernel, place.module, place.function)
    copies: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    if inlined and not place.offset_bytes and place.line is None:
        copies, notes = _inlined_copies(kernel, place)
    try:
        functions = kernel.functions(place.function, module)
    except SymbolError as e:
        if copies:
            return copies, notes
        if inlined or not _inlined_copies(kernel, place)[0]:
            raise ProbeError(f"cannot probe: {e}", errno.ENOENT) from e
        raise ProbeError(
            f"{place.function!r} is inlined everywhere: it has no entry and no return of its own; "
            "use a kprobe, which covers every inlined copy",
            errno.EINVAL,
        ) from e
    if len(functions) > 1:
        raise ProbeError(_ambiguous(kernel, place.function, functions), errno.EADDRNOTAVAIL)
    function = functions[0]
    _check_not_freed(kernel, function)
    if place.line is not None:
        return _at_line(kernel, function, place.line)
    if place.offset_bytes:
        return (_at_offset(kernel, function, place.offset_bytes),), ()
    return (Point(function.address, function), *copies), notes


def _at_address(kernel: Kernel, address: int) -> Point:
    function = kernel.function_at(address)
    if function is None:
        raise ProbeError(
            f"{address:#x} is not in the code of the kernel or a loaded module; with KASLR "
            "addresses change at each boot: give function+offset",
            errno.EINVAL,
        )
    _check_not_freed(kernel, function)
    return _checked_boundary(kernel, function, address)


def _at_offset(kernel: Kernel, function: Function, offset_bytes: int) -> Point:
    if not 0 <= offset_bytes < max(function.size_bytes, 1):
        raise ProbeError(
            f"{function.qualified_name} is {function.size_bytes:#x} bytes long; offset "
            f"{offset_bytes:#x} is outside of it",
            errno.EINVAL,
        )
    return _checked_boundary(kernel, function, function.address + offset_bytes)


def _checked_boundary(kernel: Kernel, function: Function, address: int) -> Point:
    offset = address - function.address
    if offset:
        code = kernel.read_code(function.address, offset + MAX_INSTRUCTION_BYTES)
        start = _instruction_start(code, function.address, address)
        if start != address:
            raise ProbeError(
                f"{function.qualified_name}+{offset:#x} is inside the instruction that starts at "
                f"{function.qualified_name}+{start - function.address:#x}; probe that one",
                errno.EINVAL,
            )
    else:
        try:
            kernel.read_code(address, 1)
        except MemoryFault as e:
            raise ProbeError(f"{function.qualified_name} is not mapped", errno.EINVAL) from e
    return Point(address, function)


def _instruction_start(code: bytes, start: int, address: int) -> int:
    # Where the instruction that holds an address starts, counted from the function's first.
    last = start
    for instruction in decode_all(code, start):
        if instruction.ip > address:
            break
        last = instruction.ip
        if last == address:
            break
    return last


def _at_line(
    kernel: Kernel, function: Function, line: int
) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    if function.module is not None:
        raise ProbeError("lines in modules are not supported; give function+offset")
    low = function.address - kernel.slide
    try:
        found = line_addresses(kernel.vmlinux.path, low, line)
    except SymbolError as e:
        raise ProbeError(str(e), errno.EINVAL) from e
    notes: tuple[str, ...] = ()
    if found.line != line:
        notes = (f"line {line} of {function.name} has no code; using line {found.line}",)
    # The first one only, as perf probe and gdb do for one function: where the line begins.
    return (Point(found.addresses[0] + kernel.slide, function),), notes


def _inlined_copies(
    kernel: Kernel, place: ProbeDefinition
) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    if place.module or not kernel.vmlinux.has_debug_info:
        return (), ()
    assert place.function is not None
    try:
        sites = kernel.inlined_instances(place.function, _INLINE_SEARCH_S)
    except SymbolError:
        return (), ()  # whether there is such a function at all, the symbol table tells
    points: list[Point] = []
    freed = 0
    booted = _init_freed(kernel)
    for instance in sites.sites:
        symbol = kernel.vmlinux.containing(instance.address)
        if symbol is None or not symbol.is_function:
            continue
        if booted and symbol.section.startswith((".init", ".exit")):
            freed += 1
            continue
        function = kernel.function_at(instance.address + kernel.slide)
        if function is not None:
            point = Point(instance.address + kernel.slide, function, place.function)
            points.append(point)
    unique = tuple({p.address: p for p in points}.values())
    notes: list[str] = []
    if unique:
        notes.append(f"{place.function} is inlined in {len(unique)} places, all of them probed")
    if freed:
        notes.append(f"{freed} more were in init code that is freed")
    if sites.truncated:
        notes.append("the search for inlined copies ran out of time: there may be more")
    return unique, tuple(notes)


def _check_not_freed(kernel: Kernel, function: Function) -> None:
    if function.module is not None:
        return
    symbol = kernel.vmlinux.containing(function.address - kernel.slide)
    if symbol and symbol.section.startswith((".init", ".exit")) and _init_freed(kernel):
        raise ProbeError(
            f"{function.name} is in {symbol.section}, which the kernel freed when it had booted; "
            "start the VM frozen (kgdbx vm run --frozen) and probe it before",
            errno.ENOENT,
        )


def _init_freed(kernel: Kernel) -> bool:
    return kernel.memory.read_u32(kernel.address("system_state")) >= _SYSTEM_FREEING_INITMEM


def _ambiguous(kernel: Kernel, name: str, functions: tuple[Function, ...]) -> str:
    lines = [f"{name!r} is {len(functions)} functions; give the address of one:"]
    for function in functions:
        try:
            source = str(kernel.program.source_location(function.address)[-1])
        except LookupError:
            source = "?"
        lines.append(f"  {function.address:#x} {function.qualified_name} {source}")
    return "\n".join(lines)


def _pending_notes(kernel: Kernel, module: str, function: str) -> tuple[str, ...]:
    path = kernel.modules.debug_file(module)
    if path is None:
        return (f"module {module!r} is not loaded, and there is no file of that name",)
    elf = read_symbols(path)
    if not any(s.is_function for s in elf.lookup(function)):
        near = ", ".join(near_names(function, elf.function_names)) or "none"
        raise ProbeError(
            f"module {module!r} has no function {function!r}; nearest: {near}", errno.ENOENT
        )
    return (f"waits for module {module!r} to be loaded",)
