"""Memory of the guest that is ours: taken from its own allocator, mapped where code may run.

Pages come from ``alloc_pages_exact()`` and have an address in the direct map, where the kernel lets
nothing be executed. So they are mapped a second time, through page tables of ours, in a window
of 16 MiB near the end of the module area: within reach of a ``rel32`` jump from the kernel's text
and its modules, KASLR or not. Entries of ``level2_fixmap_pgt``, which every process shares, lead
there, one for each 2 MiB as they are needed. They were not present, and such entries are not
cached: nothing needs flushing.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from kgdbx.errors import ProbeError
from kgdbx.resident.guest_call import Call, Script
from kgdbx.symbols.kernel import Kernel

__all__ = (
    "Block",
    "GuestMemory",
    "MAX_BLOCK_BYTES",
    "PAGE_BYTES",
    "Window",
    "free_bytes",
)

MAX_BLOCK_BYTES = 4 << 20
"""Most that the guest's page allocator gives in one piece: MAX_ORDER, include/linux/mmzone.h."""

PAGE_BYTES = 4096
_TABLE_BYTES = 2 << 20  # what one page table maps
_TABLE_PAGES = _TABLE_BYTES // PAGE_BYTES
_MOST_TABLES = 8
_TOP_GIB = 0xFFFFFFFFC0000000  # what level2_fixmap_pgt maps, arch/x86/kernel/head_64.S
# Above the places where modules are loaded, which are taken from the bottom, and below the
# fixmap: MODULES_END is index 504 (Documentation/arch/x86/x86_64/mm.rst).
_WINDOW_INDEXES = range(500 - _MOST_TABLES, 435, -1)
_TABLE_FLAGS = 0x063  # present, writable, accessed, dirty: arch/x86/include/asm/pgtable_types.h
_PAGE_FLAGS = 0x063  # the same and executable; not global, so that it can be flushed
# GFP_ATOMIC | __GFP_NOWARN | __GFP_ZERO, include/linux/gfp_types.h; the same numbers in 5.10-6.12
_GFP = 0x20 | 0x800 | 0x2000 | 0x100
_GFP_HIGH = 0x20  # __GFP_HIGH: also of what is kept for emergencies


@dataclass(frozen=True)
class Block:
    """Pages of the guest's.

    :ivar address: guest-virtual, in the direct map
    """

    address: int
    size_bytes: int


