"""Probes that decide what becomes of a call, whatever the verdict is."""

import abc
import errno
import re
from dataclasses import dataclass

from kgdbx.errors import DefinitionError, ProbeError
from kgdbx.probes.definition import ProbeDefinition, parse_definition
from kgdbx.probes.probe import Point
from kgdbx.resident.compile.codegen import generate
from kgdbx.resident.compile.decision import Decision
from kgdbx.resident.engine import Engine
from kgdbx.resident.probe import ResidentProbe
from kgdbx.resident.program import Program
from kgdbx.resident.reader import EventReader
from kgdbx.symbols.kernel import Function, Kernel

__all__ = ("Calls", "Verdict", "VerdictProbe")

_FUNCTION = re.compile(r"([\w-]+:)?[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Calls:
    """Which calls are decided on.

    :ivar function: ``[module:]function``
    :ivar condition: an ``if`` expression; None for all calls
    :ivar module: only calls whose return address is in this module
    :ivar name: of the probe; a default if it is None
    """

    function: str
    condition: str | None = None
    module: str | None = None
    name: str | None = None


class Verdict(abc.ABC):
    """What becomes of a call.

    :ivar group: of the probes, in listings
    :ivar kind: the same in one letter
    :ivar done: what was done with a call
    :ivar action: what is done, in the words of listings
    """

    group: str
    kind: str
    done: str
    action: str

    @abc.abstractmethod
    def decision(self, kernel: Kernel, function: Function) -> Decision:
        """What is done with a call of a function; condition and callers are added to it.

        :raises ProbeError: if it cannot be done to this function
        """


class VerdictProbe(ResidentProbe):
    """A probe at a function's entry that decides whether and how the call goes on.

    :param calls: which calls it decides on
    """

    def __init__(self, calls: Calls, verdict: Verdict, engine: Engine, reader: EventReader) -> None:
        self._decided = 0
        self._module = calls.module
        self._verdict = verdict
        super().__init__(_definition(verdict.group, calls), engine, reader, inlined_copies=False)
        self.kind = verdict.kind
        words = [f"{verdict.group} {calls.function} {verdict.action}".rstrip()]
        words += [f"if {calls.condition}"] if calls.condition else []
        words += [f"from {calls.module}"] if calls.module else []
        self.text = " ".join(words)

    @property
    def decided(self) -> int:
        """Calls so far that did not go on as they would have by themselves."""
        programs = (p for p in self._programs if p.id in self._engine.programs)
        return self._decided + sum(self._engine.counts(p).decided for p in programs)

    @property
    def note(self) -> str:
        """The same, for listings."""
        return f"{self.decided} of its calls {self._verdict.done}"

    def prepare(self, kernel: Kernel) -> None:
        """Compile it for every place.

        :raises NotResident: if the condition asks for what code in the guest cannot do
        :raises CannotDisplace: if the function cannot give way to a jump
        :raises ProbeError: if the place is not a function's entry, or the module is not loaded
        """
        self._programs = [self._program(kernel, point) for point in self.points]

    def install(self) -> None:
        """Put it into the guest."""
        self._engine.install(self._programs)

    def uninstall(self) -> None:
        """Take it out of the guest; what it counted stays. Calls under way end as they began."""
        decided = self.decided
        super().uninstall()
        self._decided = decided

    def _program(self, kernel: Kernel, point: Point) -> Program:
        function = point.function
        if not point.is_entry:
            raise ProbeError(
                f"{self._verdict.group} goes to the entry of a function, not to "
                f"{function.qualified_name}+{point.offset_bytes:#x}",
                errno.EINVAL,
            )
        displacement = self._engine.displacement(function, point.address)
        body = generate(self._definition, kernel, point)
        found = self._verdict.decision(kernel, function)
        decision = Decision(
            found.action,
            body.condition,
            found.calls_kernel or body.calls_kernel,
            self._callers(kernel),
            found.user,
        )
        return Program("verdict", displacement, decision=decision)

    def _callers(self, kernel: Kernel) -> tuple[tuple[int, int], ...]:
        if self._module is None:
            return ()
        loaded = kernel.modules.find(self._module)
        if loaded is None:
            raise ProbeError(f"module {self._module!r} is not loaded", errno.ENOENT)
        return tuple((start, size) for start, size, _ in loaded.regions)


def _definition(group: str, calls: Calls) -> ProbeDefinition:
    function = calls.function
    if not _FUNCTION.fullmatch(function):
        raise DefinitionError(f"{function!r} is not the name of a function", function, 0)
    name = calls.name or re.sub(r"\W", "_", function)
    test = f" if {calls.condition}" if calls.condition else ""
    return parse_definition(f"p:{group}/{name} {function}{test}")
