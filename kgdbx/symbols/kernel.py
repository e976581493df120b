"""A running kernel with its names and types: what probes, commands and scripts ask."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import drgn

from kgdbx.errors import MemoryFault, SymbolError
from kgdbx.symbols.elf import ElfSymbols, Symbol, near_names, read_symbols
from kgdbx.symbols.inlines import InlineSites, inlined_instances
from kgdbx.symbols.kaslr import check_build_id, find_slide, run_to_kernel_entry
from kgdbx.symbols.memory import KernelMemory
from kgdbx.symbols.modules import LoadedModule, Modules
from kgdbx.symbols.program import make_program
from kgdbx.symbols.tasks import CurrentTask
from kgdbx.target.base import Target

__all__ = ("Function", "Kernel")

_PANIC_CPU_INVALID = b"\xff\xff\xff\xff"  # include/linux/panic.h
_MODULE_ALIASES = ("init_module", "cleanup_module")  # include/linux/module.h, of other names
_PERCPU_END = 1 << 32  # per-CPU symbols are offsets and do not move with KASLR


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of the running kernel or of a loaded module.

    :ivar address: guest-virtual address of its first instruction
    :ivar size_bytes: length of its code
    :ivar module: the module it is in, or None
    """

    name: str
    address: int
    size_bytes: int
    module: LoadedModule | None = None

    @property
    def qualified_name(self) -> str:
        """``module:name``, or the name alone for vmlinux."""
        return f"{self.module.name}:{self.name}" if self.module else self.name


