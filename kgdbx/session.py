"""A session: one target, its kernel and its probes, closed in reverse order."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from kgdbx.definitions import Definitions, Tier
from kgdbx.endings import GuestCommand
from kgdbx.errors import TargetLost
from kgdbx.leaks.blocks import Block
from kgdbx.leaks.watch import LeakWatch
from kgdbx.machine.headers import kernel_header
from kgdbx.probes.arguments import argument_suppliers
from kgdbx.probes.definition import ProbeDefinition
from kgdbx.probes.event import Event
from kgdbx.probes.event_queue import EventfulManager, EventQueue
from kgdbx.probes.manager import ProbeManager
from kgdbx.probes.probe import Probe
from kgdbx.probes.resolve import parse_place, resolve_points
from kgdbx.probes.script import Script, read_script
from kgdbx.resident.ftrace_guard import FtraceGuard
from kgdbx.resident.nullify import Nullify
from kgdbx.resident.recover import Recovery
from kgdbx.resident.replace import CHandler, Replace
from kgdbx.resident.stop_clock import StopClock
from kgdbx.resident.tier import ResidentTier
from kgdbx.resident.verdict import Calls, Verdict, VerdictProbe
from kgdbx.runner import Runner
from kgdbx.symbols.elf import read_symbols
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import Stop, Target
from kgdbx.target.core import CoreRam
from kgdbx.target.ram import GuestRam

__all__ = ("Session",)


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
    :ivar leaves_standing: whether the kernel stands on when the session is closed; it then stood
        before
    :ivar leak_watch: what a face has modules watched by, if it does
    :ivar reported_leaks: what the last scan of a standing kernel has shown, in that order
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
        self.leaves_standing = False
        self.leak_watch: LeakWatch | None = None
        self.reported_leaks: tuple[Block, ...] = ()
        self.event_listeners: list[Callable[[Event], None]] = []
        self.idle_hooks: list[Callable[[], None]] = []
        events = EventQueue(self.event_listeners)
        self.probes: ProbeManager = EventfulManager(
            kernel,
            events,
            lambda: self._runner.take_resident(),
            lambda: self._runner.holds_back(),
        )
        self.resident = ResidentTier(
            kernel, self.probes.on_stop_between, ram, journal, lambda: self.probes.handling
        )
        self._runner = Runner(kernel, self.probes, self.resident, events, self.idle_hooks)
        self._definitions = Definitions(
            self.probes, self.resident, self._runner, self.function_names
        )
        promotion = self.probes.promotion
        promotion.placing = self.resident.engine.batch
        self.probes.clock_ns = StopClock(
            kernel, self.resident.engine, self.resident.reader, lambda: events.latest_ns
        ).ns
        guard = FtraceGuard(
            kernel,
            self.resident.engine,
            self.probes.register,
            self.probes,
            promotion.demote,
        )
        self.resident.engine.placed_listeners.append(guard.follow)
        if target.capabilities.cheap_watchpoints and ram is not None:
            promotion.doorbell = self.resident.doorbell
            self.resident.engine.placed_listeners.append(promotion.promote_own)
        self._scripts: list[Script] = []
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
        return self._definitions.define(text, hardware=hardware, stop=stop, tier=tier)

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
        return self._definitions.define_many(
            definitions, hardware=hardware, stop=stop, tier=tier, inlined_copies=inlined_copies
        )

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
        self.resident.check()
        return self._register_verdict(Calls(function, condition, module, name), Nullify(retval))

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
        self.resident.check()
        verdict: Verdict = (
            CHandler(other, self._kernel_header(), function)
            if isinstance(other, Path)
            else Replace(other, any_type=any_type)
        )
        return self._register_verdict(Calls(function, condition, module, name), verdict)

    def load_script(self, path: Path) -> list[Probe]:
        """Register the probes of a script; none of them if one is refused.

        :raises CommandError: if the script cannot be used, or its ``start()`` raises
        :raises ProbeError: if a probe of it cannot be placed
        """
        names = {"session": self, "kernel": self.kernel, "prog": self.kernel.program}
        script = read_script(path, names)
        placed: list[Probe] = []
        try:
            placed += (self.probes.register(probe) for probe in script.probes)
            script.start(self)
        except BaseException:
            for probe in reversed(placed):
                probe.unregister()
            raise
        self._scripts.append(script)
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
            yield from read_symbols(path).function_names

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
        return self._runner.run(timeout_s, count, command)

    def poll(self, budget_s: float | None = None) -> bool:
        """Hand out what was recorded since; for faces whose kernel runs without :meth:`run`.

        :param budget_s: seconds after which the rest is left for the next time
        :return: whether a rest was left
        :raises Exception: what an event listener or an idle hook raised
        """
        return not self._closed and self._runner.poll(budget_s)

    @property
    def limit_reached(self) -> bool:
        """Whether the last :meth:`run` ended by its number of events."""
        return self._runner.limit_reached

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Unregister every probe, newest first, and let the kernel run on or stand."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self.target.close, resume=not self.leaves_standing)
            stack.callback(self._withdraw)
            for script in self._scripts:
                stack.callback(script.stop, self)

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

    def _kernel_header(self) -> Path | None:
        vmlinux = self.kernel.vmlinux
        return kernel_header(vmlinux.path, vmlinux.build_id)

    def _register_verdict(self, calls: Calls, verdict: Verdict) -> VerdictProbe:
        probe = VerdictProbe(calls, verdict, self.resident.engine, self.resident.reader)
        if calls.name is None:
            taken = {other.name for other in self.probes}
            names = (f"{probe.name}_{n}" if n else probe.name for n in itertools.count())
            probe.name = next(each for each in names if each not in taken)
        self.probes.register(probe)
        return probe
