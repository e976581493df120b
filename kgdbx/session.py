"""A session: one target, its kernel and its probes, closed in reverse order."""

import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from kgdbx.endings import GuestCommand, stop_at_end, stop_on_signals
from kgdbx.errors import CommandError, KgdbxError, ProbeError, TargetLost, TargetTimeout
from kgdbx.leaks.watch import LeakWatch
from kgdbx.machine.headers import kernel_header
from kgdbx.probes.arguments import argument_suppliers
from kgdbx.probes.defined import probe_from_definition
from kgdbx.probes.definition import ProbeDefinition, parse_definition
from kgdbx.probes.event import Event
from kgdbx.probes.event_queue import EventfulManager, EventQueue
from kgdbx.probes.manager import ProbeManager
from kgdbx.probes.probe import Hit, Probe
from kgdbx.probes.resolve import parse_place, resolve_points
from kgdbx.probes.script import read_script
from kgdbx.resident.compile.codegen import NotResident
from kgdbx.resident.ftrace_guard import FtraceGuard
from kgdbx.resident.place.displacement import CannotDisplace
from kgdbx.resident.recover import Recovery
from kgdbx.resident.stop_clock import StopClock
from kgdbx.resident.tier import ResidentTier
from kgdbx.resident.verdict import CHandler, Nullify, Replace, VerdictProbe
from kgdbx.symbols.elf import ElfSymbols
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import Stop, Target
from kgdbx.target.core import CoreRam
from kgdbx.target.ram import GuestRam
from kgdbx.target.rsp import RspTarget

__all__ = ("Refused", "Session", "Tier")

Tier: TypeAlias = Literal["auto", "resident", "stop"]
"""Where the hits of a definition are handled."""

_NOT_RESIDENT = (NotResident, CannotDisplace, TargetTimeout)

_GLOB_LIMIT = 500
_DRAIN_S = 0.25
_SLICE_S = 0.01
_HOLD_S = 10.0


class Refused(KgdbxError):
    """Some of several probes could not be placed.

    :ivar placed: those that are registered
    :ivar errors: message by function name
    """

    def __init__(self, placed: list[Probe], errors: dict[str, str]) -> None:
        self.placed = placed
        self.errors = errors
        lines = "\n".join(f"  {name}: {message}" for name, message in errors.items())
        super().__init__(f"{len(placed)} probes placed, {len(errors)} refused:\n{lines}")