class GuestMemory:
    """Takes memory from the guest's allocators and gives it back.

    Everything that is taken is in :attr:`blocks` and :attr:`percpu` until it was given back.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._alloc = _either(kernel, "alloc_pages_exact", "alloc_pages_exact_noprof")
        self._free = _either(kernel, "free_pages_exact")
        self._percpu_alloc = _either(kernel, "__alloc_percpu_gfp", "pcpu_alloc_noprof")
        self._percpu_has_reserved = not kernel.vmlinux.lookup("__alloc_percpu_gfp")
        self._percpu_free = _either(kernel, "free_percpu")
        self.blocks: list[Block] = []
        self.percpu: list[int] = []

    def pages(
        self, size_bytes: int, least_bytes: int | None = None, *, reserves: bool = True
    ) -> Script[Block]:
        """Zeroed pages, physically contiguous.

        :param size_bytes: a multiple of the page size, at most 4 MiB
        :param least_bytes: take half as much, again and again, down to this, if there is no more
        :param reserves: take of what the guest keeps for emergencies, too
        :raises ProbeError: if the guest has no memory left
        """
        least_bytes = least_bytes or size_bytes
        size_bytes = min(size_bytes, MAX_BLOCK_BYTES)
        flags = _GFP if reserves else _GFP & ~_GFP_HIGH
        while True:
            address = yield Call(self._alloc, (size_bytes, flags))
            if address:
                block = Block(address, size_bytes)
                self.blocks.append(block)
                return block
            if size_bytes // 2 < least_bytes:
                raise ProbeError(f"the guest has no {size_bytes >> 10} KiB of memory for probes")
            size_bytes //= 2

    def per_cpu(self, size_bytes: int) -> Script[int]:
        """Zeroed memory of each CPU; the address is relative to its ``gs`` base.

        :raises ProbeError: if the guest has none left
        """
        reserved = (0,) if self._percpu_has_reserved else ()
        address = yield Call(self._percpu_alloc, (size_bytes, 64, *reserved, _GFP))
        if not address:
            raise ProbeError(f"the guest has no {size_bytes} bytes of per-CPU memory for probes")
        self.percpu.append(address)
        return address

    def give_back(self, blocks: list[Block], percpu: list[int]) -> Script[None]:
        """Free what was taken."""
        for block in tuple(blocks):
            yield Call(self._free, (block.address, block.size_bytes))
            if block in self.blocks:
                self.blocks.remove(block)
        for address in tuple(percpu):
            yield Call(self._percpu_free, (address,))
            if address in self.percpu:
                self.percpu.remove(address)


class Window:
    """The virtual addresses where our pages can be executed.

    :param note: is told of each entry that leads there, before it is written
    :raises ProbeError: if there is no room
    """

    def __init__(self, kernel: Kernel, memory: GuestMemory, note: Callable[..., None]) -> None:
        self._kernel = kernel
        self._memory = memory
        self._note = note
        self._directory = kernel.address("level2_fixmap_pgt")
        entries = struct.unpack("<512Q", kernel.memory.read(self._directory, PAGE_BYTES))
        self._first = next((n for n in _WINDOW_INDEXES if not any(entries[n:][:_MOST_TABLES])), -1)
        if self._first < 0:
            raise ProbeError("no page-directory entries are free near the end of the module area")
        self.start = _TOP_GIB + self._first * _TABLE_BYTES
        self._tables: list[Block] = []
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """How much of it is mapped, from its start on."""
        return self._used * PAGE_BYTES

    @property
    def end(self) -> int:
        """First address behind the window."""
        return self.start + _MOST_TABLES * _TABLE_BYTES

    def map(self, block: Block) -> Script[int]:
        """Map a block; its address in the window, which every vCPU sees.

        :raises ProbeError: if the window is full, or the guest has no memory for a page table
        """
        pages = block.size_bytes // PAGE_BYTES
        if self._used + pages > _MOST_TABLES * _TABLE_PAGES:
            raise ProbeError(
                f"the {_MOST_TABLES * _TABLE_BYTES >> 20} MiB for probes' code are full; remove "
                "probes, or give return probes a smaller maxactive"
            )
        while self._used + pages > len(self._tables) * _TABLE_PAGES:
            yield from self._add_table()
        address = self.start + self._used * PAGE_BYTES
        first = self._physical(block.address)
        entries = [first + n * PAGE_BYTES | _PAGE_FLAGS for n in range(pages)]
        while entries:
            table, at = divmod(self._used, _TABLE_PAGES)
            part, entries = entries[: _TABLE_PAGES - at], entries[_TABLE_PAGES - at :]
            data = struct.pack(f"<{len(part)}Q", *part)
            self._kernel.memory.write(self._tables[table].address + 8 * at, data)
            self._used += len(part)
        return address

    def close(self) -> None:
        """Take the window away."""
        for n in range(len(self._tables)):
            self._kernel.memory.write(self._entry(n), bytes(8))
        self._tables.clear()
        self._kernel.target.flush_translations()

    def _add_table(self) -> Script[None]:
        table = yield from self._memory.pages(PAGE_BYTES)
        address = self._entry(len(self._tables))
        value = self._physical(table.address) | _TABLE_FLAGS
        self._note(window=(address, value, self.start, self.end))
        self._kernel.memory.write(address, value.to_bytes(8, "little"))
        # What was cached of an earlier one is dropped.
        self._kernel.target.flush_translations()
        self._tables.append(table)

    def _entry(self, number: int) -> int:
        return self._directory + 8 * (self._first + number)

    def _physical(self, address: int) -> int:
        return address - self._kernel.memory.direct_map


def free_bytes(kernel: Kernel) -> int:
    """Memory that the guest has free; caches that it could drop do not count."""
    program = kernel.program
    pages = program["vm_zone_stat"][program.constant("NR_FREE_PAGES")].counter
    return int(pages.value_()) * PAGE_BYTES


def _either(kernel: Kernel, *names: str) -> int:
    for name in names:
        if kernel.vmlinux.lookup(name):
            return kernel.address(name)
    raise ProbeError(f"the kernel has no {names[0]}(), which probes inside the guest need")