class Kernel:
    """Names, types and memory of a kernel.

    :param target: a stopped target
    :param vmlinux: the kernel's file with debug information
    :param slide: KASLR slide in bytes
    :param debug_modules: directory with the debug files of its modules
    :param ram_end: guest-physical end of RAM; 0 if unknown
    :ivar true_stacks: a context in which every return address on the stacks is the true one
    """

    def __init__(
        self,
        target: Target,
        vmlinux: ElfSymbols,
        slide: int,
        *,
        debug_modules: Path | None = None,
        ram_end: int = 0,
    ) -> None:
        self.target = target
        self.vmlinux = vmlinux
        self.slide = slide
        self._ram_end = ram_end
        self._debug_modules = debug_modules
        self._module_types: dict[str, drgn.Type] = {}
        self.memory = KernelMemory(target, vmlinux, slide)
        self.memory.attach(ram_end)
        self.true_stacks: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    @classmethod
    def attach(
        cls,
        target: Target,
        vmlinux: Path,
        *,
        debug_modules: Path | None = None,
        ram_end: int = 0,
        boot_timeout_s: float = 60.0,
    ) -> "Kernel":
        """Find the kernel in a target. A VM that was started frozen is run to its first C code.

        :raises BuildIdMismatch: if *vmlinux* is not the file of the running kernel
        :raises SymbolError: if no kernel starts in time
        """
        symbols = read_symbols(vmlinux)
        slide = find_slide(target, symbols)
        if slide is None:
            slide = run_to_kernel_entry(target, symbols, boot_timeout_s)
        check_build_id(target, symbols, slide)
        return cls(target, symbols, slide, debug_modules=debug_modules, ram_end=ram_end)

    @functools.cached_property
    def program(self) -> drgn.Program:
        """The drgn program of this kernel."""
        return make_program(self.target, self.memory, self.vmlinux, self.slide)

    @functools.cached_property
    def modules(self) -> Modules:
        """The loaded modules."""
        return Modules(self.program, self.memory, self._debug_modules)

    @functools.cached_property
    def current(self) -> CurrentTask:
        """Tasks on vCPUs."""
        return CurrentTask(self.program, self.memory, self.vmlinux)

    def stopped(self) -> None:
        """Note a stop: an early kernel may have set up its final page tables since the last."""
        if not self.memory.booted:
            self.memory.attach(self._ram_end)

    @property
    def panicked(self) -> bool:
        """Whether a CPU has called ``panic()``: ``panic_cpu`` of kernel/panic.c is set there.

        Linux kernel commit 1717f2096b54 ("panic, x86: Fix re-entrance problem due to panic on
        NMI") (in v4.5); an older kernel never says so, nor one without its final page tables.
        """
        address = self._panic_cpu if self.memory.booted else None
        return address is not None and self.memory.read(address, 4) != _PANIC_CPU_INVALID

    @functools.cached_property
    def _panic_cpu(self) -> int | None:
        try:
            return self.address("panic_cpu")
        except SymbolError:
            return None

    def address(self, name: str) -> int:
        """Running address of a symbol of vmlinux.

        :raises SymbolError: if there is none, with the nearest names
        """
        return self._slid(self.vmlinux.address(name))

    def functions(self, name: str, module: LoadedModule | None = None) -> tuple[Function, ...]:
        """All functions of exactly this name.

        :param module: look in this module only; None looks in vmlinux, then in all modules
        :raises SymbolError: if there is none: with clones and nearest names
        """
        if module is not None:
            found = self._in_module(module, name)
            if not found:
                names = tuple(s.name for s in self.modules.symbols(module) if s.is_function)
                raise _no_function(f"{module.name}:{name}", name, names)
            return found
        found = tuple(
            Function(name, self._slid(s.address), self._size(s))
            for s in self.vmlinux.lookup(name)
            if _is_code(s)
        )
        if not found:
            found = tuple(f for loaded in self.modules for f in self._in_module(loaded, name))
        if not found:
            raise _no_function(name, name, self.vmlinux.function_names)
        return found

    def function_at(self, address: int) -> Function | None:
        """The function that contains an address."""
        link = address - self.slide
        if self.vmlinux.address("_text") <= link < self.vmlinux.address("_end"):
            symbol = self.vmlinux.containing(link)
            if symbol is None or not _is_code(symbol):
                return None
            return Function(symbol.name, self._slid(symbol.address), self._size(symbol))
        loaded = self.modules.containing(address)
        if loaded is None:
            return None
        return self._module_function_at(loaded, address)

    def symbolize(self, address: int) -> str:
        """``func+0x1c/0x30 [module]`` as the kernel prints it; hex if nothing is there."""
        function = self.function_at(address)
        if function is None:
            return f"{address:#x}"
        text = f"{function.name}+{address - function.address:#x}/{function.size_bytes:#x}"
        return f"{text} [{function.module.name}]" if function.module else text

    def object_address(self, name: str) -> int | None:
        """Running address of any symbol, per-CPU ones as offsets; None if there is none."""
        found = self.vmlinux.lookup(name)
        return self._slid(found[0].address) if found else None

    def function_type(self, function: Function) -> drgn.Type | None:
        """C type of a function by its debug information; None if it has none there.

        An alias has the type of its function. A clone (``.isra.0``) has none: its parameters are
        not those of the source. Nor has assembler: its debug information says that the type is
        not specified.
        """
        if "." in function.name or not self.vmlinux.has_debug_info:
            return None
        if function.module is not None and not self.modules.load_debug_info(function.module):
            return None
        try:
            found = self.program.function(function.name)
            if found.address_ != function.address:
                location = self.program.source_location(function.address)[-1]
                found = self.program.function(function.name, location.filename)
        except (LookupError, drgn.BadDataError):
            if function.module is None:
                return self._type_of_alias(function)
            # Of a module that was loaded again, drgn knows the first place only.
            return self._module_types.get(function.qualified_name)
        if function.module is not None:
            self._module_types[function.qualified_name] = found.type_
        return found.type_

    def _type_of_alias(self, function: Function) -> drgn.Type | None:
        # Debug information has one name only of a function of several: __x64_sys_getpid() is
        # __do_sys_getpid().
        try:
            here = self.program.source_location(function.address)[-1]
            found = self.program.function(here.name(), here.filename)
        except (LookupError, drgn.BadDataError):
            return None
        return found.type_ if found.address_ == function.address else None

    def inlined_instances(self, name: str, timeout_s: float) -> InlineSites:
        """Where a function of vmlinux was inlined.

        :param timeout_s: stop searching after this many seconds
        :raises SymbolError: if there is no function of this name
        """
        return inlined_instances(self.vmlinux.path, name, timeout_s)

    def read_code(self, address: int, size_bytes: int) -> bytes:
        """Live bytes of code: alternatives, jump labels and ftrace have rewritten the file's.

        :return: fewer bytes if the following page is not mapped
        :raises MemoryFault: if nothing is mapped at *address*
        """
        try:
            return self.memory.read(address, size_bytes)
        except MemoryFault:
            return self.memory.read(address, min(size_bytes, 0x1000 - (address & 0xFFF)))

    def _slid(self, address: int) -> int:
        return address if address < _PERCPU_END else address + self.slide

    def _size(self, symbol: Symbol) -> int:
        if symbol.size_bytes:
            return symbol.size_bytes
        following = self.vmlinux.next_address(symbol.address)
        return following - symbol.address if following else 0

    def _in_module(self, loaded: LoadedModule, name: str) -> tuple[Function, ...]:
        return tuple(
            Function(name, s.address, s.size_bytes, loaded)
            for s in self.modules.symbols(loaded)
            if s.is_function and s.name == name
        )

    def _module_function_at(self, loaded: LoadedModule, address: int) -> Function | None:
        best = max(
            (s for s in self.modules.symbols(loaded) if s.is_function and s.address <= address),
            key=lambda s: (s.address, s.name not in _MODULE_ALIASES),
            default=None,
        )
        if best is None or address >= best.address + max(best.size_bytes, 1):
            return None
        return Function(best.name, best.address, best.size_bytes, loaded)


def _is_code(symbol: Symbol) -> bool:
    # Assembler's entry points need not be marked as functions.
    return symbol.is_function or "text" in symbol.section


def _no_function(shown: str, name: str, names: tuple[str, ...]) -> SymbolError:
    clones = tuple(n for n in names if n.startswith(name + "."))
    if clones:
        message = f"no function {shown!r}; the compiler made clones of it: {', '.join(clones)}"
        return SymbolError(message, symbol=name, candidates=clones)
    near = near_names(name, names)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return SymbolError(f"no function {shown!r}{hint}", symbol=name, candidates=near)
