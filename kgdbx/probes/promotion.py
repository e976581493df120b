"""Breakpoints give way to doorbells, which stop the kernel faster or cost it nothing, and back."""

from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext

from kgdbx.errors import KgdbxError
from kgdbx.probes.site import Doorbell, Site
from kgdbx.probes.sites import Sites

__all__ = ("Promotion",)

# A doorbell takes as long to install as about as many breakpoints' stops, with the guest's first
# memory of ours or without.
_BUSY_HITS = 32
_BUSY_HITS_WHEN_READY = 8
_TRACED = "the guest's own ftrace traces the function"


class Promotion:
    """Decides which sites have doorbells.

    :ivar doorbell: makes them; None if there can be none
    :ivar placing: entered while several are placed
    """

    def __init__(self, sites: Sites) -> None:
        self.doorbell: Doorbell | None = None
        self.placing: Callable[[], AbstractContextManager[None]] = nullcontext
        self._sites = sites
        self._busy: list[Site] = []
        self._promoting = False

    def note(self, site: Site) -> None:
        """After a hit: a site that has many is promoted when the handlers are through."""
        doorbell = self.doorbell
        if doorbell is None or site.hits > _BUSY_HITS or site.resume is not None:
            return
        is_busy = site.hits >= (_BUSY_HITS_WHEN_READY if doorbell.is_ready else _BUSY_HITS)
        is_new = not site.unpromoted and site not in self._busy
        if is_busy and is_new and site.can_ring and not site.is_ours:
            self._busy.append(site)

    def promote_busy(self) -> None:
        """Promote what is hit often."""
        # The guest runs meanwhile, and other probes may be hit, and become busy.
        if not self._can_promote:
            return
        doorbell, self._promoting = self.doorbell, True
        assert doorbell is not None
        busy = bool(self._busy)
        try:
            while self._busy:
                site = self._busy.pop()
                still = self._sites.at(site.address) is site and site.resume is None
                if still and site.can_ring:
                    self._promote(doorbell, [site], only_looks=False)
        finally:
            self._promoting = False
        if busy:
            self.promote_own()

    def promote_own(self) -> None:
        """Promote the sites of kgdbx's own probes, once the guest has code of ours anyway.

        A breakpoint costs the guest time wherever it is: QEMU goes through all of them at each
        jump to another page (check_for_breakpoints() in accel/tcg/cpu-exec.c).
        """
        doorbell = self.doorbell
        if doorbell is None or not doorbell.is_ready or not self._can_promote:
            return
        sites = [
            site
            for site in self._sites
            if site.is_ours and site.can_ring and site.resume is None and not site.unpromoted
        ]
        if sites:
            self._promoting = True
            try:
                self._promote(doorbell, sites, only_looks=True)
            finally:
                self._promoting = False

    @property
    def _can_promote(self) -> bool:
        # What is placed takes calls of the guest's, which are not made within others: the vCPU of a
        # handler may be inside of the kernel's allocator. There will be another stop.
        doorbell = self.doorbell
        idle = doorbell is not None and doorbell.is_idle
        return idle and not self._promoting and self._sites.handling is None

    def _promote(self, doorbell: Doorbell, sites: list[Site], *, only_looks: bool) -> None:
        made: dict[Site, int] = {}
        try:
            with self.placing():
                for site in sites:
                    try:
                        made[site] = doorbell.insert(site.address, only_looks=only_looks)
                    except KgdbxError as e:
                        site.unpromoted = str(e)
            if made:
                doorbell.watch()
        except KgdbxError as e:
            for site in made:
                doorbell.remove(site.address)
                site.unpromoted = str(e)
            return
        for site, resume in made.items():
            if doorbell.is_lifted(site.address):
                doorbell.remove(site.address)
                site.unpromoted = _TRACED
            else:
                site.promote(doorbell, resume, only_looks=only_looks)

    def demote(self, addresses: Container[int]) -> None:
        """Put breakpoints in the place of doorbells.

        :param addresses: of their jumps
        """
        for site in self._sites:
            if site.jumps_from in addresses:
                site.demote()
                site.unpromoted = _TRACED

    def demote_own(self) -> None:
        """Put the breakpoints of kgdbx's own probes back: the kernel's code is whole again."""
        for site in self._sites:
            if site.is_ours:
                site.demote()
