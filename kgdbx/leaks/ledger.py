"""The ledger of allocations that code of ours keeps in the guest, seen from the host."""

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import drgn
import numpy as np

from kgdbx.errors import ProbeError, SymbolError
from kgdbx.leaks.allocators import Allocator
from kgdbx.resident.compile.codegen import Body
from kgdbx.resident.engine import Engine
from kgdbx.resident.record import HEADER
from kgdbx.symbols.kernel import Kernel

__all__ = (
    "Counters",
    "GuestLedger",
    "LATE",
    "Live",
    "NAMES",
    "RECORD",
    "Range",
    "STACK",
    "UNALLOCATED",
)

NAMES = 32
"""Modules that can be told apart."""

STACK, UNALLOCATED, LATE = range(3)
"""What a record says: a stack that is new, a free of what is not in the ledger, one of what an
earlier session allocated.
"""

_FRAMES = 22
RECORD = np.dtype(
    [
        *HEADER.descr,
        ("stack", "<u8"),
        ("address", "<u8"),
        ("what", "<u4"),
        ("count", "<u4"),
        ("session", "<u8"),
        ("frames", "<u8", (_FRAMES,)),
    ]
)
"""``struct watch_record``, ledger.h."""

_BLOCK = struct.Struct("<QQQII16sQQ")  # struct block
_CONTROL = struct.Struct("<QQQQQQQ")  # struct control, up to its counters
_COUNTERS_AT = _CONTROL.size
_COUNTERS = struct.Struct(f"<QQQ{NAMES}Q{NAMES}Q")
_RANGES_AT = _COUNTERS_AT + _COUNTERS.size
_RANGE = struct.Struct("<QQQ")
_MAX_RANGES = 64
_RECENT_BITS = 7  # sets of struct recent
_RECENT_WAYS = 4
_RECENT_BYTES = 64 * _RECENT_WAYS << _RECENT_BITS
_BUCKET_KEYS = 7
_BUCKET_BYTES = 64
_SEEN_SETS = 256
_SEEN_BYTES = _SEEN_SETS * 16 * 512
_BUCKET_BITS = (13, 12, 11, 10)
_PAGE_BYTES = 4096
_FROM_INTERRUPT = 1
# Where a kernel has handle_softirqs(), __do_softirq() only jumps there.
_BORDERS = ("__schedule", "handle_softirqs", "__do_softirq")
_INFO = 0xFFFF  # of a stack's number


@dataclass(frozen=True)
class Range:
    """Memory whose code is watched.

    :ivar start: guest-virtual
    :ivar module: number of its module, below :data:`NAMES`
    """

    start: int
    size_bytes: int
    module: int


@dataclass(frozen=True)
class Live:
    """A block that is in the ledger.

    :ivar stack: number of the stack that allocated it
    :ivar module: number of the module that it belongs to
    :ivar time_ns: when, of the guest's time since it was booted, to a tick
    :ivar from_interrupt: the task had nothing to do with it
    """

    address: int
    size_bytes: int
    stack: int
    module: int
    time_ns: int
    pid: int
    comm: str
    session: int
    from_interrupt: bool


@dataclass(frozen=True)
class Counters:
    """What the guest counted.

    :ivar full: allocations that found no place in the ledger
    :ivar replaced: addresses that were allocated again without a free that was seen
    :ivar unsaid: records that found the ring full
    :ivar allocations: by the number of the module
    :ivar frees: the same
    """

    full: int = 0
    replaced: int = 0
    unsaid: int = 0
    allocations: tuple[int, ...] = (0,) * NAMES
    frees: tuple[int, ...] = (0,) * NAMES

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(
            self.full - other.full,
            self.replaced - other.replaced,
            self.unsaid - other.unsaid,
            tuple(a - b for a, b in zip(self.allocations, other.allocations, strict=True)),
            tuple(a - b for a, b in zip(self.frees, other.frees, strict=True)),
        )


