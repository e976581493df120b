"""Places in the guest's memory: handed out, taken back, and joined again."""

from collections.abc import Generator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kgdbx.errors import ProbeError
from kgdbx.resident.heap import Heap
from kgdbx.resident.memory import Block, GuestMemory, Window


class _Pages:
    """Gives out pages one behind the other, each mapped where it is."""

    def __init__(self) -> None:
        self.end = 0x1000

    def pages(self, size_bytes: int, _least_bytes: int) -> Generator[Any, int, Block]:
        yield from ()
        block = Block(self.end, size_bytes)
        self.end += size_bytes
        return block

    def map(self, block: Block) -> Generator[Any, int, int]:
        yield from ()
        return block.address


def heap() -> Heap:
    pages = _Pages()
    return Heap(cast(GuestMemory, pages), cast(Window, pages))


def room(of: Heap, size_bytes: int) -> None:
    assert list(of.room(size_bytes)) == []


@given(st.lists(st.tuples(st.integers(1, 40000), st.booleans()), max_size=60))
def test_no_two_share_a_byte(wanted: list[tuple[int, bool]]) -> None:
    places = heap()
    held: list[tuple[int, int]] = []
    for size, keep in wanted:
        room(places, size)
        at = places.take(size)
        assert at % 64 == 0
        assert all(at + size <= start or start + other <= at for start, other in held)
        assert any(start <= at and at + size <= end for start, end in places.ranges)
        held.append((at, size))
        if not keep:
            places.give_back(*held.pop(len(held) // 2))


def test_all_comes_back_as_one() -> None:
    places = heap()
    room(places, 60000)
    held = [(places.take(size), size) for size in (64, 1000, 1, 30000, 65, 128)]
    for at, size in held[::2] + held[1::2]:
        places.give_back(at, size)
    before = places.ranges
    room(places, 65536)
    assert places.ranges == before
    assert places.take(65536) == before[0][0]


def test_no_piece_is_larger_than_what_the_guest_gives() -> None:
    places = heap()
    room(places, 4 << 20)
    with pytest.raises(ProbeError, match="4096 KiB for probes are more than the guest gives"):
        room(places, (4 << 20) + 1)
