"""The jumps at probed places: written, lifted where the guest's own ftrace traces, taken out."""

from collections.abc import Mapping, Sequence

from kgdbx.errors import ProbeError
from kgdbx.resident.build import jump
from kgdbx.resident.journal import Journal, Patch
from kgdbx.resident.place.displace import Displacement, displace
from kgdbx.resident.place.displacement import FTRACE_NOP
from kgdbx.resident.program import CodeUnit, Site
from kgdbx.resident.quiescence import Quiescence
from kgdbx.symbols.blacklist import Blacklist
from kgdbx.symbols.kernel import Function, Kernel

__all__ = ("Jumps",)

_JUMP_BYTES = 5
_ENDBR_BYTES = 4


class Jumps:
    """The places of a guest's code that jump to ours. All is changed at stops, and noted before.

    :param quiescence: waits for what stands inside of the bytes to replace
    """

    def __init__(self, kernel: Kernel, quiescence: Quiescence) -> None:
        self._kernel = kernel
        self._quiescence = quiescence
        self._sites: dict[int, Site] = {}
        self._lifted: set[int] = set()  # sites without their jump: ftrace's call is there
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
            self._blacklist = Blacklist(self._kernel)
        originals = {at: site.displacement.original for at, site in self._sites.items()}
        return displace(self._kernel, function, address, self._blacklist, originals)

    @property
    def units(self) -> set[CodeUnit]:
        """The code that the places jump to."""
        return {site.unit for site in self._sites.values() if site.unit is not None}

    def site(self, address: int) -> Site | None:
        """The place at an address, if it jumps to ours or is lifted."""
        return self._sites.get(address)

    def is_lifted(self, address: int) -> bool:
        """Whether a place is without its jump for now."""
        return address in self._lifted

    def write(self, journal: Journal, sites: Mapping[int, Site], stubs: Mapping[int, int]) -> None:
        """Have places jump to their stubs, all or none.

        :param sites: by address, new ones and such whose probes have changed
        :param stubs: guest-virtual address of each site's stub, by the site's
        :raises ProbeError: if the bytes to replace stay in use
        """
        new = (site.displacement for at, site in sites.items() if at not in self._sites)
        self._quiescence.wait_until_free(new)
        patches: list[Patch] = []
        for address, site in sites.items():
            is_nop = site.displacement.is_ftrace_nop and address not in self._sites
            if is_nop and self._kernel.read_code(address, _JUMP_BYTES) != FTRACE_NOP:
                raise ProbeError(f"the kernel has just patched its code at {address:#x}")
            site.jump = jump(address, stubs[address])
            if address in self._lifted:
                continue
            original = site.displacement.original[:_JUMP_BYTES]
            patches.append(Patch(address, original, site.jump))
        journal.patches(patches)
        done: list[Patch] = []
        try:
            for patch in patches:
                done.append(patch)  # before it is: ^C may come in between
                self._write_code(patch.address, patch.replacement)
        except BaseException:
            for patch in reversed(done):
                old = self._sites.get(patch.address)
                self._write_code(patch.address, old.jump if old else patch.original)
            raise
        self._sites.update(sites)

    def take_out(self, journal: Journal, addresses: Sequence[int]) -> None:
        """Put back what was there before our jumps, in the order given."""
        sites = [self._sites.pop(address) for address in addresses]
        for site in sites:
            self._restore(site)
        self._lifted.difference_update(addresses)
        journal.restored(addresses)

    # Beside the guest's own ftrace

    @property
    def in_place_of_ftrace(self) -> set[int]:
        """Where jumps stand in place of the NOP that ftrace writes its calls over."""
        return {
            address
            for address, site in self._sites.items()
            if site.displacement.is_ftrace_nop and address not in self._lifted
        }

    def lift(self, journal: Journal, addresses: Sequence[int]) -> None:
        """Put the NOPs back, and keep the sites."""
        for address in addresses:
            self._restore(self._sites[address])
            self._lifted.add(address)
        journal.restored(addresses)

    def put_back(self, journal: Journal) -> list[int]:
        """Write the jumps of lifted sites where there are NOPs again.

        :return: where that was
        """
        free = [
            address
            for address in self._lifted
            if self._kernel.read_code(address, _JUMP_BYTES) == FTRACE_NOP
        ]
        if free:
            self._lifted.difference_update(free)
            sites = [self._sites[address] for address in free]
            patches = [Patch(s.displacement.address, FTRACE_NOP, s.jump) for s in sites]
            journal.patches(patches)
            for patch in patches:
                self._write_code(patch.address, patch.replacement)
        return free

    def _restore(self, site: Site) -> None:
        at = site.displacement.address
        if at not in self._lifted:
            self._write_code(at, site.displacement.original[:_JUMP_BYTES])

    def _write_code(self, address: int, data: bytes) -> None:
        self._kernel.memory.write(address, data)
