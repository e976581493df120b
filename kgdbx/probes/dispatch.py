"""From a stop of the kernel to the handlers of the probes that were hit."""

from kgdbx.probes.kretprobe import ReturnTable
from kgdbx.probes.probe import Hit
from kgdbx.probes.promotion import Promotion
from kgdbx.probes.site import Doorbell, Site
from kgdbx.probes.sites import Sites
from kgdbx.probes.watch import Watches
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import Stop, StopReason

__all__ = ("Dispatcher",)


class Dispatcher:
    """Runs handlers at stops, and has the guest go on behind the displaced instruction.

    :param returns: the calls that kretprobes follow
    :param promotion: told of each hit
    :ivar stray_stops: stops at no breakpoint of ours
    :ivar stood_at: the vCPU whose handler was the last to ask for a stop
    """

    def __init__(
        self,
        kernel: Kernel,
        sites: Sites,
        watches: Watches,
        returns: ReturnTable,
        promotion: Promotion,
    ) -> None:
        self.stray_stops = self.stood_at = 0
        self._inside = False
        self._must_stand: int | None = None
        self._promotion = promotion
        self._kernel = kernel
        self._sites = sites
        self._watches = watches
        self._returns = returns

    def on_stop(self, stop: Stop) -> bool:
        """Handle a stop of the kernel.

        :return: True to let the kernel run on
        """
        if self._inside:
            return self._handle(stop)
        self._inside, self._must_stand = True, None
        try:
            goes_on = self._handle(stop)
        finally:
            self._inside = False
        if goes_on and self._must_stand is not None:
            self._stand_at(self._must_stand)
            return False
        return goes_on

    def stand_later(self) -> None:
        """Leave the kernel standing at the end of the stop that is being handled.

        A handler asked for it while the guest made calls for what goes on there.
        """
        self._must_stand = self.stood_at

    def _handle(self, stop: Stop) -> bool:
        self._kernel.stopped()
        if stop.reason not in (StopReason.TRAP, StopReason.WATCHPOINT):
            self.stood_at = stop.cpu
            return False
        doorbell, stands = self._promotion.doorbell, False
        if doorbell is not None:
            # A handler that has the guest make calls is under way: bells wait until it is through.
            rang = doorbell.rang(stop)
            stands = self._sites.handling is None and self._answer(doorbell)
            if rang:
                return not stands
        target = self._kernel.target
        regs = target.read_registers(stop.cpu)
        hit = Hit(self._kernel, stop.cpu, regs, regs.rip)
        outer, self._sites.handling = self._sites.handling, stop.cpu
        try:
            if stop.reason is StopReason.WATCHPOINT:
                self._watches.accessed(hit, stop)
            else:
                self._on_breakpoint(hit)
        finally:
            self._sites.handling = outer
            target.write_registers(stop.cpu, hit.regs)
            self._sites.remove_stale()
        if hit.stop_requested and not stands:
            self._stand_at(stop.cpu)
        if hit.stop_requested or stands:
            return False
        self._promotion.promote_busy()
        return True

    def _stand_at(self, cpu: int) -> None:
        self.stood_at = cpu
        self._kernel.target.look_at(cpu)

    def settle(self) -> None:
        """Handle the hits that wait; the kernel stands, and was not stopped by one of them."""
        if self._promotion.doorbell is not None:
            self._answer(self._promotion.doorbell)

    # Doorbells

    def _answer(self, doorbell: Doorbell) -> bool:
        # Whether the kernel is to be left standing. Each stop may find several hits, its own
        # among them or not.
        standing: list[tuple[Hit, int | None]] = []
        try:
            for cpu, address, regs, tsc in doorbell.hits():
                hit = Hit(self._kernel, cpu, regs, address, tsc)
                site = self._sites.at(address)
                resume = site.resume if site is not None else None
                self._sites.handling = cpu
                try:
                    if resume is not None:
                        self._on_breakpoint(hit)
                finally:
                    if hit.stop_requested:
                        standing.append((hit, resume))  # the next handler may have the guest run on
                    else:
                        doorbell.release(cpu, hit.regs, resume, stands=False)
        finally:
            self._sites.handling = None
            for hit, resume in reversed(standing):
                if doorbell.waits(hit.cpu, hit.tsc):
                    doorbell.release(hit.cpu, hit.regs, resume, stands=True)
                self._stand_at(hit.cpu)
            if doorbell.gave_up:
                doorbell.gave_up = False
                for each in self._sites:
                    each.note_missed()
            self._sites.remove_stale()
        return bool(standing)

    # Breakpoints

    def _on_breakpoint(self, hit: Hit) -> None:
        site = self._sites.at(hit.regs.rip)
        if site is None:
            # QEMU reports a vCPU again that reached its breakpoint while another one's was being
            # reported (debug_requested in system/runstate.c); that one has been dealt with.
            self.stray_stops += 1
        while site is not None:
            hit.address = site.address
            self._run_site(site, hit)
            # What follows may be another site: it must not be run past.
            goes_behind = site.only_looks or site.is_shared
            next_site = None if goes_behind else self._sites.at(hit.regs.rip)
            if next_site is None and self._promotion.doorbell is not None:
                site.pass_patched(hit)
            site = None if next_site is site else next_site

    def _run_site(self, site: Site, hit: Hit) -> None:
        if hit.regs.rsp in site.left_standing:
            site.left_standing.discard(hit.regs.rsp)
            site.execute_displaced(hit, None)
            return
        site.hits += 1
        self._promotion.note(site)
        if site.watches_returns:
            self._run_returns(site, hit)
            hit.address = site.address
        attachments = tuple(a for a in site.attachments if a.probe.active)
        skip = any(a.probe.active and a.before(hit) for a in attachments)
        if hit.regs.rip != site.address:
            return  # a handler sent the guest elsewhere
        if skip:
            site.skip_displaced(hit)
        elif site.execute_displaced(hit, self._watches.accessed if self._watches else None):
            hit.address = site.address
            for attachment in attachments:
                if attachment.probe.active:
                    attachment.after(hit)
        if hit.stop_requested and (
            self._kernel.function_at(hit.regs.rip) is None
            or (site.is_shared and hit.regs.rip == site.resume)
        ):
            # It would go into code of ours, which would tell the user nothing, or miss it: the
            # kernel stands where it was hit, and that is no second hit when it goes on.
            hit.regs.rip = site.address
            site.left_standing.add(hit.regs.rsp)

    def _run_returns(self, site: Site, hit: Hit) -> None:
        for instance in self._returns.returning(hit.task.address, hit.regs.rsp):
            if instance.entry.probe.active:
                instance.entry.returned(hit, instance)
        self._sites.returned(site)
