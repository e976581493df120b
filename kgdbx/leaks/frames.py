"""Stacks with names: of modules whose code may be gone when somebody asks for its lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kgdbx.errors import KgdbxError
from kgdbx.symbols.dwarf import DebugFile
from kgdbx.symbols.elf import read_symbols
from kgdbx.symbols.file_cache import cached_by_file
from kgdbx.symbols.kernel import Function, Kernel
from kgdbx.symbols.lines import offset_lines
from kgdbx.symbols.modules import LoadedModule

__all__ = ("Frame", "FrameNames")


@dataclass(frozen=True)
class Frame:
    """One entry of a stack, named while its code was there.

    :ivar address: where the call returns to
    :ivar function: empty if nothing is known
    :ivar offset: in the function
    :ivar size_bytes: of the function
    :ivar module: empty for the kernel itself
    :ivar section: of the module's file, with *section_offset*; empty for the kernel itself
    """

    address: int
    function: str = ""
    offset: int = 0
    size_bytes: int = 0
    module: str = ""
    section: str = ""
    section_offset: int = 0

    @property
    def text(self) -> str:
        """``function+0xoff/0xlen [module]``, as the kernel prints it."""
        if not self.function:
            return f"{self.address:#x}"
        text = f"{self.function}+{self.offset:#x}/{self.size_bytes:#x}"
        return f"{text} [{self.module}]" if self.module else text


class FrameNames:
    """Names the addresses of stacks, and finds their source lines later."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._frames: dict[int, Frame] = {}
        self._init: dict[str, tuple[Function, ...]] = {}
        self._files: dict[str, Path] = {}
        self._lines: dict[Frame, tuple[str, int] | None] = {}

    def name(self, addresses: Sequence[int]) -> tuple[Frame, ...]:
        """Frames of a stack; the first is the address of a function, the others return to it."""
        return tuple(
            self._frames.get(address) or self._name(address, 0 if n == 0 else 1)
            for n, address in enumerate(addresses)
        )

    def forget_init(self, module: LoadedModule) -> None:
        """Forget init code that lay where another module is being loaded now."""
        for name, functions in self._init.items():
            self._init[name] = tuple(f for f in functions if not module.contains(f.address))

    def remember_init(self, module: LoadedModule) -> None:
        """Know a module's init code: its symbols go before what it did has been read.

        ``do_init_module()`` of kernel/module/main.c takes them away when init has returned.
        """
        found = (
            self._kernel.function_at(symbol.address)
            for symbol in self._kernel.modules.symbols(module)
            if symbol.is_function and module.in_init(symbol.address)
        )
        self._init[module.name] = tuple(function for function in found if function is not None)

    def forget(self) -> None:
        """Code has come or gone: addresses may mean something else. Frames stay as they are."""
        self._frames.clear()

    def line(self, frame: Frame) -> tuple[str, int] | None:
        """Source file and 1-based line of the call; None if the debug information is missing."""
        if frame not in self._lines:
            try:
                self._lines[frame] = self._line(frame)
            except KgdbxError:
                self._lines[frame] = None
        return self._lines[frame]

    def _name(self, address: int, back: int) -> Frame:
        # A call may be the last instruction of its function: look before where it returns to.
        function = self._kernel.function_at(address - back) or self._in_init(address - back)
        if function is None:
            frame = Frame(address)
        else:
            section, offset = self._in_file(function, address)
            frame = Frame(
                address,
                function.name,
                address - function.address,
                function.size_bytes,
                function.module.name if function.module else "",
                section,
                offset,
            )
        self._frames[address] = frame
        return frame

    def _in_init(self, address: int) -> Function | None:
        for function in (f for functions in self._init.values() for f in functions):
            if function.address <= address < function.address + function.size_bytes:
                return function
        return None

    def _in_file(self, function: Function, address: int) -> tuple[str, int]:
        if function.module is None:
            return "", 0
        path = self._kernel.modules.debug_file(function.module.name)
        if path is None:
            return "", 0
        self._files[function.module.name] = path
        found = [s for s in read_symbols(path).lookup(function.name) if s.section]
        if len(found) != 1:
            return "", 0
        return found[0].section, found[0].address + address - function.address

    def _line(self, frame: Frame) -> tuple[str, int] | None:
        # In a macro's or a header's inline function nobody looks for what went wrong.
        lines = self._all_lines(frame)
        own = (line for line in lines if not line[0].endswith(".h"))
        return next(own, lines[0] if lines else None)

    def _all_lines(self, frame: Frame) -> tuple[tuple[str, int], ...]:
        if not frame.function:
            return ()
        if frame.module:
            if not frame.section:
                return ()
            debug = _debug(self._files[frame.module])
            return offset_lines(debug, frame.section, frame.section_offset - 1)
        back = 0 if frame.offset == 0 else 1
        try:
            found = self._kernel.program.source_location(frame.address - back)
        except LookupError:
            return ()
        return tuple((_in_tree(each.filename), each.line) for each in found if each.line)


# Of C files the path is the one in the kernel's tree; that of an assembler's file also says where
# the tree was built.
def _in_tree(filename: str) -> str:
    _, arch, rest = filename.partition("/arch/") if filename.startswith("/") else ("", "", "")
    return f"arch/{rest}" if arch else filename


@cached_by_file
def _debug(path: Path) -> DebugFile:
    return DebugFile(path)
