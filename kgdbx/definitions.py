"""From probe definitions to registered probes: patterns, names, and the tier of each."""

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias

from kgdbx.errors import CommandError, KgdbxError, ProbeError, TargetTimeout
from kgdbx.probes.defined import probe_from_definition
from kgdbx.probes.definition import ProbeDefinition, parse_definition
from kgdbx.probes.manager import ProbeManager
from kgdbx.probes.probe import Probe
from kgdbx.resident.compile.codegen import NotResident
from kgdbx.resident.place.displacement import CannotDisplace
from kgdbx.resident.tier import ResidentTier
from kgdbx.runner import Runner

__all__ = ("Definitions", "Refused", "Tier")

Tier: TypeAlias = Literal["auto", "resident", "stop"]
"""Where the hits of a definition are handled."""

_NOT_RESIDENT = (NotResident, CannotDisplace, TargetTimeout)
_GLOB_LIMIT = 500


class Refused(KgdbxError):
    """Some of several probes could not be placed.

    :ivar placed: those that are registered
    :ivar errors: message by function name
    """

    def __init__(self, placed: list[Probe], errors: dict[str, str]) -> None:
        self.placed = placed
        self.errors = errors
        lines = "\n".join(f"  {name}: {message}" for name, message in errors.items())
        super().__init__(f"{len(placed)} probes placed, {len(errors)} refused:\n{lines}")


class Definitions:
    """Registers what definitions say.

    :param runner: takes the events of the stop tier
    :param function_names: names of all functions, or of those of a module
    """

    def __init__(
        self,
        probes: ProbeManager,
        resident: ResidentTier,
        runner: Runner,
        function_names: Callable[[str | None], Iterable[str]],
    ) -> None:
        self._probes = probes
        self._resident = resident
        self._runner = runner
        self._function_names = function_names

    def define(
        self, text: str | ProbeDefinition, *, hardware: bool, stop: bool, tier: Tier
    ) -> list[Probe]:
        """As :meth:`~kgdbx.session.Session.define`."""
        definition = parse_definition(text) if isinstance(text, str) else text
        if definition.kind == "-":
            name = definition.event_name
            if definition.group is not None:
                name = f"{definition.group}/{name}"
            probe = self._probes.find(name)
            probe.unregister()
            return [probe]
        if not definition.is_glob:
            return [self._define_one(definition, hardware, stop, tier)]
        return self.define_many(
            self._expand(definition), hardware=hardware, stop=stop, tier=tier, inlined_copies=False
        )

    def define_many(
        self,
        definitions: Iterable[ProbeDefinition],
        *,
        hardware: bool,
        stop: bool,
        tier: Tier,
        inlined_copies: bool,
    ) -> list[Probe]:
        """As :meth:`~kgdbx.session.Session.define_many`."""
        placed: list[Probe] = []
        errors: dict[str, str] = {}
        try:
            with self._resident.engine.batch():
                for each in definitions:
                    try:
                        placed.append(self._define_one(each, hardware, stop, tier, inlined_copies))
                    except KgdbxError as e:
                        errors[each.function or each.text] = str(e)
        except BaseException:
            for probe in reversed(placed):
                probe.unregister()
            raise
        if errors:
            raise Refused(placed, errors)
        return placed

    def _define_one(
        self,
        definition: ProbeDefinition,
        hardware: bool,
        stop: bool,
        tier: Tier,
        inlined_copies: bool = True,
    ) -> Probe:
        if definition.name is None:
            definition = self._named(definition)
        reason = _stops_because(definition, hardware, stop, tier)
        if not reason:
            try:
                may_stop = tier == "auto" and definition.aggregation is None
                resident = self._resident.probe(
                    definition,
                    inlined_copies=inlined_copies,
                    stopping=functools.partial(
                        probe_from_definition, definition, self._probes.kernel, self._runner.emit
                    )
                    if may_stop
                    else None,
                )
                return self._probes.register(resident)
            except _NOT_RESIDENT as e:
                if tier == "resident" or definition.aggregation is not None:
                    raise
                reason = str(e)
        elif tier == "resident" or definition.aggregation is not None:
            raise ProbeError(f"{definition.event_name} cannot run in the guest: {reason}")
        probe = probe_from_definition(
            definition, self._probes.kernel, self._runner.emit, hardware=hardware
        )
        probe.tier_reason = reason
        probe.inlined_copies &= inlined_copies
        self._probes.register(probe)
        (self._runner.stop_on.add if stop else self._runner.stop_on.discard)(probe.name)
        return probe

    def _named(self, definition: ProbeDefinition) -> ProbeDefinition:
        # perf probe's way: the second probe at a place gets _1 behind its name.
        taken = {probe.name for probe in self._probes}
        base = name = definition.event_name
        for number in itertools.count(1):
            if f"{definition.event_group}/{name}" not in taken:
                break
            name = f"{base}_{number}"
        return dataclasses.replace(definition, name=name)

    def _expand(self, definition: ProbeDefinition) -> Iterator[ProbeDefinition]:
        assert definition.function is not None
        pattern = definition.function
        names = [
            name
            for name in self._function_names(definition.module)
            if fnmatch.fnmatchcase(name, pattern) and not name.startswith("__pfx_")
        ]
        if not names:
            raise ProbeError(f"no function matches {pattern!r}")
        if len(names) > _GLOB_LIMIT:
            raise CommandError(
                f"{pattern!r} matches {len(names)} functions, more than {_GLOB_LIMIT}; "
                "narrow it down"
            )
        prefix = f"{definition.name}_" if definition.name else None
        for name in names:
            yield dataclasses.replace(
                definition,
                function=name,
                name=f"{prefix}{name.replace('.', '_')}" if prefix else None,
                text="",
            )


def _stops_because(definition: ProbeDefinition, hardware: bool, stop: bool, tier: Tier) -> str:
    # What was asked for that code in the guest cannot do, whatever the definition.
    if tier == "stop":
        return "asked for"
    if definition.kind not in "pr":
        return "a data watch"
    if hardware:
        return "a debug register is asked for"
    return "the kernel is to stand after each event" if stop else ""
