"""All probes of a session: registering, hits, and taking everything back."""

import errno
import time
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, nullcontext

from kgdbx.errors import KgdbxError, ProbeError, TargetError, TargetLost
from kgdbx.probes.kretprobe import Kretprobe, KretprobeInstance, ReturnTable
from kgdbx.probes.module_events import ModuleEvents
from kgdbx.probes.probe import HandlerFault, Hit, Probe, State
from kgdbx.probes.resolve import parse_place, resolve_points
from kgdbx.probes.site import Doorbell, Site
from kgdbx.probes.watch import Watch
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.modules import LoadedModule
from kgdbx.target.base import BreakpointKind, Stop, StopReason

__all__ = ("ProbeManager",)

_IDLE_RETURN_SITES = 256
_HANDLER_LIMIT_S = 10.0
_BUSY_HITS = 64  # a doorbell takes as long to install as about as many breakpoints' stops


class ProbeManager:
    """Registers probes with a kernel and runs their handlers.

    The target calls :meth:`on_stop` at each stop. Breakpoints are inserted at once, also from a
    handler; they are removed when no handler runs (a debugger that deletes a breakpoint while it
    reports a hit of it crashes).

    :ivar placing: entered while several probes are placed that waited for a module
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
        self.stray_stops = 0
        started_ns = time.monotonic_ns()
        self.clock_ns: Callable[[int | None], int] = lambda _: time.monotonic_ns() - started_ns
        self._probes: list[Probe] = []
        self._sites: dict[int, Site] = {}
        self._watches: list[Watch] = []
        self._idle_returns: dict[int, None] = {}
        self._module_events = ModuleEvents(self)
        self.handling: int | None = None  # the vCPU whose handlers run
        self._stale: list[Site] = []
        self._doorbell: Doorbell | None = None
        self._busy: list[Site] = []  # hit often enough to be worth a doorbell
        self._promoting = False
        self._must_stand = False
        self.placing: Callable[[], AbstractContextManager[None]] = nullcontext

    def __iter__(self) -> Iterator[Probe]:
        """The registered probes, in the order of their registration."""
        return iter([p for p in self._probes if not p.is_internal])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The breakpoints in the guest."""
        return tuple(self._sites.values())

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
            for site in self._sites.values():  # the kernel's code is whole again
                if site.is_ours:
                    site.demote()
        self._remove_stale()

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
            self._remove_stale()

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

    def use_doorbell(self, doorbell: Doorbell) -> None:
        """Put a doorbell in the place of each breakpoint that is hit often."""
        self._doorbell = doorbell

    def on_stop(self, stop: Stop) -> bool:
        """Handle a stop of the kernel.

        :return: True to let the kernel run on
        """
        self.kernel.stopped()
        if stop.reason not in (StopReason.TRAP, StopReason.WATCHPOINT):
            return False
        if self._doorbell is not None:
            # A handler that has the guest make calls is under way: bells wait until it is through.
            stands = self.handling is None and self._answer(self._doorbell)
            if stands or self._doorbell.rang(stop):
                return not stands
        target = self.kernel.target
        regs = target.read_registers(stop.cpu)
        hit = Hit(self.kernel, stop.cpu, regs, regs.rip)
        outer, self.handling = self.handling, stop.cpu
        try:
            if stop.reason is StopReason.WATCHPOINT:
                self._on_watchpoint(hit, stop)
            else:
                self._on_breakpoint(hit)
        finally:
            self.handling = outer
            target.write_registers(stop.cpu, hit.regs)
            self._remove_stale()
        if self._busy and self._doorbell is not None and not hit.stop_requested:
            return self._promote(self._doorbell)
        return not hit.stop_requested

    def settle(self) -> None:
        """Handle the hits that wait; the kernel stands, and was not stopped by one of them."""
        if self._doorbell is not None:
            self._answer(self._doorbell)

    def _answer(self, doorbell: Doorbell) -> bool:
        # Whether the kernel is to be left standing. Each stop may find several hits, its own
        # among them or not.
        stands = False
        try:
            for cpu, address, regs, tsc in doorbell.hits():
                hit = Hit(self.kernel, cpu, regs, address, tsc)
                site = self._sites.get(address)
                resume = site.resume if site is not None else None
                self.handling = cpu
                try:
                    if resume is not None:
                        self._on_breakpoint(hit)
                finally:
                    stands = stands or hit.stop_requested
                    doorbell.release(cpu, hit.regs, resume, stands=hit.stop_requested)
        finally:
            self.handling = None
            self._remove_stale()
        return stands

    def _promote(self, doorbell: Doorbell) -> bool:
        # The guest runs meanwhile, and other probes may be hit, and become busy.
        if self._promoting:
            return True
        self._promoting = True
        self._must_stand = False
        try:
            while self._busy:
                site = self._busy.pop()
                if self._sites.get(site.address) is site and site.can_ring:
                    self._hang(doorbell, [site], only_look=False)
        finally:
            self._promoting = False
        return not self._must_stand

    def ring(self) -> None:
        """Put doorbells in the place of breakpoints of kgdbx's own, once there is code in the
        guest anyway.

        A breakpoint costs the guest time wherever it is: QEMU goes through all of them at each
        jump to another page (check_for_breakpoints() in accel/tcg/cpu-exec.c).
        """
        doorbell = self._doorbell
        if doorbell is None or self._promoting or self.handling is not None:
            return
        sites = [
            site
            for site in self._sites.values()
            if site.is_ours and site.can_ring and site.resume is None and not site.unpromoted
        ]
        if sites and doorbell.is_ready:
            self._promoting = True
            try:
                self._hang(doorbell, sites, only_look=True)
            finally:
                self._promoting = False

    def demote(self, addresses: Container[int]) -> None:
        """Put breakpoints in the place of doorbells.

        :param addresses: of their jumps
        """
        for site in self._sites.values():
            if site.jumps_from in addresses:
                site.demote()

    def _hang(self, doorbell: Doorbell, sites: list[Site], *, only_look: bool) -> None:
        hung: dict[Site, int] = {}
        try:
            with self.placing():
                for site in sites:
                    try:
                        hung[site] = doorbell.insert(site.address, only_looks=only_look)
                    except KgdbxError as e:
                        site.unpromoted = str(e)
        except KgdbxError as e:
            for site in hung:
                doorbell.remove(site.address)
                site.unpromoted = str(e)
            return
        doorbell.watch()
        for site, resume in hung.items():
            site.promote(doorbell, resume, only_looks=only_look)

    def on_stop_between(self, stop: Stop) -> bool:
        """As :meth:`on_stop`, for stops while the guest makes calls for us: it goes on in any
        case, and what a handler asked for comes after them.
        """
        self._must_stand |= not self.on_stop(stop)
        return True

    def _on_breakpoint(self, hit: Hit) -> None:
        site = self._sites.get(hit.regs.rip)
        if site is None:
            # QEMU reports a vCPU again that reached its breakpoint while another one's was being
            # reported (debug_requested in system/runstate.c); that one has been dealt with.
            self.stray_stops += 1
        while site is not None:
            hit.address = site.address
            self._run_site(site, hit)
            # What follows may be another site: it must not be run past.
            next_site = None if site.only_looks else self._sites.get(hit.regs.rip)
            if next_site is None and self._doorbell is not None:
                site.pass_patched(hit)
            site = None if next_site is site else next_site

    def _run_site(self, site: Site, hit: Hit) -> None:
        if site.left_standing and site.left_standing.pop(hit.cpu, None) == hit.regs.rsp:
            site.execute_displaced(hit, None)
            return
        site.hits += 1
        if site.hits == _BUSY_HITS and site.can_ring and not site.is_ours:
            self._busy.append(site)
        if site.watches_returns:
            self._run_returns(site, hit)
            hit.address = site.address
        attachments = tuple(a for a in site.attachments if a.probe.active)
        skip = any(a.probe.active and a.before(hit) for a in attachments)
        if hit.regs.rip != site.address:
            return  # a handler sent the guest elsewhere
        if skip:
            site.skip_displaced(hit)
        elif site.execute_displaced(hit, self._on_watchpoint if self._watches else None):
            hit.address = site.address
            for attachment in attachments:
                if attachment.probe.active:
                    attachment.after(hit)
        if hit.stop_requested and self.kernel.function_at(hit.regs.rip) is None:
            # It went into code of ours, which would tell the user nothing: the kernel stands
            # where it was hit, and that is no second hit when it goes on.
            hit.regs.rip = site.address
            site.left_standing[hit.cpu] = hit.regs.rsp

    def _run_returns(self, site: Site, hit: Hit) -> None:
        for instance in self.returns.returning(hit.task.address, hit.regs.rsp):
            if instance.rp.active:
                instance.entry.returned(hit, instance)
        if site.watches_returns:
            self._note_idle(site)

    def _on_watchpoint(self, hit: Hit, stop: Stop) -> None:
        assert stop.address is not None
        for watch in tuple(self._watches):
            if watch.active and watch.covers(stop.address):
                hit.address = hit.regs.rip
                watch.accessed(hit)

    # Placing

    def _place(self, probe: Probe) -> None:
        if isinstance(probe, Watch):
            self._place_watch(probe)
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
        kind = BreakpointKind.HARDWARE if probe.hardware else BreakpointKind.SOFTWARE
        try:
            for attachment in probe.attachments():
                site = self._site(attachment.point.address, kind)
                if site.only_looks and not probe.is_internal:
                    site.demote()
                site.attachments.append(attachment)
                site.insert()
            probe.install()
        except BaseException:
            self._withdraw(probe)
            self._remove_stale()
            raise
        probe.state = State.ENABLED
        if probe.is_internal:
            self.ring()

    def _place_watch(self, watch: Watch) -> None:
        if isinstance(watch.where, int):
            watch.address = watch.where
        else:
            address = self.kernel.object_address(watch.where)
            if address is None:
                raise ProbeError(f"there is no variable {watch.where!r}", errno.ENOENT)
            watch.address = address
        watch.prepare(self.kernel)
        if not any(other.register == watch.register for other in self._watches):
            self.kernel.target.insert_breakpoint(*watch.register)
        self._watches.append(watch)
        watch.state = State.ENABLED

    def _withdraw(self, probe: Probe) -> None:
        if isinstance(probe, Watch):
            if probe in self._watches:
                self._watches.remove(probe)
                if not any(other.register == probe.register for other in self._watches):
                    self.kernel.target.remove_breakpoint(*probe.register)
            return
        probe.uninstall()
        if isinstance(probe, Kretprobe):
            self.returns.forget(probe)
        for site in tuple(self._sites.values()):
            site.attachments = [a for a in site.attachments if a.probe is not probe]
            if isinstance(probe, Kretprobe) and not self.returns.is_awaited(site.address):
                site.watches_returns = False
                self._idle_returns.pop(site.address, None)
            self._retire_if_unused(site)

    def _site(self, address: int, kind: BreakpointKind) -> Site:
        site = self._sites.get(address)
        if site is None:
            revived = next((s for s in self._stale if s.address == address), None)
            if revived is not None:
                self._stale.remove(revived)
            site = self._sites[address] = revived or Site(self.kernel, address, kind)
        return site

    def _retire_if_unused(self, site: Site) -> None:
        used = site.attachments or site.watches_returns
        if not used and self._sites.pop(site.address, None) is not None:
            self._stale.append(site)

    def _remove_stale(self) -> None:
        if self.handling is not None:
            return
        while self._stale:
            self._stale[-1].remove()
            self._stale.pop()

    # Returns

    def watch_return(self, instance: KretprobeInstance) -> bool:
        """Make sure that a call's return is seen.

        :return: False if no breakpoint can be inserted there
        """
        kind = BreakpointKind.HARDWARE if instance.rp.hardware else BreakpointKind.SOFTWARE
        site = self._site(instance.ret_addr, kind)
        try:
            site.insert()
        except ProbeError as e:
            self._retire_if_unused(site)
            instance.rp.record_fault("return", e)
            return False
        site.watches_returns = True
        self._idle_returns.pop(site.address, None)
        return True

    def _note_idle(self, site: Site) -> None:
        # A return address is likely to be returned to again: its breakpoint stays for a while.
        if not self.returns.is_awaited(site.address):
            self._idle_returns[site.address] = None
            self._retire_idle_returns(_IDLE_RETURN_SITES)

    def _retire_idle_returns(self, keep: int) -> None:
        while len(self._idle_returns) > keep:
            address = next(iter(self._idle_returns))
            del self._idle_returns[address]
            site = self._sites.get(address)
            if site is not None:
                site.watches_returns = False
                self._retire_if_unused(site)

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
            with self.placing():
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
        for address in tuple(self._sites):
            if freed(address):
                site = self._sites[address]
                site.watches_returns = False
                self._idle_returns.pop(address, None)
                self._retire_if_unused(site)


def _waits_for(probe: Probe, module: LoadedModule) -> bool:
    if probe.state not in (State.PENDING, State.GONE):
        return False
    name = parse_place(probe.where).module
    return name is not None and name.replace("-", "_") == module.name
