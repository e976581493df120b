"""list, enable, disable, delete: the registered probes."""

import argparse
from collections.abc import Callable

from kgdbx.commands.context import Context
from kgdbx.commands.registry import argument
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.probes.probe import Probe
from kgdbx.render import table
from kgdbx.resident.verdict import VerdictProbe
from kgdbx.trace.text import Style

PROBE_COLUMNS = (
    "num",
    "kind",
    "tier",
    "state",
    "hits",
    "missed",
    "faults",
    "ns/hit",
    "name",
    "what",
    "notes",
)
"""Headings of :func:`probe_rows`."""

_ASKED_FOR = "asked for"

_PROBES = argument("probes", nargs="*", help="names or numbers; all if none", completes="probe")


def probe_rows(probes: list[Probe]) -> list[tuple[object, ...]]:
    """A row a probe; the notes say why one is not resident, unless that was asked for."""
    return [
        (
            p.number,
            p.kind,
            p.tier,
            p.state.value,
            p.hits,
            p.nmissed,
            p.nfaults,
            round(p.handler_s * 1e9 / p.hits) if p.hits else 0,
            p.name,
            p.text if len(p.points) < 2 else f"{p.text} ({len(p.points)} places)",
            _note(p),
        )
        for p in probes
    ]


def _note(probe: Probe) -> str:
    if isinstance(probe, VerdictProbe):
        return probe.note
    return probe.tier_reason.partition("\n")[0] if probe.tier_reason != _ASKED_FOR else ""


def probe_table(probes: list[Probe], style: Style) -> str:
    """A table of probes, without notes if there are none."""
    rows = probe_rows(probes)
    shown = len(PROBE_COLUMNS) - (not any(row[-1] for row in rows))
    return table(PROBE_COLUMNS[:shown], [row[:shown] for row in rows], style)


@SESSION_COMMANDS.command(
    name="list",
    aliases=("info",),
    summary="List probes with their hits, misses and handler faults.",
    description="States are those of /sys/kernel/debug/kprobes/list; "
    "ns/hit is the handlers' time.\n"
    "A resident probe runs inside the kernel; one of the tier 'stop' stops it at each hit.",
    arguments=(argument("--faults", action="store_true", help="show what handlers raised"),),
    needs_session=True,
)
def list_(context: Context, args: argparse.Namespace) -> None:
    probes = list(context.session.probes)
    if not probes:
        context.write("No probes.")
        return
    context.write(probe_table(probes, context.style))
    if args.faults:
        for probe in probes:
            for fault in probe.faults:
                context.write(f"{probe.name}: {fault.handler}\n{fault.trace}")


def _each(context: Context, args: argparse.Namespace, action: Callable[[Probe], None]) -> None:
    manager = context.session.probes
    probes = [manager.find(name) for name in args.probes] or list(manager)
    for probe in probes:
        action(probe)


@SESSION_COMMANDS.command(
    name="enable",
    summary="Enable probes.",
    arguments=(_PROBES,),
    needs_session=True,
)
def enable(context: Context, args: argparse.Namespace) -> None:
    _each(context, args, lambda probe: probe.enable())


@SESSION_COMMANDS.command(
    name="disable",
    summary="Take probes out of the kernel, and keep their counters.",
    arguments=(_PROBES,),
    needs_session=True,
)
def disable(context: Context, args: argparse.Namespace) -> None:
    _each(context, args, lambda probe: probe.disable())


@SESSION_COMMANDS.command(
    name="delete",
    summary="Delete probes; all of them if none is named.",
    arguments=(_PROBES,),
    needs_session=True,
)
def delete(context: Context, args: argparse.Namespace) -> None:
    _each(context, args, lambda probe: probe.unregister())
