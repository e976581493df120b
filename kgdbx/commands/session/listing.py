"""list, enable, disable, delete: the registered probes."""

import argparse
from collections.abc import Callable

from kgdbx.commands.context import Context
from kgdbx.commands.registry import argument
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.probes.probe import Probe
from kgdbx.render import table

PROBE_COLUMNS = ("num", "kind", "state", "hits", "missed", "faults", "ns/hit", "name", "what")
"""Headings of :func:`probe_rows`."""

_PROBES = argument("probes", nargs="*", help="names or numbers; all if none", completes="probe")


def probe_rows(probes: list[Probe]) -> list[tuple[object, ...]]:
    """A row a probe: number, kind, state, hits, missed, faults, handler time a hit, name, text."""
    return [
        (
            p.number,
            p.kind,
            p.state.value,
            p.hits,
            p.nmissed,
            p.nfaults,
            round(p.handler_s * 1e9 / p.hits) if p.hits else 0,
            p.name,
            p.text if len(p.points) < 2 else f"{p.text} ({len(p.points)} places)",
        )
        for p in probes
    ]


@SESSION_COMMANDS.command(
    name="list",
    aliases=("info",),
    summary="List probes with their hits, misses and handler faults.",
    description="States are those of /sys/kernel/debug/kprobes/list; ns/hit is the handlers' time.",
    arguments=(argument("--faults", action="store_true", help="show what handlers raised"),),
    needs_session=True,
)
def list_(context: Context, args: argparse.Namespace) -> None:
    probes = list(context.session.probes)
    if not probes:
        context.write("No probes.")
        return
    context.write(table(PROBE_COLUMNS, probe_rows(probes), context.style))
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
