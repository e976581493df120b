"""The drgn program over a target: types and objects of the live kernel."""

import contextlib
import gc
import logging
import weakref
from collections.abc import Iterator

import drgn

from kgdbx.errors import SymbolError, TargetError
from kgdbx.symbols.elf import ElfSymbols
from kgdbx.symbols.memory import KernelMemory
from kgdbx.target.base import Target

__all__ = ("make_program", "vmcoreinfo")

_PHYSICAL_END = 1 << 52
_MOST_LEFT = 4

# Whose programs are in memory. Each is some 180 MB that Python's collector does not see, so that it
# lets those of closed sessions, whose objects refer to one another, lie for long.
_made_for: weakref.WeakSet[KernelMemory] = weakref.WeakSet()


def vmcoreinfo(memory: KernelMemory, vmlinux: ElfSymbols, slide: int, osrelease: str) -> str:
    """What drgn must know of a kernel (Documentation/admin-guide/kdump/vmcoreinfo.rst).

    The kernel writes its own vmcoreinfo late in the boot; everything in it that drgn reads is
    known from the symbols, so it is made here and works from the first instruction.
    """
    top = vmlinux.address("init_top_pgt") + slide
    phys_base = memory.phys_base - (memory.phys_base >> 63 << 64)  # signed
    lines = (
        f"OSRELEASE={osrelease}",
        f"BUILD-ID={vmlinux.build_id}",
        "PAGESIZE=4096",
        f"SYMBOL(swapper_pg_dir)={top:x}",
        "LENGTH(mem_section)=2048",
        "NUMBER(MAX_PHYSMEM_BITS)=" + ("52" if memory.levels == 5 else "46"),
        "NUMBER(SECTION_SIZE_BITS)=27",
        f"NUMBER(phys_base)={phys_base}",
        f"NUMBER(pgtable_l5_enabled)={int(memory.levels == 5)}",
        f"KERNELOFFSET={slide:x}",
    )
    return "\n".join(lines) + "\n"


def make_program(
    target: Target, memory: KernelMemory, vmlinux: ElfSymbols, slide: int
) -> drgn.Program:
    """A drgn program with the types of *vmlinux* and the memory of *target*.

    :raises SymbolError: if *vmlinux* has no debug information
    """
    if not vmlinux.has_debug_info:
        raise _no_debug_info(vmlinux)
    if len(_made_for) >= _MOST_LEFT:
        gc.collect()
    _made_for.add(memory)
    banner = vmlinux.read(vmlinux.address("linux_banner"), 256).decode("ascii", "replace")
    program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    program.set_linux_kernel_custom(
        vmcoreinfo(memory, vmlinux, slide, banner.split()[2]), is_live=True
    )

    def read_virtual(address: int, count: int, offset: int, physical: bool) -> bytes:
        try:
            return memory.read(address, count)
        except TargetError as e:
            raise drgn.FaultError(str(e), address) from e

    def read_physical(address: int, count: int, offset: int, physical: bool) -> bytes:
        try:
            return target.read_physical(address, count)
        except TargetError as e:
            raise drgn.FaultError(str(e), address) from e

    program.add_memory_segment(0, (1 << 64) - 1, read_virtual)
    if target.capabilities.physical_memory:
        program.add_memory_segment(0, _PHYSICAL_END, read_physical, physical=True)
    try:
        with _quiet_about_modules():
            program.load_debug_info([vmlinux.path])
    except drgn.MissingDebugInfoError as e:
        raise _no_debug_info(vmlinux) from e
    _add_page_types(program)
    return program


# drgn looks at the modules, too, and warns of one that is just being loaded or taken out: those are
# kgdbx.symbols.modules' business.
@contextlib.contextmanager
def _quiet_about_modules() -> Iterator[None]:
    logger = logging.getLogger("drgn")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# What drgn's slab helpers look for in vmcoreinfo since Linux kernel commit 46df8e73a4a3 ("mm: free
# up PG_slab") (in v6.10). It is a constant of the debug information, so it can be told only now.
def _add_page_types(program: drgn.Program) -> None:
    try:
        types = {e.name: e.value for e in program.type("enum pagetype").enumerators or ()}
        slab = types["PGTY_slab"] << 24
    except LookupError:
        return
    known = program["VMCOREINFO"].string_()
    text = known + b"NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=%d\n\0" % (slab - (slab >> 31 << 32))

    def find(
        prog: drgn.Program, name: str, flags: drgn.FindObjectFlags, filename: str | None
    ) -> drgn.Object | None:
        if name != "VMCOREINFO" or not flags & drgn.FindObjectFlags.CONSTANT:
            return None
        type_ = prog.array_type(prog.int_type("char", 1, True), len(text))
        return drgn.Object.from_bytes_(prog, type_, text)

    program.register_object_finder("kgdbx", find, enable_index=0)


def _no_debug_info(vmlinux: ElfSymbols) -> SymbolError:
    return SymbolError(
        f"{vmlinux.path} has no debug information; install the kernel's -dbg package",
        symbol=str(vmlinux.path),
    )
