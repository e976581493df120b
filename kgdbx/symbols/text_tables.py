"""What the kernel's own tables say of its code: where it patches it, where it comes back to.

The tables are read from the running kernel: it sorts them when it boots.
"""

import bisect
import dataclasses
import functools

import drgn
import numpy as np
import numpy.typing as npt

from kgdbx.symbols.elf import ElfSymbols
from kgdbx.symbols.memory import KernelMemory
from kgdbx.symbols.modules import LoadedModule

__all__ = ("Conflict", "Tables", "TextTables")

_ADDRESS_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Conflict:
    """A reason of the kernel's to find its code as it left it.

    :ivar address: guest-virtual address of the place
    :ivar kind: name of the table
    :ivar reason: what is there, to follow "because of"
    """

    address: int
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables of vmlinux or of one module, as sorted guest-virtual addresses.

    :ivar jump_labels: instructions that a static key turns from NOP to jump and back
    :ivar jump_targets: where these jumps go
    :ivar static_calls: calls and tail calls that the kernel redirects
    :ivar faulting: instructions that may fault, by the exception table
    :ivar resumed: where the exception table goes on after a fault of each of them
    :ivar fixups: the same, sorted
    """

    jump_labels: list[int]
    jump_targets: list[int]
    static_calls: list[int]
    faulting: list[int]
    resumed: list[int]
    fixups: list[int]

    def conflict(self, start: int, end: int) -> Conflict | None:
        """What forbids to replace the instructions of a range.

        :param start: guest-virtual address of the first instruction
        :param end: guest-virtual address behind the last one
        """
        for addresses, first, kind, reason in (
            (self.jump_labels, start, "jump label", "a static key patches this code"),
            (self.static_calls, start, "static call", "a static call patches this code"),
            (self.faulting, start, "exception table", "a fault here is looked up by its address"),
            (self.jump_targets, start + 1, "jump label", "a static key may jump into this code"),
            (self.fixups, start + 1, "exception table", "a fault elsewhere goes on in this code"),
        ):
            index = bisect.bisect_left(addresses, first)
            if index < len(addresses) and addresses[index] < end:
                return Conflict(addresses[index], kind, reason)
        return None

    def fixups_of(self, start: int, end: int) -> list[int]:
        """Where faults in a range of code go on."""
        low, high = (bisect.bisect_left(self.faulting, each) for each in (start, end))
        return self.resumed[low:high]


class TextTables:
    """Reads the tables of vmlinux and of modules, each once.

    :param program: for the layout of their entries
    """

    def __init__(
        self, program: drgn.Program, memory: KernelMemory, vmlinux: ElfSymbols, slide: int
    ) -> None:
        self._program = program
        self._memory = memory
        self._vmlinux = vmlinux
        self._slide = slide
        self._modules: dict[LoadedModule, Tables] = {}

    def of(self, module: LoadedModule | None) -> Tables:
        """The tables of a module, or of vmlinux for None."""
        if module is None:
            return self._kernel
        if module not in self._modules:
            self._modules[module] = self._of_module(module)
        return self._modules[module]

    def forget_modules(self) -> None:
        """Read the tables of modules anew: one was unloaded."""
        self._modules.clear()

    def cold_parts(self, function_name: str) -> tuple[str, ...]:
        """Names of what the compiler moved out of a function of vmlinux: ``name.cold``."""
        return self._cold_parts.get(function_name, ())

    @functools.cached_property
    def _cold_parts(self) -> dict[str, tuple[str, ...]]:
        parts: dict[str, tuple[str, ...]] = {}
        for name in self._vmlinux.names():
            base, cold, _ = name.partition(".cold")
            if cold:
                parts[base] = (*parts.get(base, ()), name)
        return parts

    @functools.cached_property
    def _kernel(self) -> Tables:
        jumps = self._between("__start___jump_table", "__stop___jump_table")
        calls = self._between("__start_static_call_sites", "__stop_static_call_sites")
        exceptions = self._between("__start___ex_table", "__stop___ex_table")
        return self._tables(jumps, calls, exceptions)

    def _between(self, first: str, last: str) -> tuple[int, int]:
        # Address and size in bytes of a table; of none if the kernel was built without it.
        if not self._vmlinux.lookup(first):
            return 0, 0
        start = self._vmlinux.address(first)
        return start + self._slide, self._vmlinux.address(last) - start

    def _of_module(self, module: LoadedModule) -> Tables:
        loaded = drgn.Object(self._program, "struct module *", value=module.struct_address)

        def table(entries: str, count: str) -> tuple[int, int]:
            try:
                pointer = loaded.member_(entries)
                size = int(loaded.member_(count).value_()) * drgn.sizeof(pointer.type_.type)
            except LookupError:
                return 0, 0  # the kernel was built without it
            return int(pointer.value_()), size

        return self._tables(
            table("jump_entries", "num_jump_entries"),
            table("static_call_sites", "num_static_call_sites"),
            table("extable", "num_exentries"),
        )

    def _tables(
        self, jumps: tuple[int, int], calls: tuple[int, int], exceptions: tuple[int, int]
    ) -> Tables:
        faulting = self._addresses("struct exception_table_entry", "insn", *exceptions)
        resumed = self._addresses("struct exception_table_entry", "fixup", *exceptions)
        order = np.argsort(faulting)
        return Tables(
            np.sort(self._addresses("struct jump_entry", "code", *jumps)).tolist(),
            np.sort(self._addresses("struct jump_entry", "target", *jumps)).tolist(),
            np.sort(self._addresses("struct static_call_site", "addr", *calls)).tolist(),
            faulting[order].tolist(),
            resumed[order].tolist(),
            np.sort(resumed).tolist(),
        )

    def _addresses(
        self, type_name: str, member: str, start: int, size_bytes: int
    ) -> npt.NDArray[np.uint64]:
        if not size_bytes:
            return np.zeros(0, dtype=np.uint64)
        entry = self._program.type(type_name)
        field = entry.member(member)
        size, offset = drgn.sizeof(field.type), field.offset
        layout = np.dtype(
            {
                "names": ["value"],
                "formats": ["<u8" if size == _ADDRESS_BYTES else "<i4"],
                "offsets": [offset],
                "itemsize": drgn.sizeof(entry),
            }
        )
        data = self._memory.read(start, size_bytes // layout.itemsize * layout.itemsize)
        values: npt.NDArray[np.uint64] = np.frombuffer(data, layout)["value"]
        if size == _ADDRESS_BYTES:
            return values
        # 32 bits that count from the member itself
        steps = np.arange(len(values), dtype=np.uint64) * np.uint64(layout.itemsize)
        places = np.uint64(start + offset) + steps
        absolute: npt.NDArray[np.uint64] = places + values.astype(np.int64).astype(np.uint64)
        return absolute
