"""What we hold of the guest: memory, the window to it, and what was put there."""

import struct
import time
from collections.abc import Callable, Iterable, Sequence, Set

from kgdbx.errors import ProbeError
from kgdbx.resident.bells import Bells, make_bells
from kgdbx.resident.clock import Clock, clock_from_sample
from kgdbx.resident.compile.aggregate import MapShape
from kgdbx.resident.compile.kernel_facts import KernelFacts
from kgdbx.resident.guest_call import Call, GuestCaller, Script
from kgdbx.resident.guest_code import GuestCode
from kgdbx.resident.heap import Heap
from kgdbx.resident.host import HostView
from kgdbx.resident.journal import Journal
from kgdbx.resident.memory import PAGE_BYTES, GuestMemory, Window, free_bytes
from kgdbx.resident.program import CodeUnit, Program, user_code
from kgdbx.resident.returns import NEXT_AT, SLOT_BYTES
from kgdbx.resident.ring import Stream, make_stream, slot_size
from kgdbx.resident.table import CONTROL_BYTES, Table, make_table
from kgdbx.symbols.kernel import Kernel

__all__ = ("Holding", "take_hold")

_PROBE_BYTES = 64  # struct probe
_COUNTERS_BYTES = 32  # struct counters
_COUNTERS_CHUNK_BYTES = 2048
_RING_CONTROL_BYTES = 32  # struct ring
_RINGS_SHARE = 4
_PER_CPU_S = 5.0


