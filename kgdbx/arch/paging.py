"""Walking x86-64 page tables, over any way to read guest-physical memory.

Source: Intel SDM Vol. 3A, section 4.5 (4-level and 5-level paging) and 4.6 (access rights).
"""

import dataclasses
from collections.abc import Callable, Iterator

from kgdbx.errors import MemoryFault

__all__ = ("Translation", "is_canonical", "pages", "read_virtual", "translate")

_PRESENT = 1 << 0
_WRITABLE = 1 << 1
_USER = 1 << 2
_HUGE = 1 << 7
_NO_EXECUTE = 1 << 63

_ADDRESS_MASK = (1 << 52) - (1 << 12)
# Levels count from 1, the page table, to 5. Bits of the address that are offset in a page that ends
# the walk at the level; at levels 2 and 3 that takes the huge bit (PS).
_PAGE_SHIFTS = {1: 12, 2: 21, 3: 30}
_INDEX_BITS = 9


@dataclasses.dataclass(frozen=True, slots=True)
class Translation:
    """Where a guest-virtual address lies and what may be done there.

    :ivar physical_address: guest-physical address of the byte asked for
    :ivar page_size_bytes: 4 KiB, 2 MiB or 1 GiB
    :ivar writable: every level allows writes (``CR0.WP`` makes the kernel obey)
    :ivar user: every level allows user-mode access
    :ivar executable: no level forbids instruction fetches (given ``EFER.NXE``, which Linux sets)
    """

    physical_address: int
    page_size_bytes: int
    writable: bool
    user: bool
    executable: bool


def is_canonical(address: int, levels: int = 4) -> bool:
    """Whether the processor takes *address* at all: its top bits are copies of one bit.

    :param levels: 4 (48 bits) or 5 (57 bits, ``CR4.LA57``)
    """
    top = address >> (11 + _INDEX_BITS * levels)
    return top == 0 or top == (1 << (53 - _INDEX_BITS * levels)) - 1


def translate(
    read_u64: Callable[[int], int], cr3: int, address: int, levels: int = 4
) -> Translation:
    """Translate a guest-virtual address.

    :param read_u64: reads 8 bytes at a guest-physical address
    :param cr3: the control register; its PCID and flag bits are ignored
    :param address: guest-virtual address
    :param levels: 5 if ``CR4.LA57`` (bit 12) is set, otherwise 4
    :raises MemoryFault: if the address is not canonical or not mapped, or with ``physical`` set
        if *read_u64* cannot read a table
    """
    if not is_canonical(address, levels):
        raise MemoryFault(address, 1)
    entry = cr3
    rights = _WRITABLE | _USER
    no_execute = 0
    for level in range(levels, 0, -1):
        index = address >> (3 + _INDEX_BITS * level) & 511
        entry = read_u64((entry & _ADDRESS_MASK) + 8 * index)
        if not entry & _PRESENT:
            raise MemoryFault(address, 1)
        rights &= entry
        no_execute |= entry & _NO_EXECUTE
        if level == 1 or (entry & _HUGE and level in _PAGE_SHIFTS):
            break
    size = 1 << _PAGE_SHIFTS[level]
    # In a huge page's entry bit 12 is PAT, and those above it up to the size are reserved.
    frame = entry & _ADDRESS_MASK & ~(size - 1)
    return Translation(
        physical_address=frame | address & (size - 1),
        page_size_bytes=size,
        writable=bool(rights & _WRITABLE),
        user=bool(rights & _USER),
        executable=not no_execute,
    )


def pages(
    translate_address: Callable[[int], Translation], address: int, size_bytes: int
) -> Iterator[tuple[int, int]]:
    """Split an access at the ends of pages.

    :param translate_address: translates one guest-virtual address
    :param address: guest-virtual address of the first byte
    :return: guest-physical address and length in bytes of each part, in order
    :raises MemoryFault: at the first part that is not mapped; those before have been yielded
    """
    end = address + size_bytes
    while address < end:
        found = translate_address(address)
        left = found.page_size_bytes - (address & (found.page_size_bytes - 1))
        length = min(left, end - address)
        yield found.physical_address, length
        address += length


def read_virtual(
    read_physical: Callable[[int, int], bytes],
    translate_address: Callable[[int], Translation],
    address: int,
    size_bytes: int,
) -> bytes:
    """Read guest-virtual memory through guest-physical memory.

    :param read_physical: reads a number of bytes at a guest-physical address
    :param translate_address: translates one guest-virtual address
    :raises MemoryFault: if any byte is not mapped or cannot be read
    """
    return b"".join(
        read_physical(physical, length)
        for physical, length in pages(translate_address, address, size_bytes)
    )
