"""The resident probes of one guest: placed together, counted, drained, and taken out again."""

import contextlib
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from kgdbx.errors import MemoryFault, ProbeError
from kgdbx.resident.bells import Bells
from kgdbx.resident.build import Builder, jump
from kgdbx.resident.clock import IDENTITY, Clock
from kgdbx.resident.compile.aggregate import MapShape
from kgdbx.resident.guest_call import GuestCaller
from kgdbx.resident.holding import Holding, take_hold
from kgdbx.resident.host import HostView
from kgdbx.resident.journal import Journal, Patch
from kgdbx.resident.place.displace import Displacement, displace, tasks_inside
from kgdbx.resident.place.displacement import FTRACE_NOP
from kgdbx.resident.program import Counts, Program, Site
from kgdbx.resident.returns import (
    RET_ADDR_AT,
    TASK_AT,
    PendingReturn,
    pending_returns,
    true_return,
)
from kgdbx.resident.ring import RING_BYTES, Batch, Stream
from kgdbx.resident.table import Table
from kgdbx.symbols.blacklist import Blacklist
from kgdbx.symbols.kernel import Function, Kernel
from kgdbx.symbols.memory import KernelMemory
from kgdbx.target.base import Stop
from kgdbx.target.ram import GuestRam

__all__ = ("Engine",)

_COUNTERS_BYTES = 32  # struct counters
_JUMP_BYTES = 5
_ENDBR_BYTES = 4
_QUIESCE_S = 10.0
_QUIESCE_STEP_S = 0.01


