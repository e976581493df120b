import functools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kgdbx.arch.paging import Translation, is_canonical, pages, read_virtual, translate
from kgdbx.errors import MemoryFault

KIB4, MIB2, GIB1 = 1 << 12, 1 << 21, 1 << 30
P, W, U, PS, NX = 1, 2, 4, 1 << 7, 1 << 63
ACCESSED_DIRTY_GLOBAL = 0x160
PCID_AND_NOFLUSH = 1 << 63 | 0x123


class Tables:
    """Page tables in a sparse physical memory, built like the kernel builds them."""

    def __init__(self, levels: int = 4, first_frame: int = 0x1000) -> None:
        self.levels = levels
        self.words: dict[int, int] = {}
        self._next_frame = first_frame
        self.root = self._frame()
        self.cr3 = self.root | PCID_AND_NOFLUSH

    def _frame(self) -> int:
        self._next_frame += KIB4
        return self._next_frame

    def map(self, virtual: int, physical: int, size: int = KIB4, flags: int = W, upper=W | U):
        last = {KIB4: 1, MIB2: 2, GIB1: 3}[size]
        table = self.root
        for level in range(self.levels, last, -1):
            slot = table + 8 * (virtual >> 12 + 9 * (level - 1) & 511)
            if slot not in self.words:
                self.words[slot] = self._frame() | P | upper | 0x20
            table = self.words[slot] & 0x000F_FFFF_FFFF_F000
        huge = PS if last > 1 else 0
        slot = table + 8 * (virtual >> 12 + 9 * (last - 1) & 511)
        self.words[slot] = physical | P | huge | flags | ACCESSED_DIRTY_GLOBAL

    def read_u64(self, address: int) -> int:
        assert address % 8 == 0
        return self.words.get(address, 0)

    def translate(self, address: int) -> Translation:
        return translate(self.read_u64, self.cr3, address, self.levels)


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("size", [KIB4, MIB2, GIB1])
@pytest.mark.parametrize("virtual", [0, 0x7FFF_C000_0000, 0xFFFF_FFFF_8000_0000])
def test_page_sizes(levels, size, virtual) -> None:
    tables = Tables(levels)
    tables.map(virtual, 7 * GIB1, size)
    for offset in (0, 1, size - 1):
        assert tables.translate(virtual + offset) == Translation(
            7 * GIB1 + offset, size, writable=True, user=False, executable=True
        )
    for outside in (virtual + size, virtual - 1):
        if is_canonical(outside, levels) and outside >= 0:
            with pytest.raises(MemoryFault) as caught:
                tables.translate(outside)
            assert caught.value.address == outside
            assert not caught.value.physical


@pytest.mark.parametrize("size", [KIB4, MIB2, GIB1])
@pytest.mark.parametrize("flags", [0, W, U, NX, W | U, W | NX, W | U | NX])
def test_rights_of_the_page(size, flags) -> None:
    tables = Tables()
    tables.map(0, GIB1, size, flags)
    found = tables.translate(0)
    assert (found.writable, found.user, found.executable) == (
        bool(flags & W),
        bool(flags & U),
        not flags & NX,
    )


@pytest.mark.parametrize(
    ("upper", "rights"),
    [
        (0, (False, False, True)),
        (W, (True, False, True)),
        (U, (False, True, True)),
        (W | U | NX, (True, True, False)),
    ],
)
def test_rights_of_the_tables_above(upper, rights) -> None:
    tables = Tables()
    tables.map(0, GIB1, flags=W | U, upper=upper)
    found = tables.translate(0)
    assert (found.writable, found.user, found.executable) == rights


def test_flag_bits_are_no_address_bits() -> None:
    tables = Tables()
    pat_of_huge_page = 1 << 12
    protection_key_and_software = 0x7F << 52
    tables.map(0, 5 * GIB1 | pat_of_huge_page, GIB1, protection_key_and_software)
    tables.map(GIB1, 5 * GIB1 | pat_of_huge_page, MIB2, protection_key_and_software)
    tables.map(2 * GIB1, 5 * GIB1, KIB4, protection_key_and_software | PS)  # PS is PAT here
    for virtual in (0, GIB1, 2 * GIB1):
        assert tables.translate(virtual | 0xABC).physical_address == 5 * GIB1 | 0xABC


