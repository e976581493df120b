"""The resident probes of one guest: placed together, counted, drained, and taken out again."""

import contextlib
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kgdbx.errors import MemoryFault, ProbeError
from kgdbx.resident.bells import Bells, make_bells
from kgdbx.resident.clock import IDENTITY, SAMPLE_SOURCE, Clock, clock_from_sample
from kgdbx.resident.compile.codegen import Body
from kgdbx.resident.compile.decision import ORIGINAL, Decision, UserCode
from kgdbx.resident.compile.link import Linked, compile_unit
from kgdbx.resident.compile.unit import RETURN_STUB_BYTES, KernelFacts, StubCall, Unit
from kgdbx.resident.guest_call import Call, GuestCaller, Script
from kgdbx.resident.heap import Heap, Places
from kgdbx.resident.host import HostView
from kgdbx.resident.journal import Journal, Patch
from kgdbx.resident.memory import GuestMemory, Window
from kgdbx.resident.place.displace import Displacement, displace, tasks_inside
from kgdbx.resident.returns import (
    RET_ADDR_AT,
    SLOT_BYTES,
    TASK_AT,
    PendingReturn,
    empty_slot,
    pending_returns,
    true_return,
)
from kgdbx.resident.ring import RING_BYTES, Batch, Stream, make_stream, slot_size
from kgdbx.symbols.blacklist import Blacklist
from kgdbx.symbols.kernel import Function, Kernel
from kgdbx.symbols.memory import KernelMemory
from kgdbx.target.base import Stop
from kgdbx.target.ram import GuestRam

__all__ = ("Counts", "Engine", "Program")

_PROBE = struct.Struct("<QQIIIIQ24x")  # struct probe
_COUNTERS_BYTES = 32  # struct counters
_COUNTERS_CHUNK_BYTES = 2048
_RING_CONTROL_BYTES = 32  # struct ring
_JUMP_BYTES = 5
_ENDBR_BYTES = 4
_TAIL_SLACK_BYTES = 40  # a short branch that is moved grows, and the jump back
_QUIESCE_S = 10.0
_QUIESCE_STEP_S = 0.01
_PER_CPU_S = 5.0


@dataclass(eq=False)
class Program:
    """One probe at one place, before and after it is placed.

    :ivar kind: ``p``, ``r`` for a return probe, ``bell`` for a hit that the host looks at, or
        ``verdict`` for one that decides what becomes of the call
    :ivar displacement: what lies at the place
    :ivar body: what to record; None for a bell and a verdict
    :ivar decision: of a verdict
    :ivar maxactive: return slots
    :ivar id: its number in the records
    :ivar at_entry: whether the place is a function's first instruction
    """

    kind: str
    displacement: Displacement
    body: Body | None = None
    decision: Decision | None = None
    maxactive: int = 0
    id: int = 0
    address: int = 0
    counters: int = 0
    slots: int = 0
    slot_bytes: int = 0
    handler: int = -1
    stream: Stream | None = None
    at_entry: bool = True

    @property
    def keeps_all(self) -> bool:
        """Whether the stub keeps all registers and the flags: away from a function's entry they
        are in use, and a definition may ask for them.
        """
        return self.body is None or self.body.uses_regs or not self.at_entry


@dataclass(frozen=True)
class Counts:
    """What the guest counted of a probe, all CPUs together.

    :ivar hits: as the stop tier counts them
    :ivar nmissed: no free return slot, or a hit inside of a handler
    :ivar nfaults: conditions that could not be evaluated
    :ivar decided: calls that did not go on as they would have by themselves
    """

    hits: int
    nmissed: int
    nfaults: int
    decided: int


@dataclass
class _Site:
    displacement: Displacement
    programs: list[Program] = field(default_factory=list)
    jump: bytes = b""


