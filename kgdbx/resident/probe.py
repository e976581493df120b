"""A probe definition that runs inside the guest."""

import errno
from collections.abc import Callable, Mapping

from kgdbx.errors import ProbeError
from kgdbx.probes.defined import place_text
from kgdbx.probes.definition import ProbeDefinition, format_definition
from kgdbx.probes.kretprobe import default_maxactive
from kgdbx.probes.probe import Point, Probe, State
from kgdbx.probes.site import Attachment
from kgdbx.resident.compile.codegen import NotResident, generate
from kgdbx.resident.engine import Engine
from kgdbx.resident.maps import Maps
from kgdbx.resident.place.displacement import CannotDisplace
from kgdbx.resident.program import Program
from kgdbx.resident.reader import EventReader, Recorded
from kgdbx.symbols.kernel import Kernel

__all__ = ("ResidentProbe",)

_FAULTS = 2


class ResidentProbe(Probe):
    """A kprobe or kretprobe whose hits are filtered and recorded by code in the guest.

    :param definition: ``p`` or ``r``, of one function
    :param engine: puts the code there
    :param reader: is told what the records mean
    :param maps: are told of its map, if it has one
    :param inlined_copies: probe those of the function too
    :param stopping: makes the same probe on the stop tier: for places, of several, whose code
        cannot give way to a jump, or where a field cannot be had by code in the guest
    """

    tier = "resident"

    def __init__(
        self,
        definition: ProbeDefinition,
        engine: Engine,
        reader: EventReader,
        maps: Maps | None = None,
        *,
        inlined_copies: bool = True,
        stopping: Callable[[], Probe] | None = None,
    ) -> None:
        self._programs: list[Program] = []
        self._counted = [0, 0, 0]
        self._make_stopping = stopping
        self._stopping: Probe | None = None
        self._attached: tuple[Attachment, ...] = ()
        self._engine = engine
        self._reader = reader
        self._maps = maps
        self._definition = definition
        self.kind = definition.kind
        self.inlined_copies = inlined_copies and definition.kind == "p"
        name = f"{definition.event_group}/{definition.event_name}"
        super().__init__(place_text(definition), name=name)
        self.text = format_definition(definition)
        self.maxactive = definition.maxactive

    def attachments(self) -> tuple[Attachment, ...]:
        """None, unless some of its places stop the kernel."""
        return self._attached

    def prepare(self, kernel: Kernel) -> None:
        """Compile it for every place.

        Where a place cannot be, the kernel stops there; if that is all of them, whoever
        registers it may want another probe, but no one is there to ask when a module is loaded.

        :raises NotResident: if the definition asks for what code in the guest cannot do
        :raises CannotDisplace: if the code at a place cannot give way to a jump
        """
        if self.kind == "r":
            self._check_return_points()
            if self.maxactive <= 0:
                self.maxactive = default_maxactive(kernel)
        programs: list[Program] = []
        refused: dict[Point, CannotDisplace | NotResident] = {}
        for point in self.points:
            try:
                programs.append(self._program(kernel, point))
            except (CannotDisplace, NotResident) as e:
                refused[point] = e
        asked = self.state in (State.NEW, State.UNREGISTERED)
        if refused and (self._make_stopping is None or (asked and not programs)):
            raise next(iter(refused.values()))
        self._programs = programs
        self._stop_at(kernel, refused)

    def _program(self, kernel: Kernel, point: Point) -> Program:
        return Program(
            self.kind,
            self._engine.displacement(point.function, point.address),
            generate(self._definition, kernel, point),
            maxactive=self.maxactive if self.kind == "r" else 0,
            at_entry=point.is_entry,
            point=point.address,
        )

    def _stop_at(self, kernel: Kernel, refused: Mapping[Point, Exception]) -> None:
        # The other tier's probe does the work at these places, and this one has the name.
        if self._stopping is not None:
            self._counted[_FAULTS] += self._stopping.nfaults
        self._stopping, self._attached, self.tier_reason = None, (), ""
        if not refused or self._make_stopping is None:
            return
        self._stopping = self._make_stopping()
        self._stopping.manager = self.manager
        self._stopping.points = tuple(refused)
        self._stopping.prepare(kernel)
        self._attached = self._stopping.attachments()
        for attachment in self._attached:
            attachment.probe = self
        why = "; ".join(f"{_shown(point)}: {error}" for point, error in refused.items())
        self.tier_reason = f"stops at {len(refused)} of {len(self.points)} places: {why}"

    def install(self) -> None:
        """Put it into the guest, and say what its records mean.

        :raises ProbeError: if it adds to a map that is another one
        """
        for program in self._programs:
            if program.body is not None and program.body.map is not None and self._maps:
                self._maps.add(program.body.map, program.body.fields)
        self._engine.install(self._programs)
        for program in self._programs:
            assert program.body is not None
            if program.body.map is not None:
                continue
            where = self._engine.kernel.symbolize(program.point)
            recorded = Recorded(self.name, self.kind, program.point, where, program.body)
            self._reader.add(program.id, recorded)

    def uninstall(self) -> None:
        """Take it out of the guest; what it counted stays."""
        if self._stopping is not None:
            self._stopping.uninstall()
        programs, self._programs = self._programs, []
        counted = [self._engine.counts(p) for p in programs if p.id in self._engine.programs]
        self._engine.uninstall(programs)
        for counts in counted:
            self._counted[0] += counts.hits
            self._counted[1] += counts.nmissed
            self._counted[2] += counts.nfaults

    @property
    def programs(self) -> tuple[Program, ...]:
        """Its code in the guest, a program for each place."""
        return tuple(self._programs)

    @property
    def hits(self) -> int:
        """Hits so far, those that the condition dropped included."""
        return self._total(0)

    @hits.setter
    def hits(self, value: int) -> None:
        self._counted[0] += value - self._total(0)

    @property
    def nmissed(self) -> int:
        """Calls without a free instance, and hits inside a handler."""
        return self._total(1)

    @nmissed.setter
    def nmissed(self, value: int) -> None:
        self._counted[1] += value - self._total(1)

    @property
    def nfaults(self) -> int:
        """Hits whose condition could not be evaluated."""
        return self._total(2)

    @nfaults.setter
    def nfaults(self, value: int) -> None:
        self._counted[2] += value - self._total(2)

    def _total(self, index: int) -> int:
        total = self._counted[index]
        for program in self._programs:
            if program.id in self._engine.programs:
                counts = self._engine.counts(program)
                total += (counts.hits, counts.nmissed, counts.nfaults)[index]
        if self._stopping is not None and index == _FAULTS:
            total += self._stopping.nfaults
        return total

    def _check_return_points(self) -> None:
        for point in self.points:
            if not point.is_entry:
                raise ProbeError(
                    f"a return probe goes to the entry of a function, not to {_shown(point)}",
                    errno.EINVAL,
                )


def _shown(point: Point) -> str:
    return f"{point.function.qualified_name}+{point.offset_bytes:#x}"