class GuestLedger:
    """Memory of the guest's with what is allocated, and the C that keeps it.

    :raises ProbeError: if the guest has no memory for it
    """

    def __init__(self, kernel: Kernel, engine: Engine) -> None:
        self._host = engine.host
        self._control = engine.allocate(_PAGE_BYTES)
        self._seen = engine.allocate(_SEEN_BYTES)
        self._recent = engine.allocate(_RECENT_BYTES)
        self._bits, self._buckets, self._blocks = _table(engine)
        self._tick_ns = kernel.memory.read_u64(kernel.address("tick_nsec"))
        # INITIAL_JIFFIES, include/linux/jiffies.h
        self._first_jiffy = -300 * round(10**9 / self._tick_ns) & 0xFFFFFFFF
        self.source = self._source(kernel)
        self._seed = 1

    def body(self, allocator: Allocator) -> Body:
        """The code for a function that allocates, frees or changes a size."""
        each, count = int(allocator.count is not None), allocator.count or "1"
        address, quiet = allocator.address, int(allocator.kind == "transfer")
        if allocator.kind == "allocate":
            text = f"ALLOCATOR(@N@, {each}, {address}, {allocator.size}, {count})\n"
        elif allocator.kind == "resize":
            text = f"RESIZER(@N@, {address}, {allocator.size})\n"
        else:
            text = f"RELEASER(@N@, {each}, {address}, {quiet}, {count})\n"
        return Body(
            None,
            "",
            ("0",) * 5,
            RECORD.itemsize,
            (),
            False,
            True,
            handlers=text,
            shared=self.source,
        )

    def configure(self, ranges: Sequence[Range], session: int, probes: range) -> None:
        """Say whose allocations count. The guest stands.

        :param probes: numbers of the probes at what allocates and frees
        :raises ProbeError: if there are too many ranges
        """
        if len(ranges) > _MAX_RANGES:
            raise ProbeError(f"the watched modules have more than {_MAX_RANGES} areas of memory")
        self._seed = self._seed * 0x5851F42D4C957F2D + 1 & (1 << 64) - 1
        low = min((r.start for r in ranges), default=0)
        span = max((r.start + r.size_bytes for r in ranges), default=0) - low
        self._host.write(self._seen, bytes(_SEEN_BYTES))  # code may be another's now
        packed = b"".join(_RANGE.pack(r.start, r.size_bytes, r.module) for r in ranges)
        self._host.write(self._control + _RANGES_AT, packed)
        head = (low, span, self._seed, session, probes.start, len(probes), len(ranges))
        self._host.write(self._control, _CONTROL.pack(*head))

    def mark(self, session: int) -> None:
        """From now on blocks are of another session. The guest may run."""
        self._host.write(self._control + 24, session.to_bytes(8, "little"))

    def counters(self) -> Counters:
        """What was counted since the beginning."""
        data = self._host.read(self._control + _COUNTERS_AT, _COUNTERS.size)
        full, replaced, unsaid, *rest = _COUNTERS.unpack(data)
        return Counters(full, replaced, unsaid, tuple(rest[:NAMES]), tuple(rest[NAMES:]))

    def live(self) -> Iterator[Live]:
        """The blocks that are allocated now, those of each module in the order of their allocation.

        If the guest runs, it goes on meanwhile.
        """
        data = self._host.read(self._buckets, _BUCKET_BYTES << self._bits)
        keys = np.frombuffer(data, "<u8").reshape(-1, _BUCKET_BYTES // 8)[:, :_BUCKET_KEYS]
        found: list[tuple[int, tuple[Any, ...]]] = []
        for bucket, key in np.argwhere(keys > 1):  # 1 is in the making
            at = self._blocks + (int(bucket) * _BUCKET_KEYS + int(key)) * _BLOCK.size
            found.append((int(keys[bucket, key]), _BLOCK.unpack(self._host.read(at, _BLOCK.size))))
        for address, block in sorted(found, key=lambda each: each[1][-1]):
            size, stack, jiffies, pid, _, comm, session, order = block
            yield Live(
                address,
                size,
                stack & ~_INFO,
                stack >> 8 & NAMES - 1,
                (jiffies - self._first_jiffy) * self._tick_ns,
                pid,
                comm.split(b"\0")[0].decode("utf-8", "replace"),
                session,
                bool(order & _FROM_INTERRUPT),
            )

    def _source(self, kernel: Kernel) -> str:
        entry = kernel.address("__entry_text_start")
        constants = {
            "CONTROL": self._control,
            "SEEN": self._seen,
            "RECENT_CALLS": self._recent,
            "RECENT_BITS": _RECENT_BITS,
            "RECENT_WAYS": _RECENT_WAYS,
            "SEEN_SETS": _SEEN_SETS,
            "BUCKETS": self._buckets,
            "BLOCKS": self._blocks,
            "BUCKET_BITS": self._bits,
            "DIRECT_MAP": kernel.memory.direct_map,
            "JIFFIES": kernel.address("jiffies_64"),
            "VMEMMAP": kernel.memory.read_u64(kernel.address("vmemmap_base")),
            "PAGE_STRUCT_BYTES": _type(kernel, "struct page").size,
            "OBJECT_SIZE": int(_type(kernel, "struct kmem_cache").member("object_size").offset),
            # As large as THREAD_SIZE: arch/x86/include/asm/page_64_types.h
            "STACK_BYTES": _type(kernel, "struct irq_stack").size,
            "ENTRY_TEXT": entry,
            "ENTRY_TEXT_BYTES": kernel.address("__entry_text_end") - entry,
        }
        lines = "".join(f"#define {name} {value:#x}UL\n" for name, value in constants.items())
        borders = [(entry, constants["ENTRY_TEXT_BYTES"]), *_borders(kernel)]
        tests = " || ".join(f"(at) - {start:#x}UL < {size:#x}UL" for start, size in borders)
        lines += f"#define IS_BORDER(at) ({tests})\n"
        return lines + resources.files("kgdbx.leaks").joinpath("ledger.h").read_text("utf-8")


def _table(engine: Engine) -> tuple[int, int, int]:
    # Large pieces may not be had in a guest that has run for long.
    for bits in _BUCKET_BITS:
        try:
            buckets = engine.allocate(_BUCKET_BYTES << bits)
            return bits, buckets, engine.allocate(_BLOCK.size * 8 << bits)
        except ProbeError:
            if bits == _BUCKET_BITS[-1]:
                raise
    raise AssertionError("no size is left")


# Functions of which what they call is done for others than who has called them.
def _borders(kernel: Kernel) -> Iterator[tuple[int, int]]:
    for name in _BORDERS:
        with contextlib.suppress(SymbolError):
            yield from ((f.address, f.size_bytes) for f in kernel.functions(name))


def _type(kernel: Kernel, name: str) -> drgn.Type:
    found = kernel.program.type(name)
    assert isinstance(found, drgn.Type)
    return found
