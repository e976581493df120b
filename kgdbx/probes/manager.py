"""All probes of a session: registered, placed, and taken back."""

import errno
import time
from collections.abc import Callable, Iterator

from kgdbx.errors import KgdbxError, ProbeError, TargetError, TargetLost
from kgdbx.probes.dispatch import Dispatcher
from kgdbx.probes.kretprobe import KretprobeInstance, ReturnTable
from kgdbx.probes.module_events import ModuleEvents
from kgdbx.probes.probe import HandlerFault, Probe, State
from kgdbx.probes.promotion import Promotion
from kgdbx.probes.resolve import parse_place, resolve_points
from kgdbx.probes.site import Site
from kgdbx.probes.sites import Sites
from kgdbx.probes.watch import Watch, Watches
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.modules import LoadedModule
from kgdbx.target.base import Stop

__all__ = ("ProbeManager",)

_HANDLER_LIMIT_S = 10.0


class ProbeManager:
    """Registers probes with a kernel and runs their handlers.

    The target calls :meth:`on_stop` at each stop. Breakpoints are inserted at once, also from a
    handler; they are removed when no handler runs (a debugger that deletes a breakpoint while it
    reports a hit of it crashes).

    :ivar promotion: which breakpoints give way to doorbells
    :ivar clock_ns: tells when a hit with a time stamp happened, or one whose time stamp is not
        known; by default by the host's clock, since the manager was made
    :param handler_limit_s: seconds after which a handler is interrupted; None for no limit
    """

    def __init__(self, kernel: Kernel, *, handler_limit_s: float | None = _HANDLER_LIMIT_S) -> None:
        self.kernel = kernel
        self.handler_limit_s = handler_limit_s
        self.returns = ReturnTable(kernel)
        self.fault_listeners: list[Callable[[Probe, HandlerFault], None]] = []
        self.loading_listeners: list[Callable[[LoadedModule], None]] = []
        self.freeing_listeners: list[Callable[[tuple[tuple[int, int], ...]], None]] = []
        started_ns = time.monotonic_ns()
        self.clock_ns: Callable[[int | None], int] = lambda _: time.monotonic_ns() - started_ns
        self._probes: list[Probe] = []
        self._sites = Sites(kernel, self.returns)
        self._watches = Watches(kernel)
        self.promotion = Promotion(self._sites)
        self._dispatcher = Dispatcher(
            kernel, self._sites, self._watches, self.returns, self.promotion
        )
        self._module_events = ModuleEvents(self)

    def __iter__(self) -> Iterator[Probe]:
        """The registered probes, in the order of their registration."""
        return iter([p for p in self._probes if not p.is_internal])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The breakpoints in the guest."""
        return tuple(self._sites)

    @property
    def handling(self) -> int | None:
        """The vCPU whose handlers run; None if none do."""
        return self._sites.handling

    @property
    def stray_stops(self) -> int:
        """Stops at no breakpoint of ours."""
        return self._dispatcher.stray_stops

    def find(self, name: str) -> Probe:
        """A registered probe by name or number.

        :raises ProbeError: ENOENT if there is none
        """
        for probe in self:
            if name in (probe.name, probe.name.rpartition("/")[2], str(probe.number)):
                return probe
        names = ", ".join(probe.name for probe in self) or "none"
        raise ProbeError(f"there is no probe {name!r}; registered: {names}", errno.ENOENT)

    def register(self, probe: Probe) -> Probe:
        """Put a probe into the kernel, or make it wait for its module.

        :raises ProbeError: with the errno that register_kprobe() would give; nothing is left
            behind then
        """
        if probe.state not in (State.NEW, State.UNREGISTERED):
            raise ProbeError(f"probe {probe.name!r} is registered already", errno.EINVAL)
        if any(p.name == probe.name for p in self._probes):
            raise ProbeError(f"there is a probe named {probe.name!r}", errno.EEXIST)
        probe.hits = probe.nmissed = 0
        probe.manager = self
        try:
            self._place(probe)
        except BaseException:
            probe.manager = None
            probe.state = State.NEW
            raise
        self._probes.append(probe)
        return probe

    def unregister(self, probe: Probe) -> None:
        """Remove a probe; does nothing if it is not registered."""
        if probe not in self._probes:
            return
        self._probes.remove(probe)
        self._withdraw(probe)
        probe.state = State.UNREGISTERED
        if probe.tier == "resident" and not any(each.tier == "resident" for each in self):
            self.promotion.demote_own()
        self._sites.remove_stale()

    def enable(self, probe: Probe) -> None:
        """Call a disabled probe's handlers again."""
        if probe.state is State.DISABLED:
            self._place(probe)
        elif probe.state is State.GONE:
            raise ProbeError(f"the code of probe {probe.name!r} is gone", errno.EINVAL)

    def disable(self, probe: Probe) -> None:
        """Take a probe's breakpoints out, and keep its counters."""
        if probe.state in (State.ENABLED, State.PENDING, State.GONE):
            self._withdraw(probe)
            probe.state = State.DISABLED
            self._sites.remove_stale()

    def close(self) -> None:
        """Unregister everything, newest first.

        :raises TargetError: the first error, after all were tried
        """
        first: TargetError | None = None
        for probe in tuple(reversed(self._probes)):
            try:
                self.unregister(probe)
            except TargetError as e:
                first = first or e
        if first is not None:
            raise first

    def report_fault(self, probe: Probe, fault: HandlerFault) -> None:
        """Tell listeners that a handler raised."""
        for listener in tuple(self.fault_listeners):
            listener(probe, fault)

    # Stops

    def on_stop(self, stop: Stop) -> bool:
        """Handle a stop of the kernel.

        :return: True to let the kernel run on
        """
        return self._dispatcher.on_stop(stop)

    def on_stop_between(self, stop: Stop) -> bool:
        """As :meth:`on_stop`, for stops while the guest makes calls for us: it goes on in any
        case, and what a handler asked for comes after them.
        """
        if not self.on_stop(stop):
            self._dispatcher.stand_later()
        return True

    def settle(self) -> None:
        """Handle the hits that wait; the kernel stands, and was not stopped by one of them."""
        self._dispatcher.settle()

    def watch_return(self, instance: KretprobeInstance) -> bool:
        """Make sure that a call's return is seen.

        :return: False if no breakpoint can be inserted there
        """
        return self._sites.watch_return(instance)

    # Placing

    def _place(self, probe: Probe) -> None:
        if isinstance(probe, Watch):
            self._watches.place(probe)
            return
        place = parse_place(probe.where)
        loaded = self.kernel.modules.find(place.module) if place.module else None
        points, probe.notes = resolve_points(
            self.kernel, place, module=loaded, inlined=probe.inlined_copies
        )
        if place.module or any(p.function.module for p in points or ()):
            self._module_events.follow()
        if points is None:
            probe.state = State.PENDING
            return
        probe.points = points
        self._attach(probe)

    def _attach(self, probe: Probe) -> None:
        probe.prepare(self.kernel)
        try:
            for attachment in probe.attachments():
                site = self._sites.make(attachment.point.address, hardware=probe.hardware)
                if site.only_looks and not probe.is_internal:
                    site.demote()
                site.attachments.append(attachment)
                site.insert()
            probe.install()
        except BaseException:
            self._withdraw(probe)
            self._sites.remove_stale()
            raise
        probe.state = State.ENABLED
        if probe.is_internal:
            self.promotion.promote_own()

    def _withdraw(self, probe: Probe) -> None:
        if isinstance(probe, Watch):
            self._watches.withdraw(probe)
            return
        probe.uninstall()
        self._sites.detach(probe)

    # Modules

    def follow_modules(self) -> None:
        """Have the listeners told of modules: with each that is loaded, before its code runs, and
        with guest-virtual ``(start, size_bytes)`` of memory of modules that is about to be freed.
        """
        self._module_events.follow()

    def module_loaded(self, module: LoadedModule) -> None:
        """Place the probes that wait for a module. Its code has not run yet."""
        for listener in tuple(self.loading_listeners):
            listener(module)
        waiting = [probe for probe in self._probes if _waits_for(probe, module)]
        try:
            with self.promotion.placing():
                self._place_waiting(waiting, module)
        except TargetLost:
            raise
        except KgdbxError:
            # All at once they do not fit: one by one, as many as do.
            for probe in waiting:
                if probe.state is State.ENABLED:
                    self._withdraw(probe)
                    probe.state = State.GONE
            self._place_waiting(waiting, module)

    def _place_waiting(self, waiting: list[Probe], module: LoadedModule) -> None:
        for probe in waiting:
            try:
                points, probe.notes = resolve_points(
                    self.kernel,
                    parse_place(probe.where),
                    module=module,
                    inlined=probe.inlined_copies,
                )
                probe.points = points or ()
                self._attach(probe)
            except TargetLost:
                raise
            except KgdbxError as e:
                probe.record_fault("register", e)

    def memory_freed(self, regions: tuple[tuple[int, int], ...]) -> None:
        """Take back what lies in memory that is about to be freed.

        :param regions: guest-virtual ``(start, size_bytes)``
        """
        for listener in tuple(self.freeing_listeners):
            listener(regions)

        def freed(address: int) -> bool:
            return any(start <= address < start + size for start, size in regions)

        for probe in tuple(self._probes):
            if probe.state is State.ENABLED and any(freed(p.address) for p in probe.points):
                self._withdraw(probe)
                probe.points = tuple(p for p in probe.points if not freed(p.address))
                probe.state = State.GONE
                if probe.points:
                    self._attach(probe)
        self._sites.forget_code(freed)


def _waits_for(probe: Probe, module: LoadedModule) -> bool:
    if probe.state not in (State.PENDING, State.GONE):
        return False
    name = parse_place(probe.where).module
    return name is not None and name.replace("-", "_") == module.name
