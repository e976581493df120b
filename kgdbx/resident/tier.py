"""Which definitions run inside the guest, and what keeps the others from it."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from kgdbx.probes.definition import ProbeDefinition
from kgdbx.probes.event import Event
from kgdbx.probes.probe import Probe
from kgdbx.resident.compile.codegen import NotResident
from kgdbx.resident.doorbell import Doorbell
from kgdbx.resident.engine import Engine
from kgdbx.resident.journal import Journal
from kgdbx.resident.maps import Maps
from kgdbx.resident.probe import ResidentProbe
from kgdbx.resident.reader import EventReader
from kgdbx.resident.reaper import Reaper
from kgdbx.resident.recover import Recovery, recover
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import Stop
from kgdbx.target.ram import GuestRam

__all__ = ("ResidentTier",)


class ResidentTier:
    """The resident side of a session.

    :param dispatch: handles stops that come while the guest makes calls for us
    :param ram: the guest's RAM seen from the host, if it can be
    :param journal: where to note what has to be put back; None keeps no journal
    :param handling: the vCPU whose handlers run
    :ivar unread: why nobody reads events while the guest runs; empty if they are read
    """

    def __init__(
        self,
        kernel: Kernel,
        dispatch: Callable[[Stop], bool],
        ram: GuestRam | None,
        journal: Path | None,
        handling: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.unread = ""
        self._kernel = kernel
        self._journal = journal
        self._dispatch = dispatch
        self.engine = Engine(
            kernel,
            dispatch,
            ram,
            lambda: Journal(journal, slide=kernel.slide),
            handling=handling,
        )
        self.doorbell = Doorbell(kernel, self.engine)
        self.reader = EventReader(kernel, self.engine.drain, lambda: self.engine.in_flight)
        self.maps = Maps(self.engine)
        self._reaper = Reaper(kernel, self.engine)

    def probe(
        self,
        definition: ProbeDefinition,
        *,
        inlined_copies: bool = True,
        stopping: Callable[[], Probe] | None = None,
    ) -> ResidentProbe:
        """A probe to be registered; whether it can run in the guest shows then.

        :param stopping: see :class:`~kgdbx.resident.probe.ResidentProbe`
        :raises NotResident: if this kernel cannot have any now
        """
        self.check()
        if self.unread and definition.aggregation is None:
            raise NotResident(self.unread)
        return ResidentProbe(
            definition,
            self.engine,
            self.reader,
            self.maps,
            inlined_copies=inlined_copies,
            stopping=stopping,
        )

    def check(self) -> None:
        """Whether this kernel can have probes of its own now.

        :raises NotResident: if not
        """
        if not self._kernel.target.capabilities.writes_code:
            raise NotResident(
                "KGDB cannot write kernel text; use the stop tier, or attach through QEMU's stub"
            )
        if not self._kernel.memory.booted:
            raise NotResident("the kernel has not booted")

    def recover(self) -> Recovery | None:
        """Put back what sessions that were killed left in the guest; None if there is nothing.

        What could not be put back is tried again the next time: its journal is kept under a name
        of its own, for this session writes another.

        :raises CommandError: if a journal cannot be used
        """
        if self._journal is None:
            return None
        kept = sorted(self._journal.parent.glob(f"{self._journal.name}.*"))
        done: Recovery | None = None
        for path in (self._journal, *kept):
            if path.exists():
                unused = self.engine.quiescence.wait_until_unused
                found = recover(self._kernel, path, self._dispatch, unused)
                done = found if done is None else done + found
        if self._journal.exists():
            names = (
                self._journal.with_name(f"{self._journal.name}.{n}") for n in itertools.count(1)
            )
            self._journal.rename(next(name for name in names if not name.exists()))
        return done

    def events(self, *, final: bool = False) -> Iterator[Event]:
        """What happened since, in order.

        :param final: the guest stands: hold nothing back
        """
        if self.engine.is_open:
            self._reaper.visit()
            yield from self.reader.read(self.engine.clock, final=final)

    def close(self) -> None:
        """Take everything out of the guest."""
        self.doorbell.close()
        self.engine.close()
