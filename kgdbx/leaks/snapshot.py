"""What the heap held at a moment: kept in a file, to see later what has come since."""

import dataclasses
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from kgdbx.errors import CommandError
from kgdbx.leaks.blocks import Block, Heap
from kgdbx.leaks.memory import U64
from kgdbx.leaks.scan import CacheUsage, cache_usage
from kgdbx.leaks.slab import ALLOCATED

__all__ = ("Growth", "ModuleRange", "Snapshot", "growth_since", "read_snapshot", "take_snapshot")

_FORMAT = 2
_MOST_BLOCKS = 1 << 28
_MOST_HEADER = 1 << 24
_MOST_MODULES = 10000
# What a damaged archive makes zipfile raise, and what is wrong in it makes us.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


@dataclasses.dataclass(frozen=True)
class ModuleRange:
    """Where a module was loaded.

    :ivar ranges: guest-virtual ``(start, size_bytes)`` of its memory that is not freed after init
    """

    name: str
    ranges: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Growth:
    """What has become more, or less, of a cache.

    :ivar objects: blocks now
    :ivar more_objects: how many more than then; negative for fewer
    :ivar more_bytes: and how many bytes more
    """

    cache: str
    objects: int
    more_objects: int
    more_bytes: int


@dataclasses.dataclass
class Snapshot:
    """All allocated blocks at a moment.

    :ivar build_id: of the kernel
    :ivar addresses: guest-virtual, ascending
    :ivar sizes: bytes of each
    :ivar usage: of each cache
    :ivar modules: that were loaded
    """

    build_id: str
    addresses: U64
    sizes: U64
    usage: tuple[CacheUsage, ...]
    modules: tuple[ModuleRange, ...]

    def holds(self, block: Block) -> bool:
        """Whether there was a block of this size at its address. It may have been another one."""
        row = int(np.searchsorted(self.addresses, np.uint64(block.address)))
        if row == len(self.addresses) or int(self.addresses[row]) != block.address:
            return False
        return int(self.sizes[row]) == block.size_bytes

    def write(self, path: Path) -> None:
        """Write it to a file, whole or not at all."""
        header = {
            "format": _FORMAT,
            "build_id": self.build_id,
            "usage": [dataclasses.astuple(each) for each in self.usage],
            "modules": [[each.name, list(each.ranges)] for each in self.modules],
        }
        # Differences of sorted addresses are small numbers, which compress well.
        steps = np.diff(self.addresses, prepend=np.uint64(0))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = path.with_suffix(".new")
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            file.writestr("header.json", json.dumps(header))
            file.writestr("addresses", steps.astype("<u8").tobytes())
            file.writestr("sizes", self.sizes.astype("<u8").tobytes())
        scratch.rename(path)


def take_snapshot(heap: Heap) -> Snapshot:
    """Note all allocated blocks, and where modules are."""
    nodes = np.flatnonzero(heap.node_flags & ALLOCATED)
    modules = tuple(
        ModuleRange(m.name, tuple((at, size) for at, size, init in m.regions if not init))
        for m in heap.kernel.modules
    )
    addresses = heap.addresses(nodes)
    order = np.argsort(addresses, kind="stable")
    sizes = heap.sizes(nodes)[order].astype(np.uint64)
    build_id = heap.kernel.vmlinux.build_id
    return Snapshot(build_id, addresses[order], sizes, cache_usage(heap), modules)


def read_snapshot(path: Path, build_id: str) -> Snapshot:
    """Read a snapshot back. The file is not trusted.

    :param build_id: of the kernel that it must be of
    :raises CommandError: if there is none, it is damaged, or it is of another kernel
    """
    try:
        with zipfile.ZipFile(path) as file:
            header = json.loads(_member(file, "header.json", _MOST_HEADER))
            steps = np.frombuffer(_member(file, "addresses", 8 * _MOST_BLOCKS), "<u8")
            sizes = np.frombuffer(_member(file, "sizes", 8 * _MOST_BLOCKS), "<u8")
        snapshot = _snapshot(header, np.cumsum(steps, dtype=np.uint64), sizes)
    except FileNotFoundError:
        raise CommandError(f"there is no mark {path.stem!r}; make one: leaks mark") from None
    except _DAMAGED as e:
        raise CommandError(f"{path} is damaged ({e}); mark again") from e
    if snapshot.build_id != build_id:
        raise CommandError(f"mark {path.stem!r} is of another kernel; mark again")
    return snapshot


def growth_since(snapshot: Snapshot, heap: Heap) -> tuple[Growth, ...]:
    """How caches have grown or shrunk, most bytes first; those that have not are left out."""
    then = {each.cache: each for each in snapshot.usage}
    now = {each.cache: each for each in cache_usage(heap)}
    found = []
    for name in then.keys() | now.keys():
        old = then.get(name, CacheUsage(name, 0, 0))
        new = now.get(name, CacheUsage(name, 0, 0))
        if new != old:
            more = new.objects - old.objects
            found.append(Growth(name, new.objects, more, new.size_bytes - old.size_bytes))
    return tuple(sorted(found, key=lambda g: (-g.more_bytes, g.cache)))


def _member(file: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    with file.open(name) as member:
        data = member.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"{name} is too large")
    return data


def _snapshot(header: Any, addresses: U64, sizes: U64) -> Snapshot:
    if not isinstance(header, dict) or header["format"] != _FORMAT:
        raise ValueError("another format")
    if len(header["modules"]) > _MOST_MODULES:
        raise ValueError("too many modules")
    if len(addresses) != len(sizes):
        raise ValueError("sizes of some blocks are missing")
    if len(addresses) > 1 and not bool((addresses[1:] >= addresses[:-1]).all()):
        raise ValueError("addresses are out of order")
    usage = tuple(CacheUsage(str(n), int(c), int(s)) for n, c, s in header["usage"])
    modules = tuple(
        ModuleRange(str(name), tuple((_address(a), _address(s)) for a, s in ranges))
        for name, ranges in header["modules"]
    )
    return Snapshot(str(header["build_id"]), addresses, sizes, usage, modules)


def _address(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ValueError("an address that is none")
    return value
