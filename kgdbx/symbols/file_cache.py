"""What was read of a file serves all sessions of the process, until the file is another."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ("cached_by_file",)

_T = TypeVar("_T")
_MOST = 8
"""Files remembered: some kernels and the modules at work; a vmlinux's symbols are 30 MB."""


def cached_by_file(read: Callable[[Path], _T]) -> Callable[[Path], _T]:
    """Remember what *read* made of the last files; one that was built anew is read anew."""

    @functools.lru_cache(_MOST)
    def cached(path: Path, *_version: int) -> _T:
        return read(path)

    @functools.wraps(read)
    def of(path: Path) -> _T:
        try:
            found = path.stat()
        except OSError:
            return read(path)  # which says what is wrong
        return cached(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    return of
