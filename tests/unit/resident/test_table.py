"""The tables of maps: the guest's code, compiled here, beside a dict."""

import collections
import ctypes
import random
import subprocess
from collections.abc import Iterator

import pytest

PLACES, KEY_WORDS, VALUE_WORDS = 512, 2, 3
PLACE_WORDS = 1 + KEY_WORDS + VALUE_WORDS
WRAPPERS = f"""
u64 *find(struct table *t, const u64 *key)
{{ return find_values(t, key, {KEY_WORDS}, {VALUE_WORDS}, {PLACES}); }}
void do_add(u64 *word, u64 value) {{ add_to(word, value); }}
void do_raise(u64 *word, u64 value) {{ raise_to(word, value); }}
u32 power(u64 value, int is_signed) {{ return power_bucket(value, is_signed); }}
u32 step(u64 value, int is_signed, s64 least, s64 end, u64 width)
{{ return step_bucket(value, is_signed, least, end, width); }}
void clean(u8 *text, u32 size) {{ clean_text(text, size); }}
"""
U64 = ctypes.c_uint64


class CTable(ctypes.Structure):
    _fields_ = (("places", ctypes.POINTER(U64)), ("lost", U64))


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory, prelude: str) -> Iterator[ctypes.CDLL]:
    directory = tmp_path_factory.mktemp("table")
    source, path = directory / "table.c", directory / "table.so"
    source.write_text(prelude + WRAPPERS)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-w", source, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.find.restype = ctypes.POINTER(U64)
    library.power.argtypes = (U64, ctypes.c_int)
    library.step.argtypes = (U64, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, U64)
    yield library


def test_same_as_a_dict_until_it_is_full(code: ctypes.CDLL) -> None:
    chance = random.Random(7)
    memory = (U64 * (PLACES * PLACE_WORDS))()
    table = CTable(ctypes.cast(memory, ctypes.POINTER(U64)), 0)
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    lost = 0
    for _ in range(20011):
        key = chance.randrange(1 << 10), chance.choice((0, 1 << 63))
        values = code.find(ctypes.byref(table), (U64 * KEY_WORDS)(*key))
        if values:
            code.do_add(ctypes.byref(values.contents, 8), U64(1))
            counts[key] += 1
        else:
            lost += 1
    found = {}
    for at in range(0, len(memory), PLACE_WORDS):
        state, *key_words = memory[at : at + 1 + KEY_WORDS]
        if state:
            assert state & 3 == 3
            assert tuple(key_words) not in found
            found[tuple(key_words)] = memory[at + 1 + KEY_WORDS + 1]
    assert found == counts
    assert len(found) > PLACES // 2 and lost > 1000
    assert (sum(counts.values()) + lost, table.lost) == (20011, lost)


def test_a_place_being_filled_is_left_alone(code: ctypes.CDLL) -> None:
    memory = (U64 * (PLACES * PLACE_WORDS))(*[2, *[0] * (PLACE_WORDS - 1)] * PLACES)
    table = CTable(ctypes.cast(memory, ctypes.POINTER(U64)), 0)
    assert not code.find(ctypes.byref(table), (U64 * KEY_WORDS)(0, 0))
    assert table.lost == 1
    memory[5 * PLACE_WORDS :: PLACE_WORDS] = (U64 * (PLACES - 5))()  # free again
    (first, again) = (code.find(ctypes.byref(table), (U64 * 2)(3, 4)) for _ in range(2))
    assert ctypes.addressof(first.contents) == ctypes.addressof(again.contents)
    assert memory[: 5 * PLACE_WORDS : PLACE_WORDS] == [2] * 5


@pytest.mark.parametrize(
    ("value", "signed", "bucket"),
    [
        (0, 1, 1),
        (1, 1, 2),
        (2, 0, 3),
        (3, 1, 3),
        (4, 0, 4),
        (-1, 1, 0),
        (-1, 0, 65),
        (1 << 62, 1, 64),
    ],
)
def test_powers_of_two(code: ctypes.CDLL, value: int, signed: int, bucket: int) -> None:
    assert code.power(value & (1 << 64) - 1, signed) == bucket


@pytest.mark.parametrize(
    ("value", "signed", "bucket"),
    [
        (-21, 1, 0),
        (-20, 1, 1),
        (-1, 1, 2),
        (0, 1, 3),
        (9, 0, 3),
        (10, 0, 4),
        (30, 1, 6),
        (-1, 0, 6),
    ],
)
def test_steps(code: ctypes.CDLL, value: int, signed: int, bucket: int) -> None:
    assert code.step(value & (1 << 64) - 1, signed, -20, 30, 10) == bucket


def test_extremes_and_texts(code: ctypes.CDLL) -> None:
    word = U64(0)
    for value in (5, 3, (1 << 64) - 1, 9):
        code.do_raise(ctypes.byref(word), U64(value))
    assert word.value == (1 << 64) - 1
    text = ctypes.create_string_buffer(b"ab\0cd\0ef", 8)
    code.clean(text, 8)
    assert text.raw == b"ab" + bytes(6)
