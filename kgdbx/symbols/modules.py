"""Loadable modules: which are loaded, their symbols, and their debug information."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import drgn
import drgn.helpers.linux.list
import numpy as np

from kgdbx.errors import SymbolError
from kgdbx.symbols.elf import ELF64_SYM, ElfSymbols, Symbol, read_symbols
from kgdbx.symbols.memory import KernelMemory

__all__ = ("LoadedModule", "Modules", "section_addresses")

_MAX_SYMBOLS = 1 << 20
_MAX_STRINGS = 1 << 24
# Memory regions of struct module. Linux kernel commit ac3b43283923 ("module: replace
# module_layout with module_memory") (in v6.4) made them an array.
_CORE_REGIONS = 4  # MOD_TEXT, MOD_DATA, MOD_RODATA, MOD_RO_AFTER_INIT


@dataclasses.dataclass(frozen=True)
class LoadedModule:
    """A module in the running kernel.

    :ivar struct_address: its ``struct module *``
    :ivar regions: guest-virtual ``(start, size_bytes, is_init)`` of its memory
    """

    name: str
    struct_address: int
    regions: tuple[tuple[int, int, bool], ...]

    @property
    def base(self) -> int:
        """Where its core text starts."""
        return self.regions[0][0]

    def contains(self, address: int) -> bool:
        """Whether an address lies in the module's core or init memory."""
        return any(start <= address < start + size for start, size, _ in self.regions)

    def in_init(self, address: int) -> bool:
        """Whether an address lies in memory that is freed after the module's init."""
        return any(start <= address < start + size for start, size, init in self.regions if init)


