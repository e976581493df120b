"""Addresses in the window: code apart from data, as TCG translates a written page anew."""

import bisect

from kgdbx.errors import ProbeError
from kgdbx.resident.guest_call import Script
from kgdbx.resident.memory import MAX_BLOCK_BYTES, PAGE_BYTES, GuestMemory, Window

__all__ = ("Heap",)

_CHUNK_BYTES = 64 << 10
_GRAIN_BYTES = 64


class Heap:
    """Hands out addresses of one kind, code or data, from pages of the guest's."""

    def __init__(self, memory: GuestMemory, window: Window) -> None:
        self._memory = memory
        self._window = window
        self._chunks: list[tuple[int, int]] = []
        self._free: list[tuple[int, int]] = []  # by address

    def fits(self, size_bytes: int) -> bool:
        """Whether as much can be handed out."""
        return any(end - start >= _whole(size_bytes) for start, end in self._free)

    def room(self, size_bytes: int) -> Script[None]:
        """Make sure that as much can be handed out.

        :raises ProbeError: if the guest has no memory left, or the window is full
        """
        if size_bytes > MAX_BLOCK_BYTES:
            raise ProbeError(
                f"{size_bytes >> 10} KiB for probes are more than the guest gives in one piece; "
                "place fewer at once, or give return probes a smaller maxactive"
            )
        if not self.fits(size_bytes):
            wanted = max(_CHUNK_BYTES, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES)
            size = 1 << (wanted - 1).bit_length()
            block = yield from self._memory.pages(size, wanted)
            try:
                start = yield from self._window.map(block)
            except ProbeError:
                yield from self._memory.give_back([block], [])
                raise
            self._chunks.append((start, start + block.size_bytes))
            self._add_free(start, start + block.size_bytes)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Addresses ``(start, end)`` that may have been handed out."""
        return list(self._chunks)

    def take(self, size_bytes: int) -> int:
        """An address, a multiple of 64; :meth:`room` was made before."""
        size_bytes = _whole(size_bytes)
        for n, (start, end) in enumerate(self._free):
            if end - start >= size_bytes:
                rest = (start + size_bytes, end)
                self._free[n : n + 1] = [rest] if rest[0] < end else []
                return start
        raise AssertionError("no room was made")

    def place(self, size_bytes: int) -> Script[int]:
        """Make room, and take it.

        :raises ProbeError: as :meth:`room` does
        """
        yield from self.room(size_bytes)
        return self.take(size_bytes)

    def give_back(self, address: int, size_bytes: int) -> None:
        """Take back what nothing in the guest uses any more."""
        if size_bytes:
            self._add_free(address, address + _whole(size_bytes))

    def _add_free(self, start: int, end: int) -> None:
        # What touches becomes one, but chunks lie side by side in the window only.
        borders = {chunk for chunk, _ in self._chunks}
        at = bisect.bisect(self._free, (start, end))
        if at < len(self._free) and self._free[at][0] == end and end not in borders:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start and start not in borders:
            at -= 1
            start = self._free.pop(at)[0]
        self._free.insert(at, (start, end))


def _whole(size_bytes: int) -> int:
    return -(-size_bytes // _GRAIN_BYTES) * _GRAIN_BYTES
