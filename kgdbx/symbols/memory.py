"""Kernel and user memory by virtual address, running or stopped, over any target."""

import functools

from kgdbx.arch import paging
from kgdbx.arch.registers import Registers
from kgdbx.errors import MemoryFault, Unsupported
from kgdbx.symbols.elf import ElfSymbols
from kgdbx.target.base import Target

__all__ = ("KernelMemory", "MappedMemory")

_IMAGE_MAP = 0xFFFFFFFF80000000  # __START_KERNEL_map, Documentation/x86/x86_64/mm.rst
_DIRECT_MAP = 0xFFFF888000000000  # __PAGE_OFFSET_BASE_L4, when the kernel has no variable for it
_CR3_PCID = 0xFFF
_CR3_PCID_AND_PTI = 0x1FFF  # PCID in bits 0-11, the user half of a PTI pair in bit 12
_CR4_LA57 = 1 << 12
_USER_MODE = 3  # CPL, in the low bits of cs
_WORD = (1 << 64) - 1  # phys_base is a difference and may be negative


class KernelMemory:
    """Reads through the kernel's own page tables.

    A vCPU that stopped in user mode may have no kernel pages mapped (page-table isolation), and
    a running guest has no current vCPU. So where guest-physical memory can be read at any time,
    addresses are translated here: the direct map and the kernel image by arithmetic, the rest by
    ``swapper_pg_dir``. Elsewhere the stub translates.

    :param target: the kernel
    :param vmlinux: its symbols
    :param slide: its KASLR slide in bytes
    """

    def __init__(self, target: Target, vmlinux: ElfSymbols, slide: int) -> None:
        self._target = target
        self._vmlinux = vmlinux
        self._slide = slide
        self._image = (vmlinux.address("_text") + slide, vmlinux.address("_end") + slide)
        self._booted = False
        self._phys_base = 0
        self._direct_map = _DIRECT_MAP
        self._direct_end = 0
        self._page_table = 0
        self._levels = 4
        # Without page-table isolation there are no pairs, and bit 12 is part of the address.
        pairs = bool(vmlinux.lookup("pti_init"))
        self._not_in_cr3 = _CR3_PCID_AND_PTI if pairs else _CR3_PCID

    @property
    def phys_base(self) -> int:
        """``phys_base``: physical address of the kernel image minus its virtual offset."""
        return self._phys_base

    @property
    def direct_map(self) -> int:
        """Virtual address of physical address 0 (``page_offset_base``)."""
        return self._direct_map

    @property
    def levels(self) -> int:
        """Page-table levels: 4, or 5 with LA57."""
        return self._levels

    @property
    def booted(self) -> bool:
        """Whether the kernel's final page tables are in use; until then the stub translates."""
        return self._booted

    def attach(self, ram_end: int) -> None:
        """Learn where things are mapped. Call at a stop, and again until :attr:`booted`.

        :param ram_end: guest-physical end of RAM; 0 if unknown
        """
        if self._booted:
            return
        registers = self._target.read_registers(self._target.cpus()[0])
        if "cr4" in registers:
            self._levels = 5 if registers.cr4 & _CR4_LA57 else 4
        self._phys_base = self._stub_u64("phys_base")
        if self._vmlinux.lookup("page_offset_base"):
            self._direct_map = self._stub_u64("page_offset_base")
        self._direct_end = self._direct_map + ram_end
        image = self._vmlinux.address("init_top_pgt") + self._slide
        self._page_table = (image - _IMAGE_MAP + self._phys_base) & _WORD
        state = int.from_bytes(self._stub_read("system_state", 4), "little")
        self._booted = state != 0  # SYSTEM_BOOTING, include/linux/kernel.h

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read kernel virtual memory.

        :raises MemoryFault: if any byte is not mapped
        """
        target = self._target
        if not (self._booted and target.capabilities.physical_memory):
            return target.read_memory(address, size_bytes)
        if target.capabilities.reads_while_running:
            end = address + size_bytes
            if self._direct_map <= address and end <= self._direct_end:
                return self._physical(address, address - self._direct_map, size_bytes)
            if self._image[0] <= address and end <= self._image[1]:
                physical = (address - _IMAGE_MAP + self._phys_base) & _WORD
                return self._physical(address, physical, size_bytes)
            return self._walk(self._page_table, address, size_bytes)
        try:
            return target.read_memory(address, size_bytes)
        except MemoryFault:
            return self._walk(self._page_table, address, size_bytes)

    def read_user(self, address: int, size_bytes: int, cr3: int | None = None) -> bytes:
        """Read user memory of the task whose page tables *cr3* names.

        :param cr3: that register's value; by default the page tables of the vCPU that stopped
        :raises MemoryFault: if any byte is not mapped: not present, or swapped out
        """
        if cr3 is None or not self._target.capabilities.physical_memory:
            return self._target.read_memory(address, size_bytes)
        return self._walk(cr3 & ~self._not_in_cr3, address, size_bytes)

    def read_u64(self, address: int) -> int:
        """Read an unsigned 64-bit integer."""
        return int.from_bytes(self.read(address, 8), "little")

    def read_u32(self, address: int) -> int:
        """Read an unsigned 32-bit integer."""
        return int.from_bytes(self.read(address, 4), "little")

    def read_string(self, address: int, max_bytes: int = 256, *, cr3: int | None = None) -> bytes:
        """Read a C string, kernel or (with *cr3*) user, without its terminator.

        :param max_bytes: longest string to read
        :raises MemoryFault: if it runs into memory that cannot be read
        """
        data = b""
        while len(data) < max_bytes:
            at = address + len(data)
            size = min(64, max_bytes - len(data), 0x1000 - (at & 0xFFF))
            part = self.read(at, size) if cr3 is None else self.read_user(at, size, cr3)
            head, nul, _ = part.partition(b"\0")
            data += head
            if nul:
                break
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write kernel virtual memory at a stop, read-only pages included.

        :raises MemoryFault: if any byte is not mapped
        """
        try:
            self._target.write_memory(address, data)
        except MemoryFault:
            if not (self._booted and self._target.capabilities.physical_memory):
                raise
            for physical, start, end in self._pages(self._page_table, address, len(data)):
                self._target.write_physical(physical, data[start:end])

    def to_physical(self, address: int) -> int:
        """Guest-physical address of a kernel virtual address.

        :raises MemoryFault: if it is not mapped
        :raises Unsupported: if the transport has no physical memory
        """
        if not self._target.capabilities.physical_memory:
            raise Unsupported(f"{self._target.name} has no physical memory")
        return self._translate(self._page_table, address).physical_address

    def _physical(self, address: int, physical: int, size_bytes: int) -> bytes:
        try:
            return self._target.read_physical(physical, size_bytes)
        except MemoryFault:
            raise MemoryFault(address, size_bytes) from None

    def _walk(self, page_table: int, address: int, size_bytes: int) -> bytes:
        return b"".join(
            self._target.read_physical(physical, end - start)
            for physical, start, end in self._pages(page_table, address, size_bytes)
        )

    def _pages(self, page_table: int, address: int, size_bytes: int) -> list[tuple[int, int, int]]:
        # Physical address of each page's part of a range, and where the part starts and ends.
        pages: list[tuple[int, int, int]] = []
        start = 0
        while start < size_bytes:
            at = address + start
            end = min(size_bytes, start + 0x1000 - (at & 0xFFF))
            try:
                pages.append((self._translate(page_table, at).physical_address, start, end))
            except MemoryFault:
                raise MemoryFault(address, size_bytes) from None
            start = end
        return pages

    def _translate(self, page_table: int, address: int) -> paging.Translation:
        return paging.translate(self._physical_u64, page_table, address, self._levels)

    def _physical_u64(self, address: int) -> int:
        return int.from_bytes(self._target.read_physical(address, 8), "little")

    def _stub_read(self, name: str, size_bytes: int) -> bytes:
        address = self._vmlinux.address(name) + self._slide
        for cpu in self._target.cpus():
            try:
                return MappedMemory(self._target, cpu).read(address, size_bytes)
            except MemoryFault:
                continue
        raise MemoryFault(address, size_bytes)

    def _stub_u64(self, name: str) -> int:
        return int.from_bytes(self._stub_read(name, 8), "little")