class Holding:
    """Memory of the guest's, from the first probe to the last.

    :ivar per_cpu_offsets: ``__per_cpu_offset`` of each CPU
    :ivar streams: rings by the size of their slots
    :ivar tables: what hits are summed up in
    :ivar code: handlers and stubs
    :ivar data: what they read
    """

    def __init__(
        self,
        kernel: Kernel,
        host: HostView,
        memory: GuestMemory,
        window: Window,
        journal: Journal,
        facts: KernelFacts,
        per_cpu_offsets: list[int],
    ) -> None:
        self._kernel = kernel
        self._host = host
        self.memory = memory
        self.window = window
        self.journal = journal
        self.facts = facts
        self.per_cpu_offsets = per_cpu_offsets
        self.code = GuestCode(Heap(memory, window))
        self.data = Heap(memory, window)
        self.streams: dict[int, Stream] = {}
        self.tables: dict[MapShape, Table] = {}
        self.bells: Bells | None = None
        self.clock: Clock | None = None
        self._sample = 0
        self._counters: list[int] = []
        self._retired: dict[Program, None] = {}

    def sample_clock(self) -> Script[None]:
        """Read the guest's clock beside its time stamp counter, by code of ours."""
        yield Call(self.code.symbols["sample_clock"], (self._sample,))
        sample = self._kernel.memory.read(self._sample, 24)
        self.clock = clock_from_sample(self._kernel, sample)

    def take_memory(
        self, programs: Sequence[Program], ring_bytes: int, overwrite: bool
    ) -> Script[None]:
        """Take what programs need, and give them their places in it.

        :param ring_bytes: size of each CPU's rings, a power of two; less if that is more than a
            quarter of what the guest has free
        :param overwrite: the newest records win when the host does not keep up
        """
        known = self._known
        try:
            yield from self._take_memory(programs, ring_bytes, overwrite)
        finally:
            self._note_new(known)
        for program in programs:
            if program.body is not None and program.body.map is not None:
                program.table = self.tables[program.body.map]
            elif program.body is not None:
                program.stream = self.streams[slot_size(program.body.record_bytes)]

    def _take_memory(
        self, programs: Sequence[Program], ring_bytes: int, overwrite: bool
    ) -> Script[None]:
        cpus = len(self.per_cpu_offsets)
        for program in programs:
            if program.kind == "r" and program.body is not None:
                program.slot_bytes = SLOT_BYTES + 8 * len(program.body.saves)
        controls = _RING_CONTROL_BYTES * cpus
        bodies = [program.body for program in programs if program.body is not None]
        sizes = {slot_size(body.record_bytes) for body in bodies if body.map is None}
        sizes -= set(self.streams)
        maps = dict.fromkeys(body.map for body in bodies if body.map is not None)
        new_maps = [shape for shape in maps if shape not in self.tables]
        if not self._sample:
            self._sample = yield from self.data.place(64)
            self.code.symbols["return_probes"] = yield from self.data.place(64)
            self.code.symbols["window_used"] = yield from self.data.place(64)
        for size in sorted(sizes):
            at = yield from self.data.place(controls)
            share = max(PAGE_BYTES, free_bytes(self._kernel) // _RINGS_SHARE // cpus)
            each = min(ring_bytes, 1 << share.bit_length() - 1)
            stream = yield from make_stream(
                self.memory, at, self.per_cpu_offsets, size, each, overwrite
            )
            stream.start(self._host)
            self.streams[size] = stream
        for shape in new_maps:
            at = yield from self.data.place(CONTROL_BYTES * cpus)
            table = yield from make_table(self.memory, at, cpus, shape)
            table.start(self._host)
            self.tables[shape] = table
        if self.bells is None and any(program.kind == "bell" for program in programs):
            self.bells = yield from make_bells(self.memory, cpus)
        for program in programs:
            program.address = yield from self._take_data(program, _PROBE_BYTES)
            if program.kind == "r":
                size = program.maxactive * program.slot_bytes
                program.slots = yield from self._take_data(program, size)
        for program, code in user_code(programs):
            program.user_data = yield from self._take_data(program, code.object.data_bytes)

    def link_returns(self, programs: Iterable[Program]) -> None:
        """Have the guest find the calls that return probes wait for, and how far it may read."""
        used = self.window.used_bytes
        self._host.write(self.code.symbols["window_used"], used.to_bytes(8, "little"))
        following = 0
        for program in programs:
            if program.kind == "r" and program.body is not None:
                self._host.write(program.address + NEXT_AT, following.to_bytes(8, "little"))
                following = program.address
        self._host.write(self.code.symbols["return_probes"], following.to_bytes(8, "little"))

    def take_counters(
        self, caller: GuestCaller, run_on: Callable[[], None], programs: Sequence[Program]
    ) -> None:
        """Have counters for programs.

        Of per-CPU memory little is ready at once. When that is used up, a worker of the guest's
        makes more as soon as it runs: pcpu_balance_workfn() in mm/percpu.c.

        :param run_on: lets the guest run for a moment
        :raises ProbeError: if there is still none after 5 s
        """
        deadline = time.monotonic() + _PER_CPU_S
        while len(self._counters) < len(programs):
            known = self._known
            try:
                caller.run(self._more_counters(len(programs)))
            except ProbeError:
                if time.monotonic() > deadline:
                    raise
                run_on()
            finally:
                self._note_new(known)
        for program in programs:
            program.counters = self._counters.pop()

    def take_code(self, caller: GuestCaller, size_bytes: int) -> CodeUnit:
        """A place for code."""
        heap = self.code.heap
        if not heap.fits(size_bytes):
            known = self._known
            try:
                caller.run(heap.room(size_bytes))
            finally:
                self._note_new(known)
            self.journal.note(code=heap.ranges[-1])
        return self.code.take(size_bytes)

    def _take_data(self, program: Program, size_bytes: int) -> Script[int]:
        address = yield from self.data.place(size_bytes)
        program.data.append((address, size_bytes))
        return address

    def retire(self, programs: Iterable[Program]) -> None:
        """Remember what probes leave that are gone, or were never placed."""
        self._retired.update(dict.fromkeys(programs))

    def unneeded_bytes(self, needed: Iterable[CodeUnit]) -> int:
        """How much could be reclaimed.

        :param needed: the code that is in use
        """
        code = sum(unit.size_bytes for unit in self.code.unneeded(needed))
        return code + sum(size for program in self._retired for _, size in program.data)

    def reclaim(self, needed: Iterable[CodeUnit], kept: Set[Program]) -> None:
        """Have what retired probes leave serve others; nothing in the guest is inside of it.

        :param needed: the code that is in use
        :param kept: retired probes whose data are in use
        """
        self.code.give_back(self.code.unneeded(needed))
        gone = [program for program in self._retired if program not in kept]
        slots = [program.slots for program in gone if program.slots]
        if slots:
            self.journal.note(no_slots=slots)
        for program in gone:
            for address, size_bytes in program.data:
                self.data.give_back(address, size_bytes)
            if program.counters:
                for offset in self.per_cpu_offsets:
                    at = (program.counters + offset) & (1 << 64) - 1
                    self._host.write(at, bytes(_COUNTERS_BYTES))
                self._counters.append(program.counters)
            del self._retired[program]

    def take_block(self, caller: GuestCaller, size_bytes: int) -> int:
        """Address of zeroed pages in the direct map."""
        known = self._known
        block = caller.run(self.memory.pages(size_bytes))
        self._note_new(known)
        return block.address

    def resolve(self, name: str) -> int | None:
        """Address of a symbol of ours or of the kernel's."""
        found = self.code.symbols.get(name)
        return found if found is not None else self._kernel.object_address(name)

    def _more_counters(self, count: int) -> Script[None]:
        while len(self._counters) < count:
            chunk = yield from self.memory.per_cpu(_COUNTERS_CHUNK_BYTES)
            self._counters += range(chunk, chunk + _COUNTERS_CHUNK_BYTES, _COUNTERS_BYTES)

    @property
    def _known(self) -> tuple[int, int]:
        return len(self.memory.blocks), len(self.memory.percpu)

    def _note_new(self, known: tuple[int, int]) -> None:
        blocks, percpu = self.memory.blocks[known[0] :], self.memory.percpu[known[1] :]
        if blocks:
            self.journal.note(blocks=[(b.address, b.size_bytes) for b in blocks])
        if percpu:
            self.journal.note(percpu=percpu)


def take_hold(
    kernel: Kernel, host: HostView, make_journal: Callable[[], Journal]
) -> Script[Holding]:
    """Take the first memory, and find room for the window.

    :param make_journal: makes the journal, before anything is changed
    """
    journal = make_journal()
    memory = GuestMemory(kernel)
    try:
        guard = yield from memory.per_cpu(64)
        journal.note(percpu=memory.percpu)
        window = Window(kernel, memory, journal.note)
    except BaseException:
        journal.close()
        raise
    cpus = kernel.memory.read_u32(kernel.address("nr_cpu_ids"))
    offsets = struct.unpack(
        f"<{cpus}Q", kernel.memory.read(kernel.address("__per_cpu_offset"), 8 * cpus)
    )
    facts = KernelFacts.of(kernel, guard, window.start, window.end - window.start)
    return Holding(kernel, host, memory, window, journal, facts, list(offsets))
