"""The code of a probe at a function's entry, run as it is in this process, with our own ``gs``."""

import ctypes
import mmap
import struct
from collections.abc import Callable, Iterator

import pytest

from kgdbx.resident.compile.codegen import Body
from kgdbx.resident.compile.kernel_facts import KernelFacts
from kgdbx.resident.compile.link import compile_unit
from kgdbx.resident.compile.stub import StubCall, site_stub
from kgdbx.resident.compile.unit import Unit
from kgdbx.resident.ring import Stream

# Below 2 GiB, as the code is addressed, and far from the heap, which begins below 1.1 GiB.
CODE, DATA, SIZE = 0x70000000, 0x78000000, 1 << 20
PROBES, CONTROL, CHUNKS, RING = DATA, DATA + 0x200, DATA + 0x300, DATA + 0x1000
FUNCTION = CODE + 0x10000
SLOT, SLOTS, CHUNK_SLOTS = 64, 16, 4
POSITION, COUNTERS, TASK = 0x200, (0x300, 0x340), 0x800  # behind gs
FACTS = KernelFacts(
    "".join(
        f"#define {name} {value:#x}UL\n"
        for name, value in {
            "CURRENT": 0x100,
            "CPU_NUMBER": 0x108,
            "PREEMPT_COUNT": 0x110,
            "GUARD": 0x118,
            "TASK_PID": 0x10,
            "TASK_COMM": 0x40,
            "WINDOW": CODE,
            "WINDOW_BYTES": SIZE,
            "TSC_HZ": 10**9,
            "NS_PER_TICK": 1 << 32,
        }.items()
    )
)
# mov %rdi,%rax; add %rsi,%rax; ... %rdx %rcx %r8 %r9; ret
SUM_OF_ARGUMENTS = bytes.fromhex("4889f8 4801f0 4801d0 4801c8 4c01c0 4c01c8 c3")
ARCH_SET_GS, SYS_ARCH_PRCTL = 0x1001, 158
RDI, FIFTH = "\t*(u64 *)(rec + 48) = c->di;", "\t*(u64 *)(rec + 48) = c->r8;"


