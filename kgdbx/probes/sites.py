"""The breakpoints of a manager: made when they are needed, removed when no handler runs."""

from collections.abc import Callable, Iterator

from kgdbx.errors import ProbeError
from kgdbx.probes.kretprobe import KretprobeInstance, ReturnTable
from kgdbx.probes.probe import Probe
from kgdbx.probes.site import Site
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import BreakpointKind

__all__ = ("Sites",)

_IDLE_RETURN_SITES = 256


class Sites:
    """Sites by address.

    One that nobody needs any more is removed by :meth:`remove_stale`: a debugger that deletes a
    breakpoint while it reports a hit of it crashes. Until then it may be needed again.

    :param returns: the calls that kretprobes follow
    :ivar handling: the vCPU whose handlers run; None if none do
    """

    def __init__(self, kernel: Kernel, returns: ReturnTable) -> None:
        self.handling: int | None = None
        self._kernel = kernel
        self._returns = returns
        self._sites: dict[int, Site] = {}
        self._stale: list[Site] = []
        self._idle_returns: dict[int, None] = {}

    def __iter__(self) -> Iterator[Site]:
        return iter(tuple(self._sites.values()))

    def at(self, address: int) -> Site | None:
        """The site at an address, if there is one."""
        return self._sites.get(address)

    def make(self, address: int, *, hardware: bool) -> Site:
        """The site at an address, which may be new and not inserted yet."""
        site = self._sites.get(address)
        if site is None:
            revived = next((s for s in self._stale if s.address == address), None)
            if revived is not None:
                self._stale.remove(revived)
            kind = BreakpointKind.HARDWARE if hardware else BreakpointKind.SOFTWARE
            site = self._sites[address] = revived or Site(self._kernel, address, kind)
        return site

    def detach(self, probe: Probe) -> None:
        """Take a probe's attachments from all sites, and give up returns that nobody awaits."""
        for site in self:
            site.attachments = [a for a in site.attachments if a.probe is not probe]
            if site.watches_returns and not self._returns.is_awaited(site.address):
                self._ignore_return(site)
            self._retire_if_unused(site)

    def forget_code(self, freed: Callable[[int], bool]) -> None:
        """Give up the returns to code that is about to be freed.

        :param freed: whether an address is in that code
        """
        for site in self:
            if freed(site.address):
                self._ignore_return(site)
                self._retire_if_unused(site)

    def remove_stale(self) -> None:
        """Take breakpoints that nobody needs out of the guest; does nothing while handlers run."""
        if self.handling is not None:
            return
        while self._stale:
            site = self._stale.pop()  # the guest may run on meanwhile, and come here
            try:
                site.remove()
            except BaseException:
                self._stale.append(site)
                raise

    # Returns

    def watch_return(self, instance: KretprobeInstance) -> bool:
        """Make sure that a call's return is seen.

        :return: False if no breakpoint can be inserted there
        """
        site = self.make(instance.ret_addr, hardware=instance.rp.hardware)
        try:
            site.insert()
        except ProbeError as e:
            self._retire_if_unused(site)
            instance.entry.probe.record_fault("return", e)
            return False
        site.watches_returns = True
        self._idle_returns.pop(site.address, None)
        return True

    def returned(self, site: Site) -> None:
        """A call has returned here; another one is likely to: the breakpoint stays for a while."""
        if site.watches_returns and not self._returns.is_awaited(site.address):
            self._idle_returns[site.address] = None
            while len(self._idle_returns) > _IDLE_RETURN_SITES:
                address = next(iter(self._idle_returns))
                del self._idle_returns[address]
                if (idle := self._sites.get(address)) is not None:
                    idle.watches_returns = False
                    self._retire_if_unused(idle)

    def _ignore_return(self, site: Site) -> None:
        site.watches_returns = False
        self._idle_returns.pop(site.address, None)

    def _retire_if_unused(self, site: Site) -> None:
        used = site.attachments or site.watches_returns
        if not used and self._sites.pop(site.address, None) is not None:
            self._stale.append(site)