class Session:
    """A kernel under control, with its probes.

    Leaving a session as a context manager unregisters every probe, newest first, and lets the
    kernel run on, whatever happened.

    :param target: a stopped target
    :param kernel: the kernel in it
    :param ram: the guest's RAM seen from the host
    :param journal: file to note changes of the guest in while there are any
    :ivar ram: the guest's RAM seen from the host, or None
    :ivar event_listeners: called with each event, when the handlers of its stop are through and
        before the guest runs on
    :ivar recovery: what was put right that a killed session had left in the guest; None if
        there was nothing
    :ivar leak_watch: what a face has modules watched by, if it does
    :ivar idle_hooks: called again and again during :meth:`run` while the guest runs, and once
        more after it
    """

    def __init__(
        self,
        target: Target,
        kernel: Kernel,
        *,
        ram: GuestRam | None = None,
        journal: Path | None = None,
    ) -> None:
        self.target = target
        self.ram: GuestRam | CoreRam | None = ram
        self.kernel = kernel
        self.recovery: Recovery | None = None
        self.leak_watch: LeakWatch | None = None
        self.event_listeners: list[Callable[[Event], None]] = []
        self.idle_hooks: list[Callable[[], None]] = []
        self._events = EventQueue(self.event_listeners)
        self.probes: ProbeManager = EventfulManager(
            kernel, self._events, self._take_before, self._holds_back
        )
        self.resident = ResidentTier(
            kernel, self.probes.on_stop_between, ram, journal, lambda: self.probes.handling
        )
        promotion = self.probes.promotion
        promotion.placing = self.resident.engine.batch
        self.probes.clock_ns = StopClock(
            kernel, self.resident.engine, self.resident.reader, lambda: self._events.latest_ns
        ).ns
        guard = FtraceGuard(
            kernel,
            self.resident.engine,
            self.probes.register,
            self.probes,
            promotion.demote,
        )
        self.resident.engine.placed_listeners.append(guard.follow)
        if isinstance(target, RspTarget) and ram is not None:
            promotion.doorbell = self.resident.doorbell
            self.resident.engine.placed_listeners.append(promotion.promote_own)
        self._done = threading.Event()
        self._stop_hooks: list[Callable[[Session], Any]] = []
        self._emitted = 0
        self._held_since = math.inf
        self._limit: int | None = None
        self._on_panic: Callable[[], None] | None = None
        self._stop_on: set[str] = set()
        self._closed = False

    # Probes

    def define(
        self,
        text: str | ProbeDefinition,
        *,
        hardware: bool = False,
        stop: bool = False,
        tier: Tier = "auto",
    ) -> list[Probe]:
        """Register what a probe definition says; a pattern registers many.

        :param hardware: stop by debug registers
        :param stop: leave the kernel standing after each event
        :param tier: ``resident`` in the guest, ``stop`` the kernel at each hit, or ``auto``: in
            the guest if that can be
        :raises DefinitionError: if the text is no definition
        :raises ProbeError: if the probe cannot be placed
        :raises Refused: if some of a pattern's functions could not be probed; the others are
        """
        definition = parse_definition(text) if isinstance(text, str) else text
        if definition.kind == "-":
            name = definition.event_name
            if definition.group is not None:
                name = f"{definition.group}/{name}"
            probe = self.probes.find(name)
            probe.unregister()
            return [probe]
        if not definition.is_glob:
            return [self._define_one(definition, hardware, stop, tier)]
        return self.define_many(
            self._expand(definition), hardware=hardware, stop=stop, tier=tier, inlined_copies=False
        )

    def define_many(
        self,
        definitions: Iterable[ProbeDefinition],
        *,
        hardware: bool = False,
        stop: bool = False,
        tier: Tier = "auto",
        inlined_copies: bool = True,
    ) -> list[Probe]:
        """Register many at once, as :meth:`define` does one by one, and much faster.

        :param inlined_copies: probe inlined copies of functions too
        :raises Refused: if some could not be placed; the others are
        """
        placed: list[Probe] = []
        errors: dict[str, str] = {}
        try:
            with self.resident.engine.batch():
                for each in definitions:
                    try:
                        placed.append(self._define_one(each, hardware, stop, tier, inlined_copies))
                    except KgdbxError as e:
                        errors[each.function or each.text] = str(e)
        except BaseException:
            for probe in reversed(placed):
                probe.unregister()
            raise
        if errors:
            raise Refused(placed, errors)
        return placed

    def register(self, probe: Probe) -> Probe:
        """Register a probe with handlers of its own."""
        return self.probes.register(probe)

    def nullify(
        self,
        function: str,
        retval: int | str = 0,
        *,
        condition: str | None = None,
        module: str | None = None,
        name: str | None = None,
    ) -> VerdictProbe:
        """Have a function return at once, without running its code.

        :param function: ``[module:]function``
        :param retval: a number, or ``-ENOMEM`` and its like
        :param condition: an ``if`` expression; only calls for which it holds
        :param module: only calls whose return address is in this module
        :raises ProbeError: if it cannot be done; nothing is changed then
        """
        tier = self.resident
        tier.check()
        return self._register_verdict(
            Nullify(
                function,
                tier.engine,
                tier.reader,
                retval,
                condition=condition,
                module=module,
                name=name,
            ),
            name,
        )

    def replace(
        self,
        function: str,
        other: str | Path,
        *,
        condition: str | None = None,
        module: str | None = None,
        name: str | None = None,
        any_type: bool = False,
    ) -> VerdictProbe:
        """Have another function run in place of a function.

        :param function: ``[module:]function``
        :param other: a function of the kernel; or a C file, with a ``replacement()`` or a function
            of the same name, or with an ``int handler(struct pt_regs *)`` that decides at each call
        :param condition: an ``if`` expression; only calls for which it holds
        :param module: only calls whose return address is in this module
        :param any_type: take a function of the kernel whatever its type
        :raises CompileError: for a C file that gcc refuses, with file and line
        :raises ProbeError: if it cannot be done; nothing is changed then
        """
        tier = self.resident
        tier.check()
        probe: VerdictProbe
        if isinstance(other, Path):
            vmlinux = self.kernel.vmlinux
            probe = CHandler(
                function,
                tier.engine,
                tier.reader,
                other,
                kernel_header(vmlinux.path, vmlinux.build_id),
                condition=condition,
                module=module,
                name=name,
            )
        else:
            probe = Replace(
                function,
                tier.engine,
                tier.reader,
                other,
                condition=condition,
                module=module,
                name=name,
                any_type=any_type,
            )
        return self._register_verdict(probe, name)

    def load_script(self, path: Path) -> list[Probe]:
        """Register the probes of a script; none of them if one is refused.

        :raises CommandError: if the script cannot be used
        :raises ProbeError: if a probe of it cannot be placed
        """
        names = {"session": self, "kernel": self.kernel, "prog": self.kernel.program}
        probes, namespace = read_script(path, names)
        placed: list[Probe] = []
        try:
            placed += (self.probes.register(probe) for probe in probes)
            if "start" in namespace:
                namespace["start"](self)
        except BaseException:
            for probe in reversed(placed):
                probe.unregister()
            raise
        if "stop" in namespace:
            self._stop_hooks.append(namespace["stop"])
        return placed

    def function_names(self, module: str | None = None) -> Iterator[str]:
        """Names of all functions, for completion and patterns.

        :param module: of a module, also of one that is not loaded if its debug file is there
        """
        if module is None:
            yield from self.kernel.vmlinux.function_names
            return
        modules = self.kernel.modules
        loaded = modules.find(module)
        if loaded is not None:
            yield from sorted(s.name for s in modules.symbols(loaded) if s.is_function)
        elif path := modules.debug_file(module):
            yield from sorted(set(ElfSymbols(path).function_names))

    def parameter_names(self, place: str) -> tuple[str, ...]:
        """Names of the parameters of the function at a place, for completion."""
        points, _ = resolve_points(self.kernel, parse_place(place), module=None, inlined=False)
        return tuple(argument_suppliers(self.kernel, points[0])) if points else ()

    # Running

    def run(
        self,
        *,
        timeout_s: float | None = None,
        count: int | None = None,
        command: GuestCommand | None = None,
    ) -> Stop | None:
        """Let the kernel run and its probes fire.

        Ends at the first of: ``^C``, the time, the number of events, the end of a command in the
        guest, a panic, or a hit that asks for a stop. The kernel stands afterwards.

        :param timeout_s: seconds
        :param count: events
        :param command: a command under way in the guest
        :return: the stop, or None if the time or ``^C`` or the command ended it
        :raises TargetLost: if the guest shuts down or is killed
        :raises Exception: what an event listener or an idle hook raised
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._limit = None if count is None else self._emitted + count
        done = self._done = threading.Event()
        self.target.forget_stop_request()
        self._events.hurry = False
        self._on_panic = None if self.kernel.panicked else done.set
        try:
            with (
                stop_on_signals(self.target, done, self._events),
                stop_at_end(self.target, command, done),
            ):
                try:
                    stop = self._run(done, deadline, command)
                finally:
                    self._idle()
                # Events of the guest's own making end a run without a stop that was one of them.
                return self.target.interrupt() if stop is None and self.limit_reached else stop
            return None  # a signal came while a listener was stuck
        finally:
            # It was meant for this run. The next may be one that takes probes out.
            self.target.forget_stop_request()

    def _run(
        self, done: threading.Event, deadline: float | None, command: GuestCommand | None
    ) -> Stop | None:
        while not done.is_set():
            now = time.monotonic()
            end = math.inf if deadline is None else deadline
            if end <= now:
                break
            # Where the guest's memory can be read at stops only, it is stopped to be read.
            until = min(end, now + _DRAIN_S) if self._drains_at_stops else end
            remaining = None if until == math.inf else until - now
            stop = self.target.run(self.probes.on_stop, remaining, self._beside)
            self._events.raise_error()
            if stop is not None:
                return stop
            if command is not None and command.poll() is not None:
                break
            if command is None and not until <= time.monotonic() < end:
                break
            if self._drains_at_stops:
                self._idle()
        return None

    @property
    def _drains_at_stops(self) -> bool:
        return self.resident.engine.is_open and not self.target.capabilities.reads_while_running

    def poll(self, budget_s: float | None = None) -> bool:
        """Hand out what was recorded since; for faces whose kernel runs without :meth:`run`.

        :param budget_s: seconds after which the rest is left for the next time
        :return: whether a rest was left
        :raises Exception: what an event listener or an idle hook raised
        """
        if not self.resident.engine.is_open or self.resident.engine.calling or self._closed:
            return False
        deadline = math.inf if budget_s is None else time.monotonic() + budget_s
        # A part at a time: what listeners do with the events takes longer than to read them.
        while rest := self._idle(min(deadline, time.monotonic() + _SLICE_S)):
            if time.monotonic() > deadline:
                break
        return rest

    def _beside(self) -> None:
        self._idle()

    def _idle(self, deadline: float | None = None) -> bool:
        if not self.target.running:
            self.probes.settle()
        rest = self._take_resident(deadline)
        if self._on_panic is not None and self._panicked():
            self._on_panic()
            self.target.request_stop()
        for hook in tuple(self.idle_hooks):
            hook()
        if not (self.target.running and self._holds_back()):
            self._events.deliver()
        self._events.raise_error()
        return rest

    def _holds_back(self) -> bool:
        # A record that was being written is older than what has happened since.
        if not self.resident.engine.in_flight:
            self._held_since = math.inf
            return False
        now = time.monotonic()
        self._held_since = min(self._held_since, now)
        return now - self._held_since < _HOLD_S

    def _panicked(self) -> bool:
        capabilities = self.target.capabilities
        readable = capabilities.reads_while_running or not self.target.running
        try:
            return readable and self.kernel.panicked
        except TargetLost:
            return False  # what it had recorded is still handed out

    @property
    def limit_reached(self) -> bool:
        """Whether the last :meth:`run` ended by its number of events."""
        return self._limit is not None and self._emitted >= self._limit

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Unregister every probe, newest first, and let the kernel run on."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self.target.close)
            stack.callback(self._withdraw)
            for hook in self._stop_hooks:
                stack.callback(hook, self)

    def _withdraw(self) -> None:
        try:
            self.target.interrupt()
            with self.resident.engine.removals():
                self.probes.close()
            self.resident.close()
        except TargetLost:
            pass  # a guest that is gone needs no cleaning

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _define_one(
        self,
        definition: ProbeDefinition,
        hardware: bool,
        stop: bool,
        tier: Tier,
        inlined_copies: bool = True,
    ) -> Probe:
        if definition.name is None:
            definition = self._named(definition)
        reason = _stops_because(definition, hardware, stop, tier)
        if not reason:
            try:
                may_stop = tier == "auto" and definition.aggregation is None
                resident = self.resident.probe(
                    definition,
                    inlined_copies=inlined_copies,
                    stopping=functools.partial(
                        probe_from_definition, definition, self.kernel, self._emit
                    )
                    if may_stop
                    else None,
                )
                return self.probes.register(resident)
            except _NOT_RESIDENT as e:
                if tier == "resident" or definition.aggregation is not None:
                    raise
                reason = str(e)
        elif tier == "resident" or definition.aggregation is not None:
            raise ProbeError(f"{definition.event_name} cannot run in the guest: {reason}")
        probe = probe_from_definition(definition, self.kernel, self._emit, hardware=hardware)
        probe.tier_reason = reason
        probe.inlined_copies &= inlined_copies
        self.probes.register(probe)
        (self._stop_on.add if stop else self._stop_on.discard)(probe.name)
        return probe

    def _register_verdict(self, probe: VerdictProbe, name: str | None) -> VerdictProbe:
        if name is None:
            taken = {other.name for other in self.probes}
            names = (f"{probe.name}_{n}" if n else probe.name for n in itertools.count())
            probe.name = next(each for each in names if each not in taken)
        self.probes.register(probe)
        return probe

    def _named(self, definition: ProbeDefinition) -> ProbeDefinition:
        # perf probe's way: the second probe at a place gets _1 behind its name.
        taken = {probe.name for probe in self.probes}
        base = name = definition.event_name
        for number in itertools.count(1):
            if f"{definition.event_group}/{name}" not in taken:
                break
            name = f"{base}_{number}"
        return dataclasses.replace(definition, name=name)

    def _expand(self, definition: ProbeDefinition) -> Iterator[ProbeDefinition]:
        assert definition.function is not None
        pattern = definition.function
        names = [
            name
            for name in self.function_names(definition.module)
            if fnmatch.fnmatchcase(name, pattern) and not name.startswith("__pfx_")
        ]
        if not names:
            raise ProbeError(f"no function matches {pattern!r}")
        if len(names) > _GLOB_LIMIT:
            raise CommandError(
                f"{pattern!r} matches {len(names)} functions, more than {_GLOB_LIMIT}; "
                "narrow it down"
            )
        prefix = f"{definition.name}_" if definition.name else None
        for name in names:
            yield dataclasses.replace(
                definition,
                function=name,
                name=f"{prefix}{name.replace('.', '_')}" if prefix else None,
                text="",
            )

    def _take_before(self) -> None:
        self._take_resident()

    def _take_resident(self, deadline: float | None = None) -> bool:
        # What was recorded in the guest: the order is kept with what is handled at stops.
        if self._drains_at_stops and self.target.running:
            return False
        events = self.resident.events(final=not self.target.running)
        late = False
        while not (late or self.limit_reached) and (event := next(events, None)) is not None:
            self._emitted += 1
            self._events.append(event)
            late = deadline is not None and time.monotonic() > deadline
        if self.limit_reached:
            self._done.set()
            self.target.request_stop()
        return late

    def _emit(self, event: Event, hit: Hit) -> None:
        self._emitted += 1
        self._events.append(event)
        if self.limit_reached or event.probe in self._stop_on:
            hit.stop()


def _stops_because(definition: ProbeDefinition, hardware: bool, stop: bool, tier: Tier) -> str:
    # What was asked for that code in the guest cannot do, whatever the definition.
    if tier == "stop":
        return "asked for"
    if definition.kind not in "pr":
        return "a data watch"
    if hardware:
        return "a debug register is asked for"
    return "the kernel is to stand after each event" if stop else ""