class Stubbed:
    """A function with probes, and what they write."""

    def __init__(self, memory: Callable[[int], ctypes.Array[ctypes.c_char]]) -> None:
        self.code, self.data = memory(CODE), memory(DATA)
        self.per_cpu = ctypes.create_string_buffer(4096)
        address = ctypes.addressof(self.per_cpu)
        struct.pack_into("<Q", self.per_cpu, 0x100, address + TASK)
        struct.pack_into("<16s", self.per_cpu, TASK + 0x40, b"tested")
        for n in range(2):
            probe = struct.pack("<QQIIIIQ", COUNTERS[n], 0, 0, 0, n + 1, 0, 0)
            self.data[64 * n : 64 * n + len(probe)] = probe
        struct.pack_into("<Q", self.data, CONTROL - DATA, CHUNKS)
        chunks = (RING + 0x1000 * (3 - n) for n in range(SLOTS // CHUNK_SLOTS))
        struct.pack_into("<4Q", self.data, CHUNKS - DATA, *chunks)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.syscall(SYS_ARCH_PRCTL, ARCH_SET_GS, ctypes.c_void_p(address)) == 0

    def probe(self, *bodies: Body) -> None:
        unit = Unit(FACTS)
        stream = Stream(SLOT, SLOTS, CHUNK_SLOTS, False, POSITION, CONTROL)
        calls = [
            StubCall(PROBES + 64 * n, unit.handler("p", body, stream), None, body.filters_first)
            for n, body in enumerate(bodies)
        ]
        unit.add(site_stub(0, calls, 16))
        linked = compile_unit(unit.text).link(CODE, 0, lambda name: None)
        self.code[: len(linked.code)] = linked.code
        tail, entry = linked.symbols["tail_0"] - CODE, FUNCTION - CODE
        self.code[tail : tail + 5] = _jump(CODE + tail, FUNCTION + 5)
        self.code[entry : entry + 5] = _jump(FUNCTION, linked.symbols["site_0"])
        self.code[entry + 5 : entry + 5 + len(SUM_OF_ARGUMENTS)] = SUM_OF_ARGUMENTS

    def call(self, *arguments: int) -> int:
        function = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 6)(FUNCTION)
        return int(function(*arguments))

    def hits(self, number: int) -> int:
        return self._word(COUNTERS[number])

    @property
    def lost(self) -> int:
        return self._word(POSITION + 8)

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("<Q", self.per_cpu, at)[0])

    @property
    def records(self) -> list[tuple[int, int]]:
        """Probe and field of each record, in the order of their numbers."""
        found = {}
        for chunk in range(SLOTS // CHUNK_SLOTS):
            at = struct.unpack_from("<Q", self.data, CHUNKS - DATA + 8 * chunk)[0] - DATA
            for slot in range(CHUNK_SLOTS):
                seq, _, _, probe, _, comm, field = struct.unpack_from(
                    "<QQQIi16sQ", self.data, at + SLOT * slot
                )
                if seq:
                    assert comm.rstrip(b"\0") == b"tested"
                    assert seq == CHUNK_SLOTS * chunk + slot + 1
                    found[seq] = (probe, field)
        return [found[seq] for seq in sorted(found)]


def _jump(at: int, to: int) -> bytes:
    return b"\xe9" + (to - at - 5).to_bytes(4, "little", signed=True)


@pytest.fixture
def stubbed() -> Iterator[Stubbed]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    mapped: list[int] = []

    def memory(at: int) -> ctypes.Array[ctypes.c_char]:
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        fixed_noreplace = 0x100000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace
        assert libc.mmap(at, SIZE, protection, flags, -1, 0) == at
        mapped.append(at)
        return (ctypes.c_char * SIZE).from_address(at)

    yield Stubbed(memory)
    for at in mapped:
        assert libc.munmap(at, SIZE) == 0


def body(condition: str | None, fill: str) -> Body:
    return Body(condition, fill, (), 56, (), False, False)


def test_filter(stubbed: Stubbed) -> None:
    stubbed.probe(body("\treturn c->di % 3 == 1 && c->r9 == 600;", FIFTH))
    for n in range(10):
        assert stubbed.call(n, 2, 30, 400, 50 + n, 600) == n + 1082 + n
    assert stubbed.call(1, 2, 3, 4, 5, 6) == 21
    assert stubbed.hits(0) == 11
    assert stubbed.records == [(1, 51), (1, 54), (1, 57)]


def test_filters_of_two_probes_are_apart(stubbed: Stubbed) -> None:
    stubbed.probe(body("\treturn c->di == 5;", RDI), body("\treturn c->di > 4;", FIFTH))
    for n in range(7):
        assert stubbed.call(n, 0, 0, 0, 7, 0) == n + 7
    assert (stubbed.hits(0), stubbed.hits(1)) == (7, 7)
    assert stubbed.records == [(1, 5), (2, 7), (2, 7)]


def test_a_condition_that_fails_is_counted(stubbed: Stubbed) -> None:
    stubbed.probe(body("\treturn c->di == 2 ? -1 : (int)c->di;", RDI), body(None, RDI))
    for n in range(4):
        assert stubbed.call(n, 0, 0, 0, 0, 0) == n
    assert stubbed.records == [(2, 0), (1, 1), (2, 1), (2, 2), (1, 3), (2, 3)]
    assert struct.unpack_from("<4Q", stubbed.per_cpu, COUNTERS[0]) == (4, 0, 1, 0)


def test_full_ring(stubbed: Stubbed) -> None:
    stubbed.probe(body(None, RDI))
    for n in range(SLOTS + 3):
        assert stubbed.call(n, 0, 0, 0, 0, 0) == n
    assert (stubbed.hits(0), stubbed.lost) == (SLOTS + 3, 3)
    assert stubbed.records == [(1, n) for n in range(SLOTS)]
