"""The guest's RAM seen from the host: read and written without stopping the guest."""

import mmap
import os
import re
import sys
from pathlib import Path
from typing import Self

from kgdbx.errors import MemoryFault, TargetError, TargetLost

__all__ = ("GuestRam",)

_HIGH_START = 1 << 32
# pc_q35_init() in hw/i386/pc_q35.c: RAM below 4 GiB ends here, at the first with more RAM.
_LOW_END_LARGE = 0x80000000
_LOW_END_SMALL = 0xB0000000


class GuestRam:
    """Guest-physical memory of a QEMU ``q35`` machine whose RAM is a file.

    A VM that owns its file shares it with us: the file is mapped. A clone has a private
    copy-on-write mapping of its template's file: its pages are accessed in the QEMU process.

    .. warning:: The guest does not hear of what is written. QEMU's TCG goes on to execute its
        translation of code that was overwritten; a debug stub drops it.

    :param path: the file behind ``memory-backend-file``
    :param size_bytes: RAM of the guest
    :param pid: QEMU's process if it maps the file privately, otherwise None
    :raises TargetError: if the RAM cannot be opened
    """

    def __init__(self, path: Path, size_bytes: int, pid: int | None = None) -> None:
        self._size = size_bytes
        self._low_end = _LOW_END_LARGE if size_bytes >= _LOW_END_SMALL else _LOW_END_SMALL
        self._low_size = min(size_bytes, self._low_end)
        self._map: mmap.mmap | None = None
        self._bytes = memoryview(b"")
        self._words: dict[int, memoryview[int]] = {}
        self._base = 0
        self._fd = -1
        try:
            if pid is None:
                with path.open("r+b") as file:
                    self._map = mmap.mmap(file.fileno(), size_bytes)
                self._bytes = memoryview(self._map)
                words = (self._bytes.cast("H"), self._bytes.cast("I"), self._bytes.cast("Q"))
                self._words = {each.itemsize: each for each in words}
            else:
                self._base = _private_mapping(pid, path, size_bytes)
                self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except (OSError, ValueError) as e:
            raise TargetError(f"cannot open the guest's RAM {path}: {e}") from e

    @property
    def size_bytes(self) -> int:
        """RAM of the guest."""
        return self._size

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Guest-physical ``(start, size_bytes)`` of all RAM."""
        low = min(self._size, self._low_end)
        if low == self._size:
            return ((0, low),)
        return ((0, low), (_HIGH_START, self._size - low))

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read guest-physical memory, also while the guest runs.

        :raises MemoryFault: if any byte is not RAM
        :raises TargetLost: if the VM has ended
        """
        if address >= 0 and address + size_bytes <= self._low_size:
            offset = address
        else:
            offset = self._offset(address, size_bytes)
        if self._map is not None:
            return self._map[offset : offset + size_bytes]
        try:
            data = os.pread(self._fd, size_bytes, self._base + offset)
        except OSError as e:
            raise TargetLost(f"the VM's memory is gone: {e.strerror}") from e
        if len(data) != size_bytes:
            raise TargetLost("the VM's memory is gone: the VM has ended")
        return data

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Read guest-physical memory into a buffer of the caller, also while the guest runs.

        One copy and nothing allocated, for memory that is read again and again.

        :param buffer: contiguous and writable; as much is read as it holds. Numpy arrays have
            one: ``array.data``
        :raises MemoryFault: if any byte is not RAM
        :raises TargetLost: if the VM has ended
        """
        size_bytes = buffer.nbytes
        if not size_bytes:
            return
        offset = self._offset(address, size_bytes)
        if self._map is not None:
            buffer.cast("B")[:] = self._bytes[offset : offset + size_bytes]
            return
        try:
            done = os.preadv(self._fd, [buffer], self._base + offset)
        except OSError as e:
            raise TargetLost(f"the VM's memory is gone: {e.strerror}") from e
        if done != size_bytes:
            raise TargetLost("the VM's memory is gone: the VM has ended")

    def write(self, address: int, data: bytes) -> None:
        """Write guest-physical memory, also while the guest runs.

        Where the RAM is mapped, an aligned write of 1, 2, 4 or 8 bytes is a single store, so that
        the guest sees the old value or the new one. A clone's is a copy by the host's kernel, of
        which nobody promises that.

        :raises MemoryFault: if any byte is not RAM; nothing is written then
        :raises TargetLost: if the VM has ended
        """
        size_bytes = len(data)
        offset = self._offset(address, size_bytes, write=True)
        if self._map is not None:
            words = self._words.get(size_bytes)
            if words is not None and not offset % size_bytes:
                words[offset // size_bytes] = int.from_bytes(data, sys.byteorder)
            else:
                self._bytes[offset : offset + size_bytes] = data
            return
        try:
            done = os.pwrite(self._fd, data, self._base + offset)
        except OSError as e:
            raise TargetLost(f"the VM's memory is gone: {e.strerror}") from e
        if done != size_bytes:
            raise TargetLost("the VM's memory is gone: the VM has ended")

    def _offset(self, address: int, size_bytes: int, *, write: bool = False) -> int:
        # Where in the file a guest-physical address is.
        if address >= 0 and address + size_bytes <= self._low_size:
            return address
        if _HIGH_START <= address <= _HIGH_START + self._size - self._low_end - size_bytes:
            return address - _HIGH_START + self._low_end
        raise MemoryFault(address, size_bytes, physical=True, write=write)

    def close(self) -> None:
        """Close the mapping; does nothing the second time."""
        if self._map is not None:
            for view in (*self._words.values(), self._bytes):
                view.release()
            self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _private_mapping(pid: int, path: Path, size_bytes: int) -> int:
    # The virtual address at which QEMU maps the start of the RAM file. Other files may share a
    # part of the name, and deleted ones get a suffix: the name must match whole.
    pattern = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ 0+ \S+ \d+\s+(.*?)(?: \(deleted\))?\n")
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            match = pattern.fullmatch(line)
            if match and match[3] == str(path):
                return int(match[1], 16)
    raise ValueError(f"process {pid} does not map it; has the VM ended?")
