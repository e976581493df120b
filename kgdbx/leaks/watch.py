"""Follow what modules allocate and free, from their load to their unload."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kgdbx.errors import CommandError, KgdbxError, ProbeError
from kgdbx.leaks.allocators import Watched, load_allocators, present
from kgdbx.leaks.findings import Event, Stack, WatchReport
from kgdbx.leaks.frames import FrameNames
from kgdbx.leaks.ledger import (
    LATE,
    NAMES,
    RECORD,
    STACK,
    UNALLOCATED,
    Counters,
    GuestLedger,
    Live,
    Range,
)
from kgdbx.probes.manager import ProbeManager
from kgdbx.resident.program import Program
from kgdbx.resident.ring import Batch
from kgdbx.resident.tier import ResidentTier
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.modules import LoadedModule

__all__ = ("LeakWatch", "place_watch")

_MAXACTIVE = 32
_INFO, _DIRECT = 0xFFFF, 4
_UNKNOWN = Stack((), "", False)


@dataclasses.dataclass
class _Session:
    # From the first module that is loaded to the last that goes.
    number: int
    mark: int  # what its blocks bear in the guest
    modules: list[str] = dataclasses.field(default_factory=list)
    attached_late: list[str] = dataclasses.field(default_factory=list)
    failed_init: list[str] = dataclasses.field(default_factory=list)
    unallocated: list[Event] = dataclasses.field(default_factory=list)
    leaks: dict[int, Event] = dataclasses.field(default_factory=dict)
    before: Counters = Counters()  # when it began, or was cleared
    freed_late: list[Event] = dataclasses.field(default_factory=list)
    counters: Counters | None = None
    over: bool = False
    missed: int = 0


class LeakWatch:
    """Watches modules; to be made by :func:`place_watch`.

    :ivar watched: what allocates and frees in this kernel
    :ivar refused: functions that cannot be watched, with the reason
    :ivar report_listeners: called with a session's number when the last of its modules has gone;
        the guest stands
    """

    def __init__(
        self,
        kernel: Kernel,
        tier: ResidentTier,
        manager: ProbeManager,
        modules: Sequence[str],
        watched: Watched,
    ) -> None:
        self.watched = watched
        self.refused: dict[str, str] = {}
        self.report_listeners: list[Callable[[int], None]] = []
        self._kernel = kernel
        self._engine = tier.engine
        self._reader = tier.reader
        self._manager = manager
        self._names = tuple(dict.fromkeys(name.replace("-", "_") for name in modules))
        self._frames = FrameNames(kernel)
        self._stacks: dict[int, Stack] = {}
        self._loaded: dict[str, tuple[tuple[int, int, bool], ...]] = {}
        self._gone: dict[str, tuple[tuple[int, int], ...]] = {}
        self._sessions: list[_Session] = []
        self._mark = 0
        self._programs: list[Program] = []
        self._numbers = range(0)
        self._ledger = GuestLedger(kernel, self._engine)

    # Beginning and end

    def start(self) -> None:
        """Put the probes in place, and begin with the modules that are loaded. The guest stands.

        :raises ProbeError: if an expression for an allocator is refused, or nothing can be placed
        """
        programs, resizing = self._make_programs()
        if not programs:
            raise ProbeError("no allocator of this kernel can be watched")
        self._programs = [*programs, *resizing]
        self._engine.install(self._programs)
        # What is called by one that only resizes is not part of it.
        self._numbers = range(programs[0].id, programs[-1].id + 1)
        self._reader.batch_listeners.append(self._read)
        self._manager.loading_listeners.append(self._loading)
        self._manager.freeing_listeners.append(self._freeing)
        self._manager.follow_modules()
        for name in self._names:
            loaded = self._kernel.modules.find(name)
            if loaded is not None:
                self._begin(loaded)
                self._sessions[-1].attached_late.append(name)
        self._configure()

    def _make_programs(self) -> tuple[list[Program], list[Program]]:
        programs: list[Program] = []
        resizing: list[Program] = []
        for name, allocator in self.watched.functions.items():
            try:
                for function in self._kernel.functions(name):
                    place = self._engine.displacement(function, function.address)
                    returns = allocator.kind in ("allocate", "resize")
                    kind, slots = ("r", _MAXACTIVE) if returns else ("p", 0)
                    program = Program(kind, place, self._ledger.body(allocator), maxactive=slots)
                    (resizing if allocator.kind == "resize" else programs).append(program)
            except KgdbxError as e:
                self.refused[name] = str(e)
        return programs, resizing

    def stop(self) -> None:
        """Take the probes out; what was found stays. The guest stands."""
        self._note_end()
        self._manager.loading_listeners.remove(self._loading)
        self._manager.freeing_listeners.remove(self._freeing)
        self._engine.uninstall(self._programs)
        self._programs = []

    # Results

    @property
    def names(self) -> tuple[str, ...]:
        """The modules, as the kernel writes their names."""
        return self._names

    @property
    def sessions(self) -> int:
        """How many sessions there were, the one under way included."""
        return len(self._sessions)

    def report(self, session: int | None = None) -> WatchReport:
        """What is known of a session, now: nothing is forgotten.

        :param session: number, from 1; by default the last
        :raises CommandError: if no module was loaded yet
        """
        if not self._sessions:
            raise CommandError(f"none of {', '.join(self._names)} was loaded yet")
        found = self._sessions[-1 if session is None else session - 1]
        counters = found.counters or self._count(found)
        leaks = tuple(found.leaks.values()) if found.over else self._live(found)
        return WatchReport(
            found.number,
            tuple(found.modules),
            tuple(found.attached_late),
            tuple(found.failed_init),
            found.over,
            self._by_name(counters.allocations, found),
            self._by_name(counters.frees, found),
            leaks,
            tuple(found.unallocated),
            tuple(found.freed_late),
            self._notes(found, counters),
            () if found.over else tuple(name for name in found.modules if name in self._loaded),
        )

    @property
    def gone(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Where modules were that were unloaded: guest-virtual ``(start, size_bytes)``."""
        return dict(self._gone)

    @property
    def frames(self) -> FrameNames:
        """Where the lines of frames are known."""
        return self._frames

    def clear(self) -> None:
        """Forget what was allocated in the session under way, and count from 0.

        A free of what was forgotten is one of what is not known to be allocated.

        :raises CommandError: if no module is loaded
        """
        if not self._loaded:
            raise CommandError(f"none of {', '.join(self._names)} is loaded")
        session = self._sessions[-1]
        session.mark = self._next_mark()
        session.before = self._ledger.counters()
        session.unallocated.clear()
        self._ledger.mark(session.mark)

    # Modules come and go; the guest stands

    def _loading(self, module: LoadedModule) -> None:
        self._frames.forget_init(module)
        if module.name in self._names:
            self._frames.remember_init(module)
            self._begin(module)
        self._configure()

    def _begin(self, module: LoadedModule) -> None:
        if not self._loaded:
            session = _Session(len(self._sessions) + 1, self._next_mark())
            session.before = self._ledger.counters()
            self._sessions.append(session)
        self._loaded[module.name] = module.regions
        self._gone.pop(module.name, None)
        session = self._sessions[-1]
        if module.name not in session.modules:
            session.modules.append(module.name)

    def _freeing(self, regions: tuple[tuple[int, int], ...]) -> None:
        gone = set(regions)
        for name, mine in tuple(self._loaded.items()):
            rest = tuple(r for r in mine if r[:2] not in gone)
            if len(rest) == len(mine):
                continue
            if any(not init for _, _, init in rest):
                self._loaded[name] = rest  # the init is over, and its memory is freed
                continue
            # What is left of init code now is of an init that failed.
            if any(init for _, _, init in mine):
                self._sessions[-1].failed_init.append(name)
            self._gone[name] = tuple((start, size) for start, size, _ in mine)
            del self._loaded[name]
            if not self._loaded:
                self._end()
        self._configure()

    def _end(self) -> None:
        session = self._sessions[-1]
        session.counters = self._count(session)
        session.leaks = {event.address: event for event in self._live(session)}
        session.over = True
        self._note_end()
        for listener in tuple(self.report_listeners):
            listener(session.number)

    def _note_end(self) -> None:
        if self._sessions and self._programs:
            session = self._sessions[-1]
            session.missed = sum(self._engine.counts(p).nmissed for p in self._programs)
            session.counters = session.counters or self._count(session)
            if not session.over:
                session.leaks = {e.address: e for e in self._live(session)}

    def _configure(self) -> None:
        self._frames.forget()
        ranges = [
            Range(start, size, self._names.index(name) % NAMES)
            for name, regions in self._loaded.items()
            for start, size, _ in regions
        ]
        # No session is under way: what is freed now outlived its own.
        mark = self._sessions[-1].mark if self._loaded else 0
        self._ledger.configure(ranges, mark, self._numbers)

    def _next_mark(self) -> int:
        self._mark += 1
        return self._mark

    def _count(self, session: _Session) -> Counters:
        return self._ledger.counters() - session.before

    # Records

    def _read(self, batch: Batch) -> None:
        if batch.records.shape[1] != RECORD.itemsize:
            return
        for record in batch.records.copy().view(RECORD).ravel():
            if int(record["probe"]) not in self._numbers:
                continue
            what, stack = int(record["what"]), int(record["stack"])
            if what == STACK:
                self._learn(stack, record["frames"][: int(record["count"])])
            elif what == UNALLOCATED:
                self._sessions[-1].unallocated.append(self._event(record))
            elif what == LATE:
                self._freed_late(record)

    def _learn(self, stack: int, addresses: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> None:
        frames = self._frames.name([int(address) for address in addresses if address])
        module = self._names[stack >> 8 & NAMES - 1]
        self._stacks[stack & ~_INFO] = Stack(frames, module, bool(stack & _DIRECT))

    def _freed_late(self, record: "np.void") -> None:
        addresses = [int(a) for a in record["frames"][: int(record["count"])] if a]
        frames = self._frames.name(addresses)
        module = next((f.module for f in frames[1:] if f.module in self._names), "")
        module = module or next((f.module for f in frames[1:] if f.module), "")
        direct = len(frames) > 1 and bool(module) and frames[1].module == module
        by = Stack(frames, module, direct)
        for session in self._sessions:
            if session.mark == int(record["session"]):
                event = session.leaks.pop(int(record["address"]), None)
                if event is not None:
                    session.freed_late.append(dataclasses.replace(event, freed_by=by))
                return
        if self._loaded and module in self._names:  # clear() has forgotten it
            event = self._event(record)
            self._sessions[-1].unallocated.append(dataclasses.replace(event, stack=by))

    def _event(self, record: "np.void") -> Event:
        return Event(
            int(record["address"]),
            0,
            self._stack(int(record["stack"])),
            self._engine.clock.ns(int(record["tsc"])),
            int(record["pid"]),
            bytes(record["comm"]).split(b"\0")[0].decode("utf-8", "replace"),
        )

    def _live(self, session: _Session) -> tuple[Event, ...]:
        if not self._programs:
            return tuple(session.leaks.values())
        return tuple(self._allocated(b) for b in self._ledger.live() if b.session == session.mark)

    def _allocated(self, block: Live) -> Event:
        stack = self._stack(block.stack)
        if not stack.module:
            stack = dataclasses.replace(stack, module=self._names[block.module])
        return Event(
            block.address,
            block.size_bytes,
            stack,
            block.time_ns,
            block.pid,
            block.comm,
            block.from_interrupt,
        )

    def _stack(self, stack: int) -> Stack:
        return self._stacks.get(stack & ~_INFO, _UNKNOWN)

    def _by_name(self, counts: Sequence[int], session: _Session) -> dict[str, int]:
        return {n: counts[self._names.index(n) % NAMES] for n in session.modules}

    def _notes(self, session: _Session, counters: Counters) -> tuple[str, ...]:
        notes = []
        if session.attached_late:
            names = ", ".join(session.attached_late)
            notes.append(f"{names} was loaded before: earlier allocations unknown")
        if counters.full:
            notes.append(f"{counters.full:,} allocations found no place in the ledger")
        if counters.unsaid:
            notes.append(f"{counters.unsaid:,} stacks or frees are missing: a ring was full")
        missed = session.missed
        if self._programs:
            missed = sum(self._engine.counts(p).nmissed for p in self._programs)
        if missed:
            notes.append(f"{missed:,} calls were not followed: too many were under way at once")
        return tuple(notes)


def place_watch(
    kernel: Kernel,
    tier: ResidentTier,
    manager: ProbeManager,
    modules: Sequence[str],
    *,
    allocators: Sequence[Path] = (),
) -> LeakWatch:
    """Watch modules from now on: those that are loaded, and those that will be.

    :param modules: names; ``-`` and ``_`` are the same
    :param allocators: files with more of what allocates and frees
    :raises CommandError: if there is no name, too many, or a file makes no sense
    :raises ProbeError: if nothing can be placed
    """
    if not 0 < len(modules) <= NAMES:
        raise CommandError(f"name 1 to {NAMES} modules to watch")
    tier.check()
    names = list(kernel.vmlinux.function_names)
    with contextlib.suppress(LookupError):
        names += [f"{m.name}:{s.name}" for m in kernel.modules for s in kernel.modules.symbols(m)]
    watch = LeakWatch(kernel, tier, manager, modules, present(load_allocators(*allocators), names))
    watch.start()
    return watch