class MappedMemory:
    """Kernel virtual memory by what a vCPU has mapped, before more is known of the kernel.

    A vCPU in user mode may have next to nothing of it mapped (page-table isolation): then the
    kernel's half of its pair of page tables is looked at. For one stop of the kernel.
    """

    def __init__(self, target: Target, cpu: int) -> None:
        self._target = target
        self._cpu = cpu

    @functools.cached_property
    def _registers(self) -> Registers:
        return self._target.read_registers(self._cpu)

    @functools.cached_property
    def _walks(self) -> bool:
        registers = self._registers
        in_user_mode = "cr3" in registers and registers.cs & _USER_MODE
        return bool(in_user_mode and self._target.capabilities.physical_memory)

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read at a guest-virtual address.

        :raises MemoryFault: if any byte is not mapped
        """
        try:
            return self._target.read_memory(address, size_bytes, cpu=self._cpu)
        except MemoryFault:
            if not self._walks:
                raise
        levels = 5 if self._registers.cr4 & _CR4_LA57 else 4
        data = bytearray()
        while len(data) < size_bytes:
            at = address + len(data)
            page = paging.translate(
                lambda physical: int.from_bytes(self._target.read_physical(physical, 8), "little"),
                self._registers.cr3 & ~_CR3_PCID_AND_PTI,
                at,
                levels,
            )
            size = min(size_bytes - len(data), 0x1000 - (at & 0xFFF))
            data += self._target.read_physical(page.physical_address, size)
        return bytes(data)
