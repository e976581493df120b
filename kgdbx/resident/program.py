"""One probe at one place in the guest, and what the guest counts of it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kgdbx.resident.compile.codegen import Body
from kgdbx.resident.compile.decision import Decision, UserCode
from kgdbx.resident.place.displace import Displacement
from kgdbx.resident.ring import Stream
from kgdbx.resident.table import Table

__all__ = ("CodeUnit", "Counts", "Program", "Site", "user_code")


@dataclass(frozen=True, eq=False)
class CodeUnit:
    """A piece of code in the guest that was written at once."""

    address: int
    size_bytes: int

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.size_bytes


@dataclass(eq=False)
class Program:
    """One probe at one place, before and after it is placed.

    :ivar kind: ``p``, ``r`` for a return probe, ``bell`` for a hit that the host looks at, or
        ``verdict`` for one that decides what becomes of the call
    :ivar displacement: what lies at the place
    :ivar body: what to record; None for a bell and a verdict
    :ivar decision: of a verdict
    :ivar maxactive: return slots
    :ivar id: its number in the records
    :ivar at_entry: whether the place is a function's first instruction
    :ivar point: the address that was asked for, before what *displacement* takes
    :ivar units: the code that it needs
    :ivar data: what its code reads: guest-virtual ``(address, size_bytes)``
    :ivar user_data: that of the user's C
    """

    kind: str
    displacement: Displacement
    body: Body | None = None
    decision: Decision | None = None
    maxactive: int = 0
    id: int = 0
    address: int = 0
    counters: int = 0
    slots: int = 0
    slot_bytes: int = 0
    handler: int = -1
    stream: Stream | None = None
    table: Table | None = None
    at_entry: bool = True
    point: int = 0
    units: list[CodeUnit] = field(default_factory=list)
    data: list[tuple[int, int]] = field(default_factory=list)
    user_data: int = 0

    @property
    def keeps_all(self) -> bool:
        """Whether the stub keeps all registers and the flags: away from a function's entry they
        are in use, and a definition may ask for them.
        """
        return self.body is None or self.body.uses_regs or not self.at_entry


@dataclass(frozen=True)
class Counts:
    """What the guest counted of a probe, all CPUs together.

    :ivar hits: as the stop tier counts them
    :ivar nmissed: no free return slot, or a hit inside of a handler
    :ivar nfaults: conditions that could not be evaluated
    :ivar decided: calls that did not go on as they would have by themselves
    """

    hits: int
    nmissed: int
    nfaults: int
    decided: int


@dataclass
class Site:
    """A place with its probes, in the order in which they are called.

    :ivar jump: what is written there
    :ivar unit: where its stub is
    """

    displacement: Displacement
    programs: list[Program] = field(default_factory=list)
    jump: bytes = b""
    unit: CodeUnit | None = None


def user_code(programs: Iterable[Program]) -> Iterator[tuple[Program, UserCode]]:
    """The programs that run C of the user's, and that C."""
    for program in programs:
        if program.decision is not None and program.decision.user is not None:
            yield program, program.decision.user
