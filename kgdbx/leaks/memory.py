"""A kernel's memory in bulk: page frames, and words at many addresses at once, as arrays."""

from collections.abc import Iterator
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kgdbx.arch import paging
from kgdbx.errors import MemoryFault, TargetError
from kgdbx.symbols.kernel import Kernel

__all__ = ("BulkMemory", "I64", "PAGE_BYTES", "PhysicalMemory", "U64", "U8")

U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
U8: TypeAlias = npt.NDArray[np.uint8]

PAGE_BYTES = 4096
"""Size of a page frame."""

_WORDS = PAGE_BYTES // 8
_CHUNK_FRAMES = 4096  # 16 MiB at a time
_PRESENT, _HUGE = 1, 1 << 7
_ADDRESS_MASK = (1 << 52) - (1 << 12)
_IMAGE_MAP = 0xFFFFFFFF80000000  # __START_KERNEL_map, arch/x86/include/asm/page_64_types.h
_MASK = (1 << 64) - 1


class PhysicalMemory(Protocol):
    """Guest-physical memory: a VM's RAM as the host sees it, or what a core file holds."""

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Guest-physical ``(start, size_bytes)`` of all RAM."""

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read guest-physical memory.

        :raises MemoryFault: if any byte is not RAM
        """

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Read guest-physical memory into a buffer.

        :raises MemoryFault: if any byte is not RAM
        """


class BulkMemory:
    """Reads a kernel's memory by page frame number, physical or virtual address.

    :param kernel: for its page tables and the places of its maps
    :param ram: its physical memory
    :raises TargetError: if the kernel has not booted
    """

    def __init__(self, kernel: Kernel, ram: PhysicalMemory) -> None:
        if not kernel.memory.booted:
            raise TargetError("the kernel has not set up its memory yet; let it boot first")
        self._ram = ram
        self.levels = kernel.memory.levels
        self.direct_map = kernel.memory.direct_map
        self._image = (kernel.address("_text"), kernel.address("_end"))
        self._image_to_physical = kernel.memory.phys_base - _IMAGE_MAP
        self._page_table = self.image_physical(kernel.address("init_top_pgt"))
        self.ranges = ram.ranges()
        self.end = sum(self.ranges[-1])

    @property
    def nframes(self) -> int:
        """Number of the page frame behind the last."""
        return self.end // PAGE_BYTES

    def is_ram(self, pfns: I64) -> npt.NDArray[np.bool_]:
        """Which page frame numbers are RAM."""
        inside = np.zeros(len(pfns), bool)
        for start, size in self.ranges:
            inside |= (pfns >= start // PAGE_BYTES) & (pfns < (start + size) // PAGE_BYTES)
        return inside

    def image_physical(self, address: int) -> int:
        """Guest-physical address of something in the kernel's image."""
        return (address + self._image_to_physical) & _MASK

    def frame_addresses(self, pfns: I64) -> U64:
        """Where frames are mapped: in the kernel's image, or in the direct map."""
        physical = pfns.astype(np.uint64) * np.uint64(PAGE_BYTES)
        start, end = (self.image_physical(address) for address in self._image)
        image = (physical >= start) & (physical < end)
        shift = np.uint64(-self._image_to_physical & _MASK)
        return np.where(image, physical + shift, physical + np.uint64(self.direct_map))

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read kernel virtual memory.

        :raises MemoryFault: if any byte is not mapped
        """
        if self.direct_map <= address and address + size_bytes <= self.direct_map + self.end:
            return self._ram.read(address - self.direct_map, size_bytes)
        if self._image[0] <= address and address + size_bytes <= self._image[1]:
            return self._ram.read(self.image_physical(address), size_bytes)
        parts = paging.pages(self._translate, address, size_bytes)
        return b"".join(self._ram.read(physical, length) for physical, length in parts)

    def is_writable(self, address: int) -> bool:
        """Whether the kernel may write to an address of its own; false if nothing is mapped."""
        try:
            return self._translate(address).writable
        except MemoryFault:
            return False

    def read_u64(self, address: int) -> int:
        """Read an unsigned 64-bit integer of kernel virtual memory."""
        return int.from_bytes(self.read(address, 8), "little")

    def read_u32(self, address: int) -> int:
        """Read an unsigned 32-bit integer of kernel virtual memory."""
        return int.from_bytes(self.read(address, 4), "little")

    def read_array(self, address: int, size_bytes: int) -> tuple[U64, list[tuple[int, int]]]:
        """Read a large array of the kernel, with zeros for what is not mapped.

        :param address: kernel virtual, a multiple of 8
        :param size_bytes: a multiple of 8
        :return: its words, and the guest-physical ``(start, size_bytes)`` of its parts
        """
        words = np.zeros(size_bytes // 8, np.uint64)
        buffer = words.data.cast("B")
        parts: list[tuple[int, int]] = []
        done = 0
        while done < size_bytes:
            try:
                for physical, length in paging.pages(
                    self._translate, address + done, size_bytes - done
                ):
                    self._ram.read_into(physical, buffer[done : done + length])
                    parts.append((physical, length))
                    done += length
            except MemoryFault:
                done += PAGE_BYTES - (address + done) % PAGE_BYTES
        return words, parts

    def frames(self, pfns: I64) -> U64:
        """Contents of page frames, 512 words each; zeros for one that is not RAM.

        :param pfns: page frame numbers, best in ascending order
        """
        out = np.zeros((len(pfns), _WORDS), np.uint64)
        if not len(pfns):
            return out
        buffer = out.data.cast("B")
        starts = np.flatnonzero(np.diff(pfns, prepend=pfns[0] - 2) != 1)
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(pfns)], strict=True):
            part = buffer[start * PAGE_BYTES : end * PAGE_BYTES]
            try:
                self._ram.read_into(int(pfns[start]) * PAGE_BYTES, part)
            except MemoryFault:
                self._frame_by_frame(pfns[start:end], part)
        return out

    def frame_chunks(self, pfns: I64) -> Iterator[tuple[I64, U64]]:
        """Contents of many page frames, some MiB at a time."""
        for start in range(0, len(pfns), _CHUNK_FRAMES):
            part = pfns[start : start + _CHUNK_FRAMES]
            yield part, self.frames(part)

    def words(self, physical: U64) -> U64:
        """Words at guest-physical addresses, each a multiple of 8; zero where there is no RAM."""
        if not len(physical):
            return np.zeros(0, np.uint64)
        pfns, where = np.unique((physical // PAGE_BYTES).astype(np.int64), return_inverse=True)
        inside = self.is_ram(pfns)
        row = np.cumsum(inside) - 1
        frames = self.frames(pfns[inside])
        if not len(frames):
            return np.zeros(len(physical), np.uint64)
        index = (physical % PAGE_BYTES // 8).astype(np.int64)
        return np.where(inside[where], frames[row[where], index], np.uint64(0))

    def to_physical(self, addresses: U64) -> I64:
        """Guest-physical addresses of kernel virtual ones; -1 for those that are not mapped."""
        found = np.full(len(addresses), -1, np.int64)
        direct = addresses - np.uint64(self.direct_map)
        near = direct < self.end
        found[near] = direct[near].astype(np.int64)
        image = (addresses >= self._image[0]) & (addresses < self._image[1])
        found[image] = (addresses[image] + np.uint64(self._image_to_physical & _MASK)).astype(
            np.int64
        )
        rest = ~(near | image)
        if rest.any():
            found[rest] = self._walk(addresses[rest])
        return found

    def page_table_pages(self, roots: list[int]) -> I64:
        """Page frame numbers of all page tables below some, these included.

        :param roots: guest-physical addresses of top-level tables
        """
        tables = np.unique(np.array([self._page_table, *roots], np.uint64) // PAGE_BYTES)
        level_tables = tables.astype(np.int64)
        seen = [level_tables]
        for level in range(self.levels, 1, -1):
            entries = self.frames(level_tables).ravel()
            entries = entries[entries & _PRESENT != 0]
            if level in (2, 3):
                entries = entries[entries & _HUGE == 0]
            level_tables = np.unique((entries & _ADDRESS_MASK) // PAGE_BYTES).astype(np.int64)
            level_tables = level_tables[self.is_ram(level_tables)]
            seen.append(level_tables)
        return np.unique(np.concatenate(seen))

    def _walk(self, addresses: U64) -> I64:
        found = np.full(len(addresses), -1, np.int64)
        pending = np.arange(len(addresses))
        tables = np.full(len(addresses), self._page_table, np.uint64)
        for level in range(self.levels, 0, -1):
            at = addresses[pending]
            index = (at >> np.uint64(3 + 9 * level)) & np.uint64(511)
            entries = self.words(tables + index * np.uint64(8))
            present = entries & _PRESENT != 0
            leaf = present & ((level == 1) | ((entries & _HUGE != 0) & (level in (2, 3))))
            size = np.uint64(1 << (3 + 9 * level))
            frame = entries[leaf] & np.uint64(_ADDRESS_MASK) & ~(size - np.uint64(1))
            found[pending[leaf]] = (frame | (at[leaf] & (size - np.uint64(1)))).astype(np.int64)
            going = present & ~leaf
            pending = pending[going]
            tables = entries[going] & np.uint64(_ADDRESS_MASK)
        return found

    def _frame_by_frame(self, pfns: I64, buffer: memoryview) -> None:
        for n, pfn in enumerate(pfns.tolist()):
            part = buffer[n * PAGE_BYTES : (n + 1) * PAGE_BYTES]
            try:
                self._ram.read_into(pfn * PAGE_BYTES, part)
            except MemoryFault:
                part[:] = bytes(PAGE_BYTES)

    def _translate(self, address: int) -> paging.Translation:
        return paging.translate(
            lambda physical: int.from_bytes(self._ram.read(physical, 8), "little"),
            self._page_table,
            address,
            self.levels,
        )