def test_highest_physical_address() -> None:
    tables = Tables()
    top = (1 << 52) - KIB4
    tables.map(0x1000, top)
    assert tables.translate(0x1FFF).physical_address == (1 << 52) - 1


@pytest.mark.parametrize(
    ("address", "four", "five"),
    [
        (0, True, True),
        ((1 << 47) - 1, True, True),
        (1 << 47, False, True),
        ((1 << 56) - 1, False, True),
        (1 << 56, False, False),
        (0xFEFF_FFFF_FFFF_FFFF, False, False),
        (0xFF00_0000_0000_0000, False, True),
        (0xFFFF_7FFF_FFFF_FFFF, False, True),
        (0xFFFF_8000_0000_0000, True, True),
        ((1 << 64) - 1, True, True),
        (1 << 64, False, False),
        (-1, False, False),
    ],
)
def test_canonical(address, four, five) -> None:
    assert is_canonical(address, 4) == four
    assert is_canonical(address, 5) == five
    for levels, canonical in ((4, four), (5, five)):
        if not canonical:
            with pytest.raises(MemoryFault):
                translate(lambda a: pytest.fail("walked"), 0x1000, address, levels)


def test_a_table_that_cannot_be_read() -> None:
    def read_u64(address: int) -> int:
        raise MemoryFault(address, 8, physical=True)

    with pytest.raises(MemoryFault) as caught:
        translate(read_u64, 0x5000, 8 << 39)
    assert caught.value.physical
    assert caught.value.address == 0x5000 + 8 * 8


_SIZES = st.sampled_from([KIB4, MIB2, GIB1])


@given(
    levels=st.sampled_from([4, 5]),
    mappings=st.lists(
        st.tuples(_SIZES, st.integers(0, 2**17 - 1), st.integers(0, 2**9 - 1)), max_size=12
    ),
    offset=st.integers(0, GIB1 - 1),
)
def test_random_mappings(levels, mappings, offset) -> None:
    # Each GiB of virtual memory holds one page, so that mappings do not collide.
    tables = Tables(levels)
    made = {}
    for size, gib, frame in mappings:
        gib_address = gib << 30
        virtual = gib_address | (offset & ~(size - 1))
        if virtual >> 47:  # the upper half
            virtual |= ~((1 << 47) - 1) & ((1 << 64) - 1)
        if gib_address not in made:
            tables.map(virtual, frame * GIB1, size)
            made[gib_address] = (virtual, frame * GIB1, size)
    for virtual, physical, size in made.values():
        inside = offset & (size - 1)
        assert tables.translate(virtual + inside).physical_address == physical + inside
        assert tables.translate(virtual).page_size_bytes == size


def test_pages_splits_at_page_ends() -> None:
    tables = Tables()
    tables.map(0x1FF000, 0x9000)
    tables.map(MIB2, 3 * MIB2, MIB2)
    tables.map(2 * MIB2, 0x8000)
    parts = functools.partial(pages, tables.translate)
    assert list(parts(0x1FF000, 0)) == []
    assert list(parts(0x1FFFFF, 1)) == [(0x9FFF, 1)]
    assert list(parts(0x1FFFF0, 0x10)) == [(0x9FF0, 0x10)]
    assert list(parts(0x1FFFF0, MIB2 + 0x20)) == [
        (0x9FF0, 0x10),
        (3 * MIB2, MIB2),
        (0x8000, 0x10),
    ]
    with pytest.raises(MemoryFault) as caught:
        list(parts(2 * MIB2 + 0xFF0, 0x20))
    assert caught.value.address == 2 * MIB2 + 0x1000


def test_read_virtual_joins_scattered_pages() -> None:
    rng = random.Random(7)
    memory = rng.randbytes(0x10000)
    tables = Tables(first_frame=1 << 40)
    frames = [n << 12 for n in range(16)]
    rng.shuffle(frames)
    for n, frame in enumerate(frames):
        tables.map(0x40_0000 + (n << 12), frame)
    expected = b"".join(memory[frame : frame + KIB4] for frame in frames)

    def read_physical(address: int, size_bytes: int) -> bytes:
        return memory[address : address + size_bytes]

    for _ in range(50):
        start = rng.randrange(len(expected))
        size = rng.randrange(len(expected) - start)
        got = read_virtual(read_physical, tables.translate, 0x40_0000 + start, size)
        assert got == expected[start : start + size]