class Engine:
    """Runs probes inside a guest.

    :param dispatch: handles stops that come while the guest makes calls for us
    :param ram: the guest's RAM seen from the host; None drains at stops only
    :param make_journal: makes the journal when the first probe is placed
    :param ring_bytes: size of each CPU's rings, a power of two; there is one for each size of
        records, and less if the guest has no more
    :param overwrite: the newest records win when the host does not keep up
    :ivar ring_bytes: what rings that are still to be made get
    :ivar overwrite: as given, for rings that are still to be made
    :ivar placed_listeners: called when probes were placed
    :param handling: the vCPU whose handlers run: the guest must not go on from there
    """

    def __init__(
        self,
        kernel: Kernel,
        dispatch: Callable[[Stop], bool],
        ram: GuestRam | None,
        make_journal: Callable[[], Journal],
        *,
        ring_bytes: int = RING_BYTES,
        overwrite: bool = False,
        handling: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.kernel = kernel
        self.host = HostView(kernel, ram)
        self.programs: dict[int, Program] = {}
        self._caller = GuestCaller(kernel, dispatch, handling)
        self._make_journal = make_journal
        self.ring_bytes = ring_bytes
        self.overwrite = overwrite
        self._holding: Holding | None = None
        self._builder = Builder(kernel, self.host, self._caller)
        self._sites: dict[int, Site] = {}
        self._next_id = 1
        self._ever: dict[Program, None] = {}  # return probes that were taken out
        self._lifted: set[int] = set()  # sites without their jump: ftrace's call is there
        self.placed_listeners: list[Callable[[], None]] = []
        self._batch: list[Program] | None = None
        self._removals: list[Program] | None = None
        self._blacklist: Blacklist | None = None

    def displacement(self, function: Function, address: int) -> Displacement:
        """What gives way to a jump at an address, patched by us already or not.

        :raises CannotDisplace: if nothing can
        """
        for at in (address, address + _ENDBR_BYTES):
            site = self._sites.get(at)
            if site and (at == address or address == function.address):
                return site.displacement
        if self._blacklist is None:
            self._blacklist = Blacklist(self.kernel)
        originals = {at: site.displacement.original for at, site in self._sites.items()}
        return displace(self.kernel, function, address, self._blacklist, originals)

    @property
    def _streams(self) -> tuple[Stream, ...]:
        return tuple(self._holding.streams.values()) if self._holding is not None else ()

    @property
    def bells(self) -> Bells | None:
        """Where hits wait for the host, if any probe has them do so."""
        return self._holding.bells if self._holding is not None else None

    @property
    def clock(self) -> Clock:
        """From the time stamps in the records to the guest's monotonic nanoseconds."""
        return (self._holding and self._holding.clock) or IDENTITY

    def owns(self, address: int) -> bool:
        """Whether code of ours is at an address."""
        window = self._holding.window if self._holding is not None else None
        return window is not None and window.start <= address < window.end

    @property
    def calling(self) -> bool:
        """Whether the guest makes calls for us now, and the rest has to wait."""
        return self._caller.calling

    def gs_base(self, cpu: int) -> int:
        """The kernel's ``gs`` base on a vCPU."""
        assert self._holding is not None
        return self._holding.per_cpu_offsets[cpu]

    @property
    def is_open(self) -> bool:
        """Whether the guest has memory of ours."""
        return self._holding is not None

    @property
    def taken(self) -> tuple[tuple[int, int], ...]:
        """The guest's memory that is ours: guest-virtual ``(start, size_bytes)`` in the direct map,
        and of per-CPU memory as ``alloc_percpu()`` gave it, whose size is not known: 1.
        """
        if self._holding is None:
            return ()
        memory = self._holding.memory
        blocks = ((block.address, block.size_bytes) for block in memory.blocks)
        return (*blocks, *((address, 1) for address in memory.percpu))

    def allocate(self, size_bytes: int) -> int:
        """Zeroed memory of the guest's, physically contiguous, until the engine is closed.

        :param size_bytes: a power of two of pages, at most 4 MiB
        :return: guest-virtual address, in the direct map
        :raises ProbeError: if the guest has no more
        """
        return self._hold().take_block(self._caller, size_bytes)

    # Placing

    def install(self, programs: Sequence[Program]) -> None:
        """Place probes, all or none. The kernel stands.

        :raises ProbeError: if one cannot be placed; nothing is changed then
        """
        for program in programs:
            program.id = self._next_id
            self._next_id += 1
        if self._batch is not None:
            self._batch += programs
        elif programs:
            self._install(programs)

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Place all that is installed meanwhile at the end, at once: much faster than one by one.

        Within another batch, at the end of that.

        :raises ProbeError: if one cannot be placed; nothing is changed then
        """
        if self._batch is not None:
            yield
            return
        self._batch = []
        try:
            yield
            programs = self._batch
        finally:
            self._batch = None
        if programs:
            self._install(programs)

    def _install(self, programs: Sequence[Program]) -> None:
        holding = self._hold()
        holding.take_counters(self._caller, self._run_on, len(programs))
        self._caller.run(holding.take_memory(programs, self.ring_bytes, self.overwrite))
        changed: dict[int, Site] = {}
        for program in programs:
            address = program.displacement.address
            old = self._sites.get(address)
            site = changed.setdefault(
                address, Site(program.displacement, list(old.programs) if old else [])
            )
            site.programs.append(program)
            # What only looks comes first: it sees the call whatever is decided of it.
            site.programs.sort(key=lambda p: p.decision is not None)
        stubs = self._builder.build(holding, changed, programs)
        if holding.clock is None:
            self._caller.run(holding.sample_clock())
        holding.link_returns((*self.programs.values(), *programs))
        self._patch(holding, changed, stubs)
        self.programs.update((program.id, program) for program in programs)
        for listener in self.placed_listeners:
            listener()

    @contextlib.contextmanager
    def removals(self) -> Iterator[None]:
        """Take out all that is uninstalled meanwhile at the end, at once."""
        self._removals = []
        try:
            yield
        finally:
            programs, self._removals = self._removals, None
            self.uninstall(programs)

    def uninstall(self, programs: Iterable[Program]) -> None:
        """Take probes out, newest first; calls in progress return as if nothing had been."""
        if self._removals is not None:
            self._removals += programs
            return
        holding = self._holding
        gone = dict.fromkeys(p for p in programs if self.programs.get(p.id) is p)
        if holding is None or not gone:
            return
        rebuilt: dict[int, Site] = {}
        restored: list[Site] = []
        for address in dict.fromkeys(p.displacement.address for p in reversed(gone)):
            site = self._sites[address]
            rest = [p for p in site.programs if p not in gone]
            if rest:
                rebuilt[address] = Site(site.displacement, rest)
            else:
                restored.append(self._sites.pop(address))
        for site in restored:
            self._restore(site)
        self._lifted.difference_update(site.displacement.address for site in restored)
        holding.journal.restored(site.displacement.address for site in restored)
        if rebuilt:
            self._patch(holding, rebuilt, self._builder.build(holding, rebuilt, ()))
        self._restore_returns(gone)
        for program in gone:
            del self.programs[program.id]
        holding.link_returns(self.programs.values())

    def close(self) -> None:
        """Take everything out and give the guest its memory back.

        A guest that has panicked gets its code back; its memory is of no use to it any more.

        :raises ProbeError: if something of ours is still in use in the guest after 10 s; what is
            left does nothing, and stays until the guest reboots
        """
        holding = self._holding
        if holding is None:
            return
        self.uninstall(tuple(self.programs.values()))
        if self.kernel.panicked:
            self._let_go(holding)
            return
        code = holding.code.ranges
        if not self.wait_until_unused(code, lambda: self._restore_returns(self._ever)):
            holding.journal.leave()
            self._holding = None
            raise ProbeError(
                "tasks in the guest are still inside code of ours: it stays, and does nothing"
            )
        holding.window.close()
        self.host.forget()
        memory = holding.memory
        self._caller.run(memory.give_back(memory.blocks, memory.percpu))
        self._let_go(holding)

    def _let_go(self, holding: Holding) -> None:
        holding.journal.close()
        self._holding = None
        self._ever.clear()

    # Beside the guest's own ftrace

    @property
    def ftrace_sites(self) -> set[int]:
        """Where jumps stand in place of the NOP that ftrace writes its calls over."""
        return {
            address
            for address, site in self._sites.items()
            if site.displacement.is_ftrace_nop and address not in self._lifted
        }

    def lift(self, addresses: Sequence[int]) -> None:
        """Put the NOPs back, and keep the probes. The kernel stands."""
        holding = self._holding
        assert holding is not None
        for address in addresses:
            self._restore(self._sites[address])
            self._lifted.add(address)
        holding.journal.restored(addresses)

    def put_back(self) -> list[int]:
        """Write the jumps of lifted sites where there are NOPs again. The kernel stands.

        :return: where that was
        """
        holding = self._holding
        free = [
            address
            for address in self._lifted
            if self.kernel.read_code(address, _JUMP_BYTES) == FTRACE_NOP
        ]
        if holding is not None and free:
            self._lifted.difference_update(free)
            sites = [self._sites[address] for address in free]
            patches = [Patch(s.displacement.address, FTRACE_NOP, s.jump) for s in sites]
            holding.journal.patches(patches)
            for patch in patches:
                self._write_code(patch.address, patch.replacement)
        return free

    # Results

    def drain(self) -> Iterator[Batch]:
        """Whole records, each CPU's in order. Live where the host sees the guest's RAM."""
        for stream in self._streams:
            yield from stream.drain(self.host)

    @property
    def in_flight(self) -> bool:
        """Whether a record was being written when its ring was drained last."""
        return any(stream.in_flight for stream in self._streams)

    def lost(self) -> int:
        """Records that were lost so far because a ring was full, or overwritten."""
        return sum(stream.lost(self.host) for stream in self._streams)

    @property
    def buffer_bytes(self) -> int | None:
        """Size of the smallest ring; None without any."""
        sizes = (stream.slots * stream.slot_bytes for stream in self._streams)
        return min(sizes, default=None)

    def table(self, shape: MapShape) -> Table | None:
        """The tables of a map, if any probe has added to it."""
        return self._holding.tables.get(shape) if self._holding is not None else None

    def counts(self, program: Program) -> Counts:
        """What the guest counted of a probe."""
        assert self._holding is not None
        totals = [0, 0, 0, 0]
        for offset in self._holding.per_cpu_offsets:
            data = self.host.read((program.counters + offset) & (1 << 64) - 1, _COUNTERS_BYTES)
            for n, value in enumerate(struct.unpack("<QQQQ", data)):
                totals[n] += value
        return Counts(*totals)

    def pending(self, program: Program) -> list[PendingReturn]:
        """Calls of a return probe that are in progress."""
        if not program.maxactive:
            return []
        data = self.host.read(program.slots, program.maxactive * program.slot_bytes)
        return list(pending_returns(data, program.slots, program.slot_bytes))

    def reap(self, program: Program, is_dead: Callable[[PendingReturn], bool]) -> int:
        """Free the slots of calls that will never return; how many there were."""
        dead = [pending for pending in self.pending(program) if is_dead(pending)]
        for pending in dead:
            self.host.write(pending.slot + TASK_AT, bytes(8))
            self.host.write(pending.slot, bytes(8))
        return len(dead)

    def true_return(self, address: int) -> int:
        """Where a call returns to whose return address may name one of our slots."""
        if self._holding is None:
            return address
        window = self._holding.window
        return true_return(self.kernel, address, window.start, window.end)

    @contextlib.contextmanager
    def _true_stacks(self) -> Iterator[None]:
        memory = self.kernel.memory
        stubs: dict[int, int] = {}
        for program in self.programs.values():
            for pending in self.pending(program):
                if _stands_at(memory, pending):
                    stubs[pending.place] = pending.stub
        try:
            for place, stub in stubs.items():
                memory.write(place, self.true_return(stub).to_bytes(8, "little"))
            yield
        finally:
            for place, stub in stubs.items():
                memory.write(place, stub.to_bytes(8, "little"))

    # Parts of placing

    def _hold(self) -> Holding:
        if self._holding is None:
            self.kernel.true_stacks = self._true_stacks
            self._holding = self._caller.run(take_hold(self.kernel, self.host, self._make_journal))
        return self._holding

    def _patch(
        self,
        holding: Holding,
        sites: dict[int, Site],
        stubs: dict[int, int],
    ) -> None:
        self._wait_until_free([s.displacement for a, s in sites.items() if a not in self._sites])
        patches: list[Patch] = []
        for address, site in sites.items():
            site.jump = jump(address, stubs[address])
            if address in self._lifted:
                continue
            original = site.displacement.original[:_JUMP_BYTES]
            patches.append(Patch(address, original, site.jump))
        holding.journal.patches(patches)
        done: list[Patch] = []
        try:
            for patch in patches:
                self._write_code(patch.address, patch.replacement)
                done.append(patch)
        except BaseException:
            for patch in reversed(done):
                old = self._sites.get(patch.address)
                self._write_code(patch.address, old.jump if old else patch.original)
            raise
        self._sites.update(sites)

    def _wait_until_free(self, displacements: Sequence[Displacement]) -> None:
        # A 5-byte NOP is one instruction: nothing can be inside of it.
        ranges = [
            (d.address, d.address + len(d.original)) for d in displacements if not d.is_ftrace_nop
        ]
        deadline = time.monotonic() + _QUIESCE_S
        while ranges and (inside := tasks_inside(self.kernel, ranges)):
            if time.monotonic() > deadline:
                raise ProbeError(f"the bytes to replace are in use: {inside[0]}")
            self._run_on()

    def wait_until_unused(
        self, ranges: Sequence[tuple[int, int]], at_stop: Callable[[], None]
    ) -> bool:
        """Let the guest run until nothing in it is inside ranges of addresses, 10 s at most.

        :param ranges: guest-virtual ``(start, end)`` of code
        :param at_stop: called at each stop meanwhile
        :return: whether that came to be
        """
        deadline = time.monotonic() + _QUIESCE_S
        while tasks_inside(self.kernel, ranges, include_start=True):
            if time.monotonic() > deadline:
                return False
            self._run_on()
            at_stop()
        return True

    def _run_on(self) -> None:
        if self._caller.handling() is not None:
            raise ProbeError("a handler cannot wait for the guest to run on; try again outside")
        self.kernel.target.run(self._caller.dispatch, _QUIESCE_STEP_S)

    def _restore_returns(self, gone: Iterable[Program]) -> None:
        holding = self._holding
        assert holding is not None
        self._ever.update(dict.fromkeys(p for p in gone if p.kind == "r"))
        memory = self.kernel.memory
        found = [pending for program in self._ever for pending in self.pending(program)]
        behind = {pending.stub: pending.ret_addr for pending in found}

        def without_gone(address: int) -> int:
            while address in behind:
                address = behind[address]
            return address  # the stub of a probe that stays, or where the call returns to

        for pending in found:
            if _stands_at(memory, pending):
                true = without_gone(pending.ret_addr)
                memory.write(pending.place, true.to_bytes(8, "little"))
                self.host.write(pending.slot, bytes(8))
        for program in self.programs.values():
            if program in self._ever:
                continue
            for pending in self.pending(program):
                if pending.ret_addr in behind:
                    true = without_gone(pending.ret_addr)
                    self.host.write(pending.slot + RET_ADDR_AT, true.to_bytes(8, "little"))

    def _restore(self, site: Site) -> None:
        at = site.displacement.address
        if at not in self._lifted:
            self._write_code(at, site.displacement.original[:_JUMP_BYTES])

    def _write_code(self, address: int, data: bytes) -> None:
        self.kernel.memory.write(address, data)


def _stands_at(memory: KernelMemory, pending: PendingReturn) -> bool:
    try:
        return memory.read_u64(pending.place) == pending.stub
    except MemoryFault:
        return False  # the task has died, and its stack is gone
