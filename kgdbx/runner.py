"""Running the kernel of a session: what ends a run, and the events that come out of it."""

import math
import threading
import time
from collections.abc import Callable, Sequence

from kgdbx.endings import GuestCommand, stop_at_end, stop_on_signals
from kgdbx.errors import TargetLost
from kgdbx.probes.event import Event
from kgdbx.probes.event_queue import EventQueue
from kgdbx.probes.manager import ProbeManager
from kgdbx.probes.probe import Hit
from kgdbx.resident.tier import ResidentTier
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import Stop

__all__ = ("Runner",)

_DRAIN_S = 0.25
_SLICE_S = 0.01
_HOLD_S = 10.0
_FINISH_S = 0.002
_FINISH_TRIES = 50


class Runner:
    """Lets a kernel run, and hands out the events of both tiers in their order.

    :param events: where the probes of the stop tier put theirs
    :param idle_hooks: called again and again while the kernel runs, and once more after it
    :ivar stop_on: names of probes after whose events the kernel is to stand
    """

    def __init__(
        self,
        kernel: Kernel,
        probes: ProbeManager,
        resident: ResidentTier,
        events: EventQueue,
        idle_hooks: Sequence[Callable[[], None]],
    ) -> None:
        self.stop_on: set[str] = set()
        self._kernel = kernel
        self._target = kernel.target
        self._probes = probes
        self._resident = resident
        self._events = events
        self._idle_hooks = idle_hooks
        self._done = threading.Event()
        self._emitted = 0
        self._limit: int | None = None
        self._held_since = math.inf
        self._on_panic: Callable[[], None] | None = None

    @property
    def limit_reached(self) -> bool:
        """Whether the last run ended by its number of events."""
        return self._limit is not None and self._emitted >= self._limit

    def run(
        self, timeout_s: float | None, count: int | None, command: GuestCommand | None
    ) -> Stop | None:
        """As :meth:`~kgdbx.session.Session.run`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._limit = None if count is None else self._emitted + count
        done = self._done = threading.Event()
        self._target.forget_stop_request()
        self._events.hurry = False
        self._on_panic = None if self._kernel.panicked else done.set
        try:
            with (
                stop_on_signals(self._target, done, self._events),
                stop_at_end(self._target, command, done),
            ):
                try:
                    stop = self._run(done, deadline, command) or self._finish()
                finally:
                    self._idle()
                # Events of the guest's own making end a run without a stop that was one of them.
                return self._target.interrupt() if stop is None and self.limit_reached else stop
            return None  # a signal came while a listener was stuck
        finally:
            # It was meant for this run. The next may be one that takes probes out.
            self._target.forget_stop_request()

    def poll(self, budget_s: float | None) -> bool:
        """As :meth:`~kgdbx.session.Session.poll`."""
        if not self._resident.engine.is_open or self._resident.engine.calling:
            return False
        deadline = math.inf if budget_s is None else time.monotonic() + budget_s
        # A part at a time: what listeners do with the events takes longer than to read them.
        while rest := self._idle(min(deadline, time.monotonic() + _SLICE_S)):
            if time.monotonic() > deadline:
                break
        return rest

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
            stop = self._target.run(self._probes.on_stop, remaining, self._beside)
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

    def _finish(self) -> Stop | None:
        # A vCPU that was stopped while it wrote a record keeps back those that came after it, such
        # as an interrupt's. Where the run has ended by itself a moment more makes no difference.
        if self.limit_reached or not self._resident.engine.is_open or self._kernel.panicked:
            return None
        unfinished = self._resident.engine.begun()
        for _ in range(_FINISH_TRIES):
            self._take(None)
            if self.limit_reached or not unfinished():
                break  # of a number of events the last one has come: the kernel stands
            self._target.forget_stop_request()
            stop = self._target.run(self._probes.on_stop, _FINISH_S)
            if stop is not None:
                return stop
        return None

    @property
    def _drains_at_stops(self) -> bool:
        return self._resident.engine.is_open and not self._target.capabilities.reads_while_running

    def _beside(self) -> None:
        if self._done.is_set():  # a run within this one, for calls of the guest's, took the request
            self._target.request_stop()
        self._idle()

    def _idle(self, deadline: float | None = None) -> bool:
        if not self._target.running:
            self._probes.settle()
        rest = self._take(deadline)
        if self._on_panic is not None and self._panicked():
            self._on_panic()
            self._target.request_stop()
        for hook in tuple(self._idle_hooks):
            hook()
        if not (self._target.running and self.holds_back()):
            self._events.deliver()
        self._events.raise_error()
        return rest

    def _panicked(self) -> bool:
        readable = self._target.capabilities.reads_while_running or not self._target.running
        try:
            return readable and self._kernel.panicked
        except TargetLost:
            return False  # what it had recorded is still handed out

    # Events

    def emit(self, event: Event, hit: Hit) -> None:
        """Take an event of the stop tier, while the handlers of its hit run."""
        self._emitted += 1
        self._events.append(event)
        if self.limit_reached or event.probe in self.stop_on:
            hit.stop()

    def take_resident(self) -> None:
        """Take what was recorded in the guest: its order is kept with what is handled at stops."""
        self._take(None)

    def holds_back(self) -> bool:
        """Whether events have to wait for a record that was being written: it is older than what
        has happened since.
        """
        if not self._resident.engine.in_flight:
            self._held_since = math.inf
            return False
        now = time.monotonic()
        self._held_since = min(self._held_since, now)
        return now - self._held_since < _HOLD_S

    def _take(self, deadline: float | None) -> bool:
        # Whether it was too much until a deadline.
        if self._drains_at_stops and self._target.running:
            return False
        events = self._resident.events(final=not self._target.running)
        late = False
        while not (late or self.limit_reached) and (event := next(events, None)) is not None:
            self._emitted += 1
            self._events.append(event)
            late = deadline is not None and time.monotonic() > deadline
        if self.limit_reached:
            self._done.set()
            self._target.request_stop()
        return late
