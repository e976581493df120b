"""The host's view of our own memory in the guest: rings, counters, slots.

Where the guest's RAM can be reached from the host, it is read and written while the guest runs;
elsewhere at stops, through the stub. For data only: what the guest executes has to be written
through the stub, which makes TCG drop what it translated.
"""

from kgdbx.symbols.kernel import Kernel
from kgdbx.target.ram import GuestRam

__all__ = ("HostView",)

_PAGE_BYTES = 4096
_STUB_CHUNK_BYTES = 1 << 16


class HostView:
    """Reads and writes guest-virtual addresses of data of ours.

    :param ram: the guest's RAM; None if it can only be reached through the stub
    """

    def __init__(self, kernel: Kernel, ram: GuestRam | None) -> None:
        self._memory = kernel.memory
        self._ram = ram
        self._ram_end = sum(ram.ranges()[-1]) if ram is not None else 0
        self._pages: dict[int, int] = {}

    @property
    def live(self) -> bool:
        """Whether the guest may run meanwhile."""
        return self._ram is not None

    def forget(self) -> None:
        """Drop what is known of addresses: the memory behind them was given back."""
        self._pages.clear()

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read within one block of ours."""
        if self._ram is None:
            return self._memory.read(address, size_bytes)
        return self._ram.read(self._physical(address), size_bytes)

    def read_u64(self, address: int) -> int:
        """Read an unsigned 64-bit integer."""
        return int.from_bytes(self.read(address, 8), "little")

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill a buffer from one block of ours."""
        if self._ram is not None:
            self._ram.read_into(self._physical(address), buffer)
            return
        for at in range(0, len(buffer), _STUB_CHUNK_BYTES):
            end = min(len(buffer), at + _STUB_CHUNK_BYTES)
            buffer[at:end] = self._memory.read(address + at, end - at)

    def write(self, address: int, data: bytes) -> None:
        """Write within one block of ours."""
        if self._ram is not None:
            self._ram.write(self._physical(address), data)
        else:
            self._memory.write(address, data)

    def _physical(self, address: int) -> int:
        # Blocks of the direct map are contiguous; per-CPU memory is where the page tables say,
        # for good.
        offset = address - self._memory.direct_map
        if 0 <= offset < self._ram_end:
            return offset
        page = address & -_PAGE_BYTES
        if page not in self._pages:
            self._pages[page] = self._memory.to_physical(page)
        return self._pages[page] + address - page
