"""The guest's RAM seen from the host: read at any time, without stopping the guest."""

import mmap
import os
import re
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
    copy-on-write mapping of its template's file: its pages are read from the QEMU process.

    :param path: the file behind ``memory-backend-file``
    :param size_bytes: RAM of the guest
    :param pid: QEMU's process if it maps the file privately, otherwise None
    :raises TargetError: if the RAM cannot be opened
    """

    def __init__(self, path: Path, size_bytes: int, pid: int | None = None) -> None:
        self._size = size_bytes
        self._low_end = _LOW_END_LARGE if size_bytes >= _LOW_END_SMALL else _LOW_END_SMALL
        self._map: mmap.mmap | None = None
        self._base = 0
        self._fd = -1
        try:
            if pid is None:
                with path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ)
            else:
                self._base = _private_mapping(pid, path, size_bytes)
                self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
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
        if address >= 0 and address + size_bytes <= min(self._size, self._low_end):
            offset = address
        elif _HIGH_START <= address <= _HIGH_START + self._size - self._low_end - size_bytes:
            offset = address - _HIGH_START + self._low_end
        else:
            raise MemoryFault(address, size_bytes, physical=True)
        if self._map is not None:
            return self._map[offset : offset + size_bytes]
        try:
            data = os.pread(self._fd, size_bytes, self._base + offset)
        except OSError as e:
            raise TargetLost(f"the VM's memory is gone: {e.strerror}") from e
        if len(data) != size_bytes:
            raise TargetLost("the VM's memory is gone: the VM has ended")
        return data

    def close(self) -> None:
        """Close the mapping; does nothing the second time."""
        if self._map is not None:
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
