"""The resident probes of one guest: placed together, counted, drained, and taken out again."""

import contextlib
import functools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError
from kgdbx.resident.bells import Bell
from kgdbx.resident.build import Builder
from kgdbx.resident.clock import IDENTITY, Clock
from kgdbx.resident.compile.aggregate import MapShape
from kgdbx.resident.guest_call import GuestCaller
from kgdbx.resident.holding import Holding, take_hold
from kgdbx.resident.host import HostView
from kgdbx.resident.journal import Journal
from kgdbx.resident.jumps import Jumps
from kgdbx.resident.place.displace import Displacement
from kgdbx.resident.place.occupants import busy_addresses
from kgdbx.resident.program import Counts, Program, Site
from kgdbx.resident.quiescence import Quiescence
from kgdbx.resident.returns import Returns
from kgdbx.resident.ring import RING_BYTES, Batch, Stream
from kgdbx.resident.table import Table
from kgdbx.symbols.kernel import Function, Kernel
from kgdbx.target.base import Stop
from kgdbx.target.ram import GuestRam

__all__ = ("Engine",)

_COUNTERS_BYTES = 32  # struct counters
_RECLAIM_BYTES = 64 << 10
_RECLAIM_TRIES = 5


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
    :param handling: the vCPU whose handlers run: the guest must not go on from there
    :ivar placed_listeners: called when probes were placed
    :ivar returns: the calls in progress of return probes
    :ivar quiescence: waits until code is not in use
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
        self.quiescence = Quiescence(kernel, self._caller)
        self.returns = Returns(kernel, self.host, self.programs)
        self._jumps = Jumps(kernel, self.quiescence)
        self._next_id = 1
        self.placed_listeners: list[Callable[[], None]] = []
        self._placing = self._taking_hold = False
        self._batch: list[Program] | None = None
        self._removals: list[Program] | None = None

    def displacement(self, function: Function, address: int) -> Displacement:
        """What gives way to a jump at an address, patched by us already or not.

        :raises CannotDisplace: if nothing can
        """
        return self._jumps.displacement(function, address)

    @property
    def _streams(self) -> tuple[Stream, ...]:
        return tuple(self._holding.streams.values()) if self._holding is not None else ()

    @property
    def watched(self) -> int | None:
        """Guest-virtual address of the word that those write who wait for the host, if any do."""
        bells = self._holding.bells if self._holding is not None else None
        return bells.watched if bells is not None else None

    def waiting(self) -> tuple[Bell, ...]:
        """The vCPUs that wait for the host now. The kernel stands."""
        holding = self._holding
        if holding is None or holding.bells is None:
            return ()
        return tuple(holding.bells.waiting(self.host, holding.per_cpu_offsets))

    def answer(self, cpu: int, regs: Registers | None = None, *, leaves: bool = False) -> None:
        """Let a vCPU go on when the kernel runs.

        :param regs: what it shall go on with; None for what it has
        :param leaves: whether it goes where they say, and not to what else is at the place
        """
        assert self._holding is not None and self._holding.bells is not None
        self._holding.bells.answer(self.host, cpu, regs, leaves=leaves)

    def free_bell(self, cpu: int) -> None:
        """Forget a vCPU that waits for the host: it is taken elsewhere."""
        assert self._holding is not None and self._holding.bells is not None
        self._holding.bells.free(self.host, cpu)

    def is_lifted(self, displacement: Displacement) -> bool:
        """Whether the guest's own ftrace is at a place, and our probes there wait."""
        return self._jumps.is_lifted(displacement.address)

    def rings(self, address: int) -> bool:
        """Whether the jump at an address leads to code that waits for the host."""
        site = self._jumps.site(address)
        return site is not None and any(program.kind == "bell" for program in site.programs)

    def is_shared(self, displacement: Displacement) -> bool:
        """Whether there are several probes of ours at a place."""
        site = self._jumps.site(displacement.address)
        return site is not None and len(site.programs) > 1

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

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being placed, and the guest makes no calls for us."""
        placing = self._placing or self._taking_hold or self._batch is not None
        return not (placing or self.calling)

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
        outer, self._placing = self._placing, True
        try:
            # The guest runs while probes are placed, and a handler may place others: the code of
            # the outer ones is there, and nothing leads to it yet.
            if not outer:
                self._reclaim(holding)
            self._place(holding, programs)
        except BaseException:
            holding.retire(programs)
            raise
        finally:
            self._placing = outer
        self.programs.update((program.id, program) for program in programs)
        holding.link_returns(self.programs.values())
        for listener in self.placed_listeners:
            listener()

    def _place(self, holding: Holding, programs: Sequence[Program]) -> None:
        holding.take_counters(self._caller, self.quiescence.run_on, programs)
        self._caller.run(holding.take_memory(programs, self.ring_bytes, self.overwrite))
        changed: dict[int, Site] = {}
        for program in programs:
            address = program.displacement.address
            old = self._jumps.site(address)
            site = changed.setdefault(
                address, Site(program.displacement, list(old.programs) if old else [])
            )
            site.programs.append(program)
            # The host comes first, as with a breakpoint, and what decides of the call comes last:
            # all others see it.
            site.programs.sort(key=lambda p: (p.kind != "bell", p.decision is not None))
        stubs = self._builder.build(holding, changed, programs)
        if holding.clock is None:
            self._caller.run(holding.sample_clock())
        self._jumps.write(holding.journal, changed, stubs)

    def _reclaim(self, holding: Holding) -> None:
        # What removed probes have left serves new ones, if nothing is inside of our code but calls
        # that return probes wait for: they may be inside for as long as they like. Others will be
        # through soon, if the guest may run on; if not, there is a next time.
        for _ in range(_RECLAIM_TRIES):
            needed = {unit for program in self.programs.values() for unit in program.units}
            needed |= self._jumps.units
            if holding.unneeded_bytes(needed) < _RECLAIM_BYTES:
                return
            self.returns.withdraw(())
            inside = busy_addresses(self.kernel, holding.code.heap.ranges, include_start=True)
            if {each.address for each in inside} <= self.returns.stubs_waited_for:
                kept = self.returns.forget_settled()
                needed |= {unit for program in kept for unit in program.units}
                holding.reclaim(needed, kept)
                return
            if self.quiescence.must_stand:
                return
            self.quiescence.run_on()

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
        unused: list[int] = []
        for address in dict.fromkeys(p.displacement.address for p in reversed(gone)):
            site = self._jumps.site(address)
            assert site is not None
            rest = [p for p in site.programs if p not in gone]
            if rest:
                rebuilt[address] = Site(site.displacement, rest)
            else:
                unused.append(address)
        self._jumps.take_out(holding.journal, unused)
        if rebuilt:
            stubs = self._builder.build(holding, rebuilt, ())
            self._jumps.write(holding.journal, rebuilt, stubs)
        self.returns.withdraw(gone)
        for program in gone:
            del self.programs[program.id]
        holding.link_returns(self.programs.values())
        holding.retire(gone)

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
        code = holding.code.heap.ranges
        if not self.quiescence.wait_until_unused(code, self._settle):
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

    def _settle(self) -> bool:
        for bell in self.waiting():  # it was on its way when its probe was taken out
            self.answer(bell.cpu)
        return self.returns.settle()

    def _let_go(self, holding: Holding) -> None:
        holding.journal.close()
        self._holding = None
        self.returns.forget()

    # Beside the guest's own ftrace

    @property
    def ftrace_sites(self) -> set[int]:
        """Where jumps stand in place of the NOP that ftrace writes its calls over."""
        return self._jumps.in_place_of_ftrace

    def lift(self, addresses: Sequence[int]) -> None:
        """Put the NOPs back, and keep the probes. The kernel stands."""
        assert self._holding is not None
        self._jumps.lift(self._holding.journal, addresses)

    def put_back(self) -> list[int]:
        """Write the jumps of lifted sites where there are NOPs again. The kernel stands.

        :return: where that was
        """
        return self._jumps.put_back(self._holding.journal) if self._holding is not None else []

    # Results

    def drain(self) -> Iterator[Batch]:
        """Whole records, each CPU's in order. Live where the host sees the guest's RAM."""
        for stream in self._streams:
            yield from stream.drain(self.host)

    @property
    def in_flight(self) -> bool:
        """Whether a record was being written when its ring was drained last."""
        return any(stream.in_flight for stream in self._streams)

    def begun(self) -> Callable[[], bool]:
        """To be asked after a drain: whether any record that has been begun until now is not out of
        its ring yet.
        """
        waiting = [stream.begun(self.host) for stream in self._streams]
        return lambda: any(each() for each in waiting)

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

    def _hold(self) -> Holding:
        if self._holding is None:
            if self._taking_hold:  # the guest runs meanwhile, and a handler with it
                raise ProbeError("the first memory is being taken; define it a moment later")
            self._taking_hold = True
            try:
                holding = self._caller.run(take_hold(self.kernel, self.host, self._make_journal))
            finally:
                self._taking_hold = False
            self.kernel.true_stacks = functools.partial(self.returns.true_stacks, holding.window)
            self._holding = holding
        return self._holding
