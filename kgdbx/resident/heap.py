"""Addresses in the window: code apart from data, as TCG translates a written page anew."""

from dataclasses import dataclass

from kgdbx.resident.guest_call import Script
from kgdbx.resident.memory import PAGE_BYTES, GuestMemory, Window

__all__ = ("Heap",)

_CHUNK_BYTES = 64 << 10


@dataclass
class _Chunk:
    address: int
    size_bytes: int
    used: int = 0


class Heap:
    """Hands out addresses of one kind, code or data, from pages of the guest's."""

    def __init__(self, memory: GuestMemory, window: Window) -> None:
        self._memory = memory
        self._window = window
        self._chunks: list[_Chunk] = []
        self._free: dict[int, list[int]] = {}

    def fits(self, size_bytes: int) -> bool:
        """Whether as much can be handed out at once."""
        return any(chunk.size_bytes - chunk.used >= size_bytes + 64 for chunk in self._chunks)

    def room(self, size_bytes: int) -> Script[None]:
        """Make sure that as much can be handed out at once."""
        if not self.fits(size_bytes):
            wanted = max(_CHUNK_BYTES, -(-size_bytes - 64 & -PAGE_BYTES) + PAGE_BYTES)
            size = 1 << (wanted - 1).bit_length()
            block = yield from self._memory.pages(size, -(-wanted // PAGE_BYTES) * PAGE_BYTES)
            self._chunks.append(_Chunk(self._window.map(block), block.size_bytes))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Addresses ``(start, end)`` that may have been handed out."""
        return [(chunk.address, chunk.address + chunk.size_bytes) for chunk in self._chunks]

    def take(self, size_bytes: int, align_bytes: int = 64) -> int:
        """An address; :meth:`room` was made before."""
        size_bytes = -(-size_bytes // align_bytes) * align_bytes
        if self._free.get(size_bytes):
            return self._free[size_bytes].pop()
        for chunk in self._chunks:
            at = -(-chunk.used // align_bytes) * align_bytes
            if at + size_bytes <= chunk.size_bytes:
                chunk.used = at + size_bytes
                return chunk.address + at
        raise AssertionError("no room was made")

    def give_back(self, address: int, size_bytes: int, align_bytes: int = 64) -> None:
        """Take back what nothing in the guest uses any more."""
        size_bytes = -(-size_bytes // align_bytes) * align_bytes
        self._free.setdefault(size_bytes, []).append(address)
