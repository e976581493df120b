"""Snapshots on disk: read back as written, and refused when damaged."""

from pathlib import Path

import numpy as np
import pytest

from kgdbx.errors import CommandError
from kgdbx.leaks.blocks import Block, BlockKind
from kgdbx.leaks.scan import CacheUsage
from kgdbx.leaks.snapshot import ModuleRange, Snapshot, read_snapshot

ADDRESSES = np.array([0x1000, 0x2000, 0xFFFF888000001000], np.uint64)
SNAPSHOT = Snapshot(
    "abc",
    ADDRESSES,
    np.array([64, 64, 64], np.uint64),
    (CacheUsage("kmalloc-64", 2, 128),),
    (ModuleRange("dummy", ((0xFFFFFFFFC0000000, 8192),)),),
)


def block(address: int) -> Block:
    return Block(0, BlockKind.SLAB, "kmalloc-64", address, 64)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "marks" / "a.zip"
    SNAPSHOT.write(path)
    again = read_snapshot(path, "abc")
    assert again.addresses.tolist() == ADDRESSES.tolist()
    assert again.sizes.tolist() == [64, 64, 64]
    assert not again.holds(Block(0, BlockKind.PAGES, "pages", 0x2000, 4096))
    assert (again.usage, again.modules) == (SNAPSHOT.usage, SNAPSHOT.modules)
    assert [again.holds(block(a)) for a in (0x2000, 0x2001, 0xFFFF888000001000, 1 << 64 - 1)] == [
        True,
        False,
        True,
        False,
    ]


def test_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with pytest.raises(CommandError, match="there is no mark 'a'; make one: leaks mark"):
        read_snapshot(path, "abc")
    SNAPSHOT.write(path)
    with pytest.raises(CommandError, match="mark 'a' is of another kernel; mark again"):
        read_snapshot(path, "def")


def test_damage_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    SNAPSHOT.write(path)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        try:
            read_snapshot(path, "abc")
        except CommandError:
            refused += 1
    assert refused > 20
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CommandError, match="is damaged"):
            read_snapshot(path, "abc")