class Modules:
    """The modules of a running kernel, read from it anew whenever they are asked for.

    :param program: drgn program of the kernel
    :param memory: its memory
    :param debug_directory: where the modules' debug files lie, searched by name; may be None
    """

    def __init__(
        self, program: drgn.Program, memory: KernelMemory, debug_directory: Path | None
    ) -> None:
        self._program = program
        self._memory = memory
        self._debug_directory = debug_directory
        self._files: dict[str, Path] | None = None
        self._own_files: dict[str, Path] = {}
        self._symbols: dict[int, tuple[Symbol, ...]] = {}
        self._with_debug_info: dict[tuple[str, int], bool] = {}

    def __iter__(self) -> Iterator[LoadedModule]:
        """Newest first.

        :raises SymbolError: if the list is damaged and leads back into itself
        """
        head = self._program["modules"].address_of_()
        seen: set[int] = set()
        for module in drgn.helpers.linux.list.list_for_each_entry("struct module", head, "list"):
            address = module.value_()
            if address in seen:
                raise SymbolError(f"the kernel's list of modules is damaged: {address:#x} twice")
            seen.add(address)
            yield self.at(address)

    def at(self, struct_address: int) -> LoadedModule:
        """The module of a ``struct module *``, also while it is being loaded."""
        module = drgn.Object(self._program, "struct module *", value=struct_address)
        return LoadedModule(
            module.name.string_().decode("utf-8", "replace"), struct_address, _regions(module)
        )

    def find(self, name: str) -> LoadedModule | None:
        """A loaded module by name; ``-`` and ``_`` are the same."""
        name = name.replace("-", "_")
        return next((module for module in self if module.name == name), None)

    def containing(self, address: int) -> LoadedModule | None:
        """The module at an address."""
        return next((module for module in self if module.contains(address)), None)

    def symbols(self, module: LoadedModule) -> tuple[Symbol, ...]:
        """Symbols of a module at their running addresses, from its own kallsyms.

        They include those of its init section while that exists.
        """
        key = self._kallsyms_address(module)
        if key not in self._symbols:
            self._symbols[key] = tuple(self._read_symbols(module))
        return self._symbols[key]

    def forget(self, module: LoadedModule) -> None:
        """Drop what is known of a module that is being freed."""
        self._symbols.clear()
        self._with_debug_info.pop((module.name, module.base), None)

    def add_debug_file(self, path: Path) -> None:
        """Use a debug file that is not in the directory: of a module of one's own.

        :param path: ``NAME.ko``; it goes before a file of the same name in the directory
        """
        self._own_files[_module_name(path)] = path

    def debug_file(self, name: str) -> Path | None:
        """The debug file of a module, by name."""
        name = name.replace("-", "_")
        return self._own_files.get(name) or self._debug_files.get(name)

    def known_names(self) -> tuple[str, ...]:
        """Names of what is loaded, and of what has a debug file, for completion."""
        loaded = {module.name for module in self}
        return tuple(sorted(loaded | self._own_files.keys() | self._debug_files.keys()))

    @property
    def _debug_files(self) -> dict[str, Path]:
        if self._files is None:
            files = self._debug_directory.rglob("*.ko*") if self._debug_directory else ()
            self._files = {
                _module_name(path): path
                for path in files
                if path.name.endswith((".ko", ".ko.debug"))
            }
        return self._files

    def load_debug_info(self, module: LoadedModule) -> bool:
        """Give drgn the types and lines of a module.

        :return: whether there is debug information
        :raises SymbolError: if the file is of another build than the loaded module
        """
        key = (module.name, module.base)
        if key not in self._with_debug_info:
            path = self.debug_file(module.name)
            self._with_debug_info[key] = path is not None and self._load(module, path)
        return self._with_debug_info[key]

    def _load(self, module: LoadedModule, path: Path) -> bool:
        elf = read_symbols(path)
        if not elf.has_debug_info:
            return False
        sections = section_addresses(elf, self.symbols(module))
        created = self._program.relocatable_module(module.name, module.base, create=True)
        if created.debug_file_status == drgn.ModuleFileStatus.HAVE:
            return True
        for name, address in sections.items():
            created.section_addresses[name] = address
        created.try_file(path, force=True)
        return bool(created.debug_file_status == drgn.ModuleFileStatus.HAVE)

    def _kallsyms_address(self, module: LoadedModule) -> int:
        return int(self._module(module).kallsyms.value_())

    def _module(self, module: LoadedModule) -> drgn.Object:
        return drgn.Object(self._program, "struct module *", value=module.struct_address)

    def _read_symbols(self, module: LoadedModule) -> Iterator[Symbol]:
        kallsyms = self._module(module).kallsyms.read_()
        count = min(int(kallsyms.num_symtab), _MAX_SYMBOLS)
        table = np.frombuffer(
            self._memory.read(kallsyms.symtab.value_(), count * ELF64_SYM.itemsize), ELF64_SYM
        )
        start = kallsyms.strtab.value_()
        ends = int(table["name"].max(initial=0)) if count else 0
        strings = self._memory.read(start, min(ends, _MAX_STRINGS))
        # The last name may end at the end of its page: read it on its own.
        strings += self._memory.read_string(start + len(strings), 512) + b"\0"
        for entry in table:
            offset = int(entry["name"])
            if offset and entry["value"] and offset < len(strings):
                name = strings[offset : strings.index(b"\0", offset)].decode("utf-8", "replace")
                kind = int(entry["info"]) & 0xF
                # layout: the kernel keeps its own letter in typetab, but st_info still has STT_*.
                yield Symbol(name, int(entry["value"]), int(entry["size"]), kind == 2, module.name)


def section_addresses(elf: ElfSymbols, running: tuple[Symbol, ...]) -> dict[str, int]:
    """Where each section of a ``.ko`` lies, by comparing its symbols with the loaded module's.

    ``sect_attrs`` in sysfs would tell, but only after the module's parameters were parsed.

    :raises SymbolError: if the file is of another build than the loaded module
    """
    addresses: dict[str, int] = {}
    for symbol in running:
        there = elf.lookup(symbol.name)
        if len(there) != 1 or there[0].section in ("", ".data..percpu", ".modinfo"):
            continue
        base = symbol.address - there[0].address
        if addresses.setdefault(there[0].section, base) != base:
            duplicates = sum(other.name == symbol.name for other in running)
            if duplicates == 1:
                raise SymbolError(
                    f"{elf.path} is not of the build of the loaded module: {symbol.name!r} lies "
                    "elsewhere; install the -dbg package of the running kernel",
                    symbol=symbol.name,
                )
    return addresses


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _regions(module: drgn.Object) -> tuple[tuple[int, int, bool], ...]:
    try:
        memories = module.mem
    except AttributeError:
        layouts: tuple[tuple[drgn.Object, bool], ...] = (
            (module.core_layout, False),
            (module.init_layout, True),
        )
    else:
        layouts = tuple((memory, n >= _CORE_REGIONS) for n, memory in enumerate(memories))
    regions = tuple(
        (int(layout.base.value_()), int(layout.size.value_()), init) for layout, init in layouts
    )
    return tuple(region for region in regions if region[1])
