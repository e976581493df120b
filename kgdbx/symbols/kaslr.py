"""Where the kernel runs: its KASLR slide, found from the running kernel alone."""

from kgdbx.errors import BuildIdMismatch, MemoryFault, SymbolError
from kgdbx.symbols.elf import ElfSymbols, build_id_from_notes
from kgdbx.symbols.memory import MappedMemory
from kgdbx.target.base import BreakpointKind, Target

__all__ = ("check_build_id", "find_slide", "run_to_kernel_entry")

_SLIDE_STEP = 0x200000  # CONFIG_PHYSICAL_ALIGN
_SLIDES = 512  # KERNEL_IMAGE_SIZE of 1 GiB: arch/x86/include/asm/page_64_types.h
_BANNER = b"Linux version "
_IMAGE_START, _IMAGE_END = 0xFFFFFFFF80000000, 0xFFFFFFFFC0000000
_SCAN_BYTES = _SLIDE_STEP
_BUILD_ID_NOTE = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"
_KERNEL_ENTRY = ("x86_64_start_kernel", "start_kernel")


def find_slide(target: Target, vmlinux: ElfSymbols) -> int | None:
    """The difference between running and link-time addresses of the kernel image.

    Looks for ``linux_banner`` at each place where KASLR may have put it
    (``choose_random_location()`` in arch/x86/boot/compressed/kaslr.c).

    :return: bytes, a multiple of 2 MiB; None if no kernel is mapped yet
    :raises BuildIdMismatch: if another kernel runs
    """
    banner = vmlinux.address("linux_banner")
    expected = vmlinux.read(banner, 256).split(b"\0")[0]
    slides: list[int] = [*_likely_slides(target, vmlinux), *_slides()]
    for cpu in target.cpus():
        memory = MappedMemory(target, cpu)
        for slide in slides:
            try:
                if memory.read(banner + slide, len(_BANNER)) != _BANNER:
                    continue
                if memory.read(banner + slide, len(expected)) == expected:
                    return slide
            except MemoryFault:
                continue
    if found := _scan_build_id(target):
        raise BuildIdMismatch(str(vmlinux.path), vmlinux.build_id, found)
    return None


def check_build_id(target: Target, vmlinux: ElfSymbols, slide: int) -> None:
    """Compare the file's build ID with the one in the running kernel's notes.

    :raises BuildIdMismatch: if they differ
    """
    start = vmlinux.address("__start_notes") + slide
    size = vmlinux.address("__stop_notes") + slide - start
    found = build_id_from_notes(_read_anywhere(target, start, size))
    found = found or _scan_build_id(target)
    if found != vmlinux.build_id:
        raise BuildIdMismatch(str(vmlinux.path), vmlinux.build_id, found)


def run_to_kernel_entry(target: Target, vmlinux: ElfSymbols, timeout_s: float) -> int:
    """Let a VM that was started frozen run to the first C code of its kernel.

    The slide is not known before that, so there is a breakpoint at every place where KASLR may
    put the function; a stub's breakpoints need no memory under them.

    :return: the slide in bytes
    :raises SymbolError: if the kernel of *vmlinux* does not start in time
    """
    name = next((n for n in _KERNEL_ENTRY if vmlinux.lookup(n)), _KERNEL_ENTRY[-1])
    entry = vmlinux.address(name)
    slides = _slides()
    inserted: list[int] = []
    try:
        for slide in slides:
            target.insert_breakpoint(BreakpointKind.SOFTWARE, entry + slide)
            inserted.append(slide)
        stop = target.run(timeout_s=timeout_s)
        if stop is not None:
            slide = target.read_registers(stop.cpu).rip - entry
            if slide in slides:
                return slide
    finally:
        for slide in inserted:
            target.remove_breakpoint(BreakpointKind.SOFTWARE, entry + slide)
    raise SymbolError(
        f"the kernel of {vmlinux.path} did not start within {timeout_s:g} s; "
        "does the VM boot this kernel?",
        symbol=name,
    )


def _slides() -> range:
    return range(0, _SLIDES * _SLIDE_STEP, _SLIDE_STEP)


def _likely_slides(target: Target, vmlinux: ElfSymbols) -> list[int]:
    # A CPU that was stopped for KGDB is in this function; over its line each read takes long.
    found: list[int] = []
    for symbol in vmlinux.lookup("kgdb_breakpoint"):
        for cpu in target.cpus():
            slide = (target.read_registers(cpu).rip - symbol.address) & -_SLIDE_STEP
            if slide in _slides():
                found.append(int(slide))
    return found


def _read_anywhere(target: Target, address: int, size_bytes: int) -> bytes:
    for cpu in target.cpus():
        try:
            return MappedMemory(target, cpu).read(address, size_bytes)
        except MemoryFault:
            continue
    raise MemoryFault(address, size_bytes)


def _scan_build_id(target: Target) -> str:
    # The build ID of a kernel whose layout is unknown: the first GNU note of its mapped image
    # that is not inside an ELF image, which would be the vDSO.
    for cpu in target.cpus():
        data = bytearray()
        memory = MappedMemory(target, cpu)
        for address in range(_IMAGE_START, _IMAGE_END, _SCAN_BYTES):
            try:
                data += memory.read(address, _SCAN_BYTES)
            except MemoryFault:
                if data:
                    break
        at = data.find(_BUILD_ID_NOTE)
        while at >= 0:
            if data[at & ~0xFFF : (at & ~0xFFF) + 4] != b"\x7fELF":
                return build_id_from_notes(bytes(data[at : at + 64]))
            at = data.find(_BUILD_ID_NOTE, at + 1)
    return ""
