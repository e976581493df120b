"""The compiled loops on memory that is made up here: edges, reach, freelists."""

import ctypes

import numpy as np

from kgdbx.leaks.native import Tables, load_native, pointer

BASE = 0x1000  # guest-virtual address of the only slab
NATIVE = load_native()


def reach(edges: list[tuple[int, int]], seeds: list[int], nodes: int) -> list[int]:
    sources = np.array([a for a, _ in edges] or [0], np.uint32)
    targets = np.array([b for _, b in edges] or [0], np.uint32)
    reached = np.zeros(nodes, np.uint8)
    reached[seeds] = 1
    pointers = [pointer(a) for a in (sources, targets, reached)]
    assert NATIVE.reach(nodes, len(edges), *pointers) == 0
    return np.flatnonzero(reached).tolist()


def test_reach() -> None:
    cycle = [(1, 2), (2, 1)]
    assert reach([], [3], 5) == [3]
    assert reach([(0, 1), (1, 2), (3, 4)], [0], 5) == [0, 1, 2]
    assert reach([(0, 3), *cycle], [0], 5) == [0, 3]
    assert reach([(0, 2), *cycle], [0], 5) == [0, 1, 2]


def test_a_long_list_is_no_deep_recursion() -> None:
    count = 1_000_000
    assert len(reach([(n, n + 1) for n in range(count - 1)], [0], count)) == count


def walk(links: dict[int, int], head: int, *, slots: int = 8) -> tuple[list[int], int]:
    """Allocated slots of 64 bytes, and the verdict."""
    words = np.zeros(512, np.uint64)
    for slot, successor in links.items():
        words[8 * slot + 4] = successor  # the pointer is in the middle of an object

    def one(value: int, kind: type) -> "np.ndarray[tuple[int], np.dtype[np.generic]]":
        return np.array([value], kind)

    flags, verdict = np.ones(slots, np.uint8), np.zeros(1, np.uint8)
    arrays = (
        *(one(0, np.uint64), one(BASE, np.uint64), one(head, np.uint64)),
        *(one(64, np.uint32), one(slots, np.uint32), one(32, np.uint32), one(0, np.uint64)),
    )
    last = (one(0, np.uint32), flags, verdict)
    NATIVE.walk_freelists(
        pointer(words), 1, *(pointer(a) for a in arrays), 0, *(pointer(a) for a in last)
    )
    return np.flatnonzero(flags).tolist(), int(verdict[0])


def slot(number: int) -> int:
    return BASE + 64 * number


def test_freelists() -> None:
    assert walk({}, 0) == ([0, 1, 2, 3, 4, 5, 6, 7], 0)
    assert walk({3: slot(5), 5: slot(0)}, slot(3)) == ([1, 2, 4, 6, 7], 0)
    loops, leaves = 1, 2
    assert walk({3: slot(5), 5: slot(3)}, slot(3))[1] == loops
    assert walk({3: slot(8)}, slot(3))[1] == leaves
    assert walk({3: slot(5) + 8}, slot(3))[1] == leaves
    assert walk({}, 0xDEAD000000000000)[1] == leaves


def test_edges_of_records() -> None:
    # Two slots of 2048 bytes in frame 1, and one block of pages in frame 2.
    arrays = {
        "frame_group": np.array([-1, 0, 1, -1], np.int32),
        "group_base": np.array([4096, 8192], np.int64),
        "group_size": np.array([2048, 0xFFFFFFFF], np.uint32),
        "group_count": np.array([2, 1], np.uint32),
        "group_first": np.array([0, 2], np.uint32),
        "group_flags": np.array([2, 0], np.uint8),
        "node_flags": np.ones(3, np.uint8),
    }
    direct_map, vmemmap = 0xFFFF888000000000, 0xFFFFEA0000000000
    tables = Tables(
        direct_map=direct_map,
        nframes=4,
        vmemmap=vmemmap,
        page_struct_bytes=64,
        **{name: pointer(array) for name, array in arrays.items()},
    )
    words = np.array(
        [
            *(0, direct_map, direct_map + 4096, direct_map + 4096 + 2047),
            *(direct_map + 4096 + 2048, direct_map + 8192 + 4095, direct_map + 12288),
            *(vmemmap + 64, vmemmap + 2 * 64 + 8, (1 << 64) - 1),
        ],
        np.uint64,
    )
    sources = np.zeros(len(words), np.int64)
    found = [np.zeros(len(words), np.uint32) for _ in range(2)]
    seeds = np.zeros(3, np.uint8)
    outputs = [pointer(a) for a in (sources, *found, seeds)]
    count = NATIVE.edges_of_records(
        ctypes.addressof(tables), pointer(words), 1, len(words), *outputs
    )
    # To itself there is no edge, nor by way of a slab's struct page.
    assert found[1][:count].tolist() == [1, 2, 2]
    sources[:] = -1
    assert (
        NATIVE.edges_of_records(ctypes.addressof(tables), pointer(words), 1, len(words), *outputs)
        == 0
    )
    assert seeds.tolist() == [1, 1, 1]