class Engine:
    """Runs probes inside a guest.

    :param dispatch: handles stops that come while the guest makes calls for us
    :param ram: the guest's RAM seen from the host; None drains at stops only
    :param make_journal: makes the journal when the first probe is placed
    :param ring_bytes: size of each CPU's rings
    :param overwrite: the newest records win when the host does not keep up
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
        self.streams: dict[int, Stream] = {}
        self.programs: dict[int, Program] = {}
        self._caller = GuestCaller(kernel, dispatch, handling)
        self._make_journal = make_journal
        self._ring_bytes = ring_bytes
        self._overwrite = overwrite
        self._opened: _Opened | None = None
        self._sites: dict[int, _Site] = {}
        self._next_id = 1
        self._next_site = 0
        self._counters: list[int] = []
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
    def bells(self) -> Bells | None:
        """Where hits wait for the host, if any probe has them do so."""
        return self._opened.bells if self._opened is not None else None

    @property
    def clock(self) -> Clock:
        """From the time stamps in the records to the guest's monotonic nanoseconds."""
        return (self._opened and self._opened.clock) or IDENTITY

    def owns(self, address: int) -> bool:
        """Whether code of ours is at an address."""
        window = self._opened.window if self._opened is not None else None
        return window is not None and window.start <= address < window.end

    @property
    def calling(self) -> bool:
        """Whether the guest makes calls for us now, and the rest has to wait."""
        return self._caller.calling

    def gs_base(self, cpu: int) -> int:
        """The kernel's ``gs`` base on a vCPU."""
        assert self._opened is not None
        return self._opened.per_cpu_offsets[cpu]

    @property
    def is_open(self) -> bool:
        """Whether the guest has memory of ours."""
        return self._opened is not None

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

        :raises ProbeError: if one cannot be placed; nothing is changed then
        """
        self._batch = []
        try:
            yield
            programs = self._batch
        finally:
            self._batch = None
        if programs:
            self._install(programs)

    def _install(self, programs: Sequence[Program]) -> None:
        opened = self._open()
        self._take_counters(opened, len(programs))
        self._caller.run(self._take_memory(opened, programs))
        changed: dict[int, _Site] = {}
        for program in programs:
            address = program.displacement.address
            old = self._sites.get(address)
            site = changed.setdefault(
                address, _Site(program.displacement, list(old.programs) if old else [])
            )
            site.programs.append(program)
            # What only looks comes first: it sees the call whatever is decided of it.
            site.programs.sort(key=lambda p: p.decision is not None)
        linked, numbers = self._build(opened, changed, programs)
        if opened.clock is None:
            opened.clock = self._caller.run(self._sample(opened))
        self._write_controls(linked, programs)
        self._patch(opened, changed, linked, numbers)
        self.programs.update((program.id, program) for program in programs)

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
        opened = self._opened
        gone = dict.fromkeys(p for p in programs if self.programs.get(p.id) is p)
        if opened is None or not gone:
            return
        rebuilt: dict[int, _Site] = {}
        restored: list[_Site] = []
        for address in dict.fromkeys(p.displacement.address for p in reversed(gone)):
            site = self._sites[address]
            rest = [p for p in site.programs if p not in gone]
            if rest:
                rebuilt[address] = _Site(site.displacement, rest)
            else:
                restored.append(self._sites.pop(address))
        for site in restored:
            self._write_code(site.displacement.address, site.displacement.original[:_JUMP_BYTES])
        opened.journal.restored(site.displacement.address for site in restored)
        if rebuilt:
            linked, numbers = self._build(opened, rebuilt, ())
            self._patch(opened, rebuilt, linked, numbers)
        self._restore_returns(gone)
        for program in gone:
            del self.programs[program.id]

    def close(self) -> None:
        """Take everything out and give the guest its memory back.

        :raises ProbeError: if something of ours is still in use in the guest after 10 s; what is
            left does nothing, and stays until the guest reboots
        """
        opened = self._opened
        if opened is None:
            return
        self.uninstall(tuple(self.programs.values()))
        window = (opened.window.start, opened.window.end)
        if not self.wait_until_unused(window, lambda: self._restore_returns(opened.ever)):
            opened.journal.leave()
            self._opened = None
            raise ProbeError(
                "tasks in the guest are still inside code of ours: it stays, and does nothing"
            )
        opened.window.close()
        self.host.forget()
        memory = opened.memory
        self._caller.run(memory.give_back(memory.blocks, memory.percpu))
        opened.journal.close()
        self._opened = None
        self.streams.clear()
        self._counters.clear()

    # Results

    def drain(self) -> Iterator[Batch]:
        """Whole records, each CPU's in order. Live where the host sees the guest's RAM."""
        for stream in tuple(self.streams.values()):
            yield from stream.drain(self.host)

    @property
    def in_flight(self) -> bool:
        """Whether a record was being written when its ring was drained last."""
        return any(stream.in_flight for stream in self.streams.values())

    def lost(self) -> int:
        """Records that were lost so far because a ring was full, or overwritten."""
        return sum(stream.lost(self.host) for stream in self.streams.values())

    def counts(self, program: Program) -> Counts:
        """What the guest counted of a probe."""
        assert self._opened is not None
        totals = [0, 0, 0, 0]
        for offset in self._opened.per_cpu_offsets:
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
        if self._opened is None:
            return address
        window = self._opened.window
        return true_return(self.kernel, address, window.start, window.end)

    # Parts of placing

    def _open(self) -> "_Opened":
        if self._opened is None:
            self._opened = self._caller.run(self._start())
        return self._opened

    def _start(self) -> Script["_Opened"]:
        kernel = self.kernel
        journal = self._make_journal()
        memory = GuestMemory(kernel)
        try:
            table = yield from memory.pages(4096)
            guard = yield from memory.per_cpu(64)
            journal.note(blocks=[(b.address, b.size_bytes) for b in memory.blocks])
            journal.note(percpu=memory.percpu)
            window = Window(kernel, table)
            journal.note(window=(*window.entry, window.start, window.end))
            window.open()
        except BaseException:
            journal.close()
            raise
        cpus = kernel.memory.read_u32(kernel.address("nr_cpu_ids"))
        offsets = struct.unpack(
            f"<{cpus}Q", kernel.memory.read(kernel.address("__per_cpu_offset"), 8 * cpus)
        )
        facts = KernelFacts.of(kernel, guard, window.start, window.end - window.start)
        heaps = Places(Heap(memory, window), Heap(memory, window))
        return _Opened(memory, window, heaps, journal, facts, list(offsets))

    def _sample(self, opened: "_Opened") -> Script[Clock]:
        at = opened.sample
        yield Call(opened.symbols["sample_clock"], (at,))
        return clock_from_sample(self.kernel, self.kernel.memory.read(at, 24))

    def _take_memory(self, opened: "_Opened", programs: Sequence[Program]) -> Script[None]:
        known = len(opened.memory.blocks), len(opened.memory.percpu)
        cpus = len(opened.per_cpu_offsets)
        for program in programs:
            if program.kind == "r" and program.body is not None:
                program.slot_bytes = SLOT_BYTES + 8 * len(program.body.saves)
        controls = _RING_CONTROL_BYTES * cpus
        sizes = {slot_size(p.body.record_bytes) for p in programs if p.body} - set(self.streams)
        need = sum(64 + -(-p.maxactive * p.slot_bytes // 64) * 64 for p in programs)
        need += sum(64 + code.object.data_bytes for _, code in _user_code(programs))
        yield from opened.heaps.data.room(need + len(sizes) * (controls + 64) + 64)
        if not opened.sample:
            opened.sample = opened.heaps.data.take(64)
        for size in sorted(sizes):
            stream = yield from make_stream(
                opened.memory,
                opened.heaps.data.take(controls),
                opened.per_cpu_offsets,
                size,
                self._ring_bytes,
                self._overwrite,
            )
            stream.start(self.host)
            self.streams[size] = stream
        if opened.bells is None and any(program.kind == "bell" for program in programs):
            opened.bells = yield from make_bells(opened.memory, cpus)
        self._note_memory(opened, known)
        for program in programs:
            program.address = opened.heaps.data.take(64)
            if program.kind == "r":
                program.slots = opened.heaps.data.take(program.maxactive * program.slot_bytes)
                opened.journal.note(slots=(program.slots, program.maxactive, program.slot_bytes))
            program.counters = self._counters.pop()
            if program.body is not None:
                program.stream = self.streams[slot_size(program.body.record_bytes)]

    def _take_counters(self, opened: "_Opened", count: int) -> None:
        # Of per-CPU memory little is ready at once. When that is used up, a worker of the guest's
        # makes more as soon as it runs: pcpu_balance_workfn() in mm/percpu.c.
        deadline = time.monotonic() + _PER_CPU_S
        while len(self._counters) < count:
            known = len(opened.memory.blocks), len(opened.memory.percpu)
            try:
                self._caller.run(self._more_counters(opened, count))
            except ProbeError:
                if time.monotonic() > deadline:
                    raise
                self._run_on()
            finally:
                self._note_memory(opened, known)

    def _more_counters(self, opened: "_Opened", count: int) -> Script[None]:
        while len(self._counters) < count:
            chunk = yield from opened.memory.per_cpu(_COUNTERS_CHUNK_BYTES)
            self._counters += range(chunk, chunk + _COUNTERS_CHUNK_BYTES, _COUNTERS_BYTES)

    def _note_memory(self, opened: "_Opened", known: tuple[int, int]) -> None:
        blocks, percpu = opened.memory.blocks[known[0] :], opened.memory.percpu[known[1] :]
        if blocks:
            opened.journal.note(blocks=[(b.address, b.size_bytes) for b in blocks])
        if percpu:
            opened.journal.note(percpu=percpu)

    def _build(
        self, opened: "_Opened", sites: dict[int, _Site], new: Sequence[Program]
    ) -> tuple[Linked, dict[int, int]]:
        unit = Unit(opened.facts, opened.handlers)
        if opened.clock is None:
            unit.add(SAMPLE_SOURCE)
        numbers: dict[int, int] = {}
        users = self._place_user_code(opened, new)
        for program in new:
            if program.decision is not None:
                program.handler = unit.decision(program.decision, _user_symbol(program))
                continue
            if program.body is None:
                assert opened.bells is not None
                program.handler = unit.bell(opened.bells.address, opened.bells.watched)
                continue
            assert program.stream is not None
            kind = "full" if program.keeps_all else program.kind
            program.handler = unit.handler(kind, program.body, program.stream)
            if program.kind == "r":
                unit.return_stubs(
                    program.id,
                    program.handler,
                    program.slots,
                    program.maxactive,
                    program.slot_bytes,
                )
        for address, site in sites.items():
            numbers[address] = self._next_site
            self._next_site += 1
            calls = [
                StubCall(p.address, p.handler, address if p.keeps_all else None)
                for p in site.programs
            ]
            room = len(site.displacement.original) + _TAIL_SLACK_BYTES
            unit.site(numbers[address], calls, room)
        compiled = compile_unit(unit.text)
        code = self._take_code(opened, compiled.code_bytes)
        linked = compiled.link(code, 0, lambda name: self._resolve(opened, name))
        opened.symbols.update(linked.symbols)
        text = bytearray(linked.code)
        for address, site in sites.items():
            tail = linked.symbols[f"tail_{numbers[address]}"]
            moved = site.displacement.relocated(tail)
            moved += _jump(tail + len(moved), site.displacement.resume)
            text[tail - code : tail - code + len(moved)] = moved
        self._write_code(code, bytes(text))
        for program, place in users.items():
            tail = linked.symbols[f"tail_{numbers[program.displacement.address]}"]
            self._write_user_code(program, place, tail)
        return linked, numbers

    def _take_code(self, opened: "_Opened", size_bytes: int) -> int:
        known = len(opened.memory.blocks), len(opened.memory.percpu)
        if not opened.heaps.code.fits(size_bytes):
            self._caller.run(opened.heaps.code.room(size_bytes))
            self._note_memory(opened, known)
        return opened.heaps.code.take(size_bytes)

    def _place_user_code(
        self, opened: "_Opened", programs: Sequence[Program]
    ) -> dict[Program, tuple[int, int]]:
        places: dict[Program, tuple[int, int]] = {}
        for program, user in _user_code(programs):
            code = self._take_code(opened, user.object.code_bytes)
            data = opened.heaps.data.take(user.object.data_bytes)
            places[program] = code, data
            opened.symbols[_user_symbol(program)] = user.object.addresses(code, data)[user.entry]
        return places

    def _write_user_code(self, program: Program, place: tuple[int, int], original: int) -> None:
        assert program.decision is not None and program.decision.user is not None
        user = program.decision.user
        linked = user.object.link(
            *place, lambda name: original if name == ORIGINAL else user.resolve(name)
        )
        self._write_code(place[0], linked.code)
        if linked.data:
            self.host.write(place[1], linked.data)

    def _resolve(self, opened: "_Opened", name: str) -> int | None:
        found = opened.symbols.get(name)
        return found if found is not None else self.kernel.object_address(name)

    def _write_controls(self, linked: Linked, programs: Sequence[Program]) -> None:
        for program in programs:
            self.host.write(
                program.address,
                _PROBE.pack(
                    program.counters,
                    program.slots,
                    program.maxactive,
                    0,
                    program.id,
                    program.slot_bytes,
                    program.displacement.address,
                ),
            )
            if program.kind != "r":
                continue
            stubs = linked.symbols[f"slots_{program.id}"]
            slots = b"".join(
                empty_slot(program.address, stubs + n * RETURN_STUB_BYTES, program.slot_bytes)
                for n in range(program.maxactive)
            )
            self.host.write(program.slots, slots)

    def _patch(
        self,
        opened: "_Opened",
        sites: dict[int, _Site],
        linked: Linked,
        numbers: dict[int, int],
    ) -> None:
        self._wait_until_free([s.displacement for a, s in sites.items() if a not in self._sites])
        patches: list[Patch] = []
        for address, site in sites.items():
            site.jump = _jump(address, linked.symbols[f"site_{numbers[address]}"])
            original = site.displacement.original[:_JUMP_BYTES]
            patches.append(Patch(address, original, site.jump))
        opened.journal.patches(patches)
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

    def wait_until_unused(self, window: tuple[int, int], at_stop: Callable[[], None]) -> bool:
        """Let the guest run until nothing in it is inside a range of addresses, 10 s at most.

        :param at_stop: called at each stop meanwhile
        :return: whether that came to be
        """
        deadline = time.monotonic() + _QUIESCE_S
        while tasks_inside(self.kernel, [window], include_start=True):
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
        opened = self._opened
        assert opened is not None
        opened.ever.update(dict.fromkeys(p for p in gone if p.kind == "r"))
        memory = self.kernel.memory
        found = [pending for program in opened.ever for pending in self.pending(program)]
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
            if program in opened.ever:
                continue
            for pending in self.pending(program):
                if pending.ret_addr in behind:
                    true = without_gone(pending.ret_addr)
                    self.host.write(pending.slot + RET_ADDR_AT, true.to_bytes(8, "little"))

    def _write_code(self, address: int, data: bytes) -> None:
        self.kernel.memory.write(address, data)


@dataclass
class _Opened:
    memory: GuestMemory
    window: Window
    heaps: Places
    journal: Journal
    facts: KernelFacts
    per_cpu_offsets: list[int]
    bells: Bells | None = None
    clock: Clock | None = None
    sample: int = 0
    symbols: dict[str, int] = field(default_factory=dict)
    handlers: dict[tuple[object, ...], int] = field(default_factory=dict)
    ever: dict[Program, None] = field(default_factory=dict)


def _user_code(programs: Iterable[Program]) -> Iterator[tuple[Program, UserCode]]:
    for program in programs:
        if program.decision is not None and program.decision.user is not None:
            yield program, program.decision.user


def _user_symbol(program: Program) -> str:
    return f"user_{program.id}"


def _stands_at(memory: KernelMemory, pending: PendingReturn) -> bool:
    try:
        return memory.read_u64(pending.place) == pending.stub
    except MemoryFault:
        return False  # the task has died, and its stack is gone


def _jump(at: int, to: int) -> bytes:
    return b"\xe9" + (to - at - _JUMP_BYTES).to_bytes(4, "little", signed=True)
