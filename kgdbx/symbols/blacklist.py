"""Where the kernel forbids probes that run in it, as ``/sys/kernel/debug/kprobes/blacklist``."""

import bisect
import functools
from collections.abc import Iterable, Iterator

import drgn
import numpy as np

from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.modules import LoadedModule
from kgdbx.symbols.text_tables import TextTables

__all__ = ("Blacklist",)

_Range = tuple[int, int, str]  # start, end, reason

# populate_kprobe_blacklist() in kernel/kprobes.c and arch_populate_kprobe_blacklist() in
# arch/x86/kernel/kprobes/core.c.
_AREAS = (
    ("__noinstr_text", "in .noinstr.text, where nothing may be traced"),
    ("__kprobes_text", "in .kprobes.text, the kernel's own probes"),
    ("__entry_text", "in .entry.text, where the kernel's stack and page tables are not yet set up"),
    # Those that kprobes can do with, since they single-step a copy.
    ("__indirect_thunk", "a thunk for indirect branches, which is part of every function"),
    ("__static_call_text", "a trampoline of a static call, which the kernel patches"),
)
_RETURN_THUNK = "__x86_return_thunk"
_COPIED = (
    # create_trampoline() in arch/x86/kernel/ftrace.c, machine_kexec() in machine_kexec_64.c
    ("ftrace_caller", "ftrace_caller_end"),
    ("ftrace_regs_caller", "ftrace_regs_caller_end"),
    ("relocate_kernel", ""),
)
_NOKPROBE = "on the kernel's blacklist for kprobes (NOKPROBE_SYMBOL)"


class Blacklist:
    """Addresses where no code of ours may be inserted.

    Besides what kprobes refuse, that is code which the kernel itself patches whole or copies.
    A module that is loaded later is looked up when it is asked for.

    :param kernel: a stopped kernel
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._vmlinux = _Ranges(_of_vmlinux(kernel))
        self._image = (kernel.address("_text"), kernel.address("_end"))
        self._modules: list[tuple[LoadedModule, _Ranges]] = []

    def reason(self, address: int) -> str | None:
        """Why the kernel forbids probes at an address, or None if it does not.

        ::

            >>> blacklist.reason(kernel.address("do_int3"))
            'in .noinstr.text, where nothing may be traced'
        """
        if self._image[0] <= address < self._image[1]:
            return self._vmlinux.reason(address)
        ranges = self._in_module(address)
        if ranges is None:
            self._modules = [
                (module, _Ranges(_of_module(self._kernel, module)))
                for module in self._kernel.modules
            ]
            ranges = self._in_module(address)
        return ranges.reason(address) if ranges else None

    @functools.cached_property
    def tables(self) -> TextTables:
        """Tables of what the kernel patches and where it comes back to."""
        kernel = self._kernel
        return TextTables(kernel.program, kernel.memory, kernel.vmlinux, kernel.slide)

    def forget_modules(self) -> None:
        """Look at the modules anew: one was unloaded, and another may lie in its place."""
        self._modules = []
        self.tables.forget_modules()

    def _in_module(self, address: int) -> "_Ranges | None":
        return next((ranges for module, ranges in self._modules if module.contains(address)), None)


class _Ranges:
    """Ranges with reasons, sorted once; where they overlap, the one that starts first counts."""

    def __init__(self, ranges: Iterable[_Range]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._reasons: list[str] = []
        last = 0
        for start, end, reason in sorted(ranges, key=lambda each: (each[0], -each[1])):
            if end > last and end > start:
                self._starts.append(max(start, last))
                self._ends.append(end)
                self._reasons.append(reason)
                last = end

    def reason(self, address: int) -> str | None:
        index = bisect.bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._ends[index]:
            return self._reasons[index]
        return None


def _of_vmlinux(kernel: Kernel) -> Iterator[_Range]:
    vmlinux = kernel.vmlinux
    for prefix, reason in _AREAS:
        if vmlinux.lookup(f"{prefix}_start"):
            yield kernel.address(f"{prefix}_start"), kernel.address(f"{prefix}_end"), reason
    if vmlinux.lookup(_RETURN_THUNK):
        start = vmlinux.address(_RETURN_THUNK)
        yield *_symbol(kernel, start), "the return thunk, which is part of every function"
    for first, last in _COPIED:
        for symbol in vmlinux.lookup(first)[:1]:
            start, end = _symbol(kernel, symbol.address)
            if last and vmlinux.lookup(last):
                end = kernel.address(last)
            yield start, end, "the kernel runs copies of this code at other addresses"
    if vmlinux.lookup("__start_kprobe_blacklist"):
        # The running kernel has freed this array, as init data; the file's addresses stay right.
        start = vmlinux.address("__start_kprobe_blacklist")
        size = vmlinux.address("__stop_kprobe_blacklist") - start
        for address in np.frombuffer(vmlinux.read(start, size), "<u8").tolist():
            yield *_symbol(kernel, address), _NOKPROBE


def _symbol(kernel: Kernel, link_address: int) -> tuple[int, int]:
    # From a function to the next symbol, padding included, as kallsyms_lookup_size_offset() does.
    end = kernel.vmlinux.next_address(link_address) or link_address + 1
    return link_address + kernel.slide, end + kernel.slide


def _of_module(kernel: Kernel, module: LoadedModule) -> Iterator[_Range]:
    # add_module_kprobe_blacklist() in kernel/kprobes.c
    loaded = drgn.Object(kernel.program, "struct module *", value=module.struct_address)
    for area, reason in (("noinstr_text", _AREAS[0][1]), ("kprobes_text", _AREAS[1][1])):
        try:
            start = int(loaded.member_(f"{area}_start").value_())
            size = int(loaded.member_(f"{area}_size").value_())
        except LookupError:
            continue  # this kernel's modules have no such section
        yield start, start + size, reason
    try:
        array = int(loaded.kprobe_blacklist.value_())
        count = int(loaded.num_kprobe_blacklist.value_())
    except AttributeError:
        return
    listed = np.frombuffer(kernel.memory.read(array, count * 8), "<u8").tolist() if count else []
    starts = sorted(s.address for s in kernel.modules.symbols(module)) if listed else []
    for address in listed:
        following = bisect.bisect_right(starts, address)
        end = starts[following] if following < len(starts) else address + 1
        yield address, end, _NOKPROBE
