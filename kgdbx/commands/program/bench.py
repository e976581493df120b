"""bench: measure, one line a figure."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TextIO

from kgdbx.bench import (
    bpftrace,
    kgdb,
    kmemleak,
    leaks,
    leaks_watch,
    mixed,
    resident_tier,
    shell,
    stop_tier,
    stress,
)
from kgdbx.bench.figure import Figure
from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.registry import argument
from kgdbx.trace.json_lines import json_line

_TIMED: dict[str, Callable[[float], Iterator[Figure]]] = {
    "mixed": mixed.measure,
    "stress": stress.measure,
}
_BENCHES: dict[str, tuple[Callable[[int], Iterator[Figure]], ...]] = {
    "bpftrace": (bpftrace.measure,),
    "leaks": (leaks.measure, leaks_watch.measure_watch),
    "kgdb": (kgdb.measure,),
    "kmemleak": (kmemleak.measure,),
    "probes": (stop_tier.measure, resident_tier.measure, bpftrace.measure),
    "resident": (resident_tier.measure, bpftrace.measure),
    "shell": (shell.measure,),
    "stop": (stop_tier.measure,),
}


@PROGRAM_COMMANDS.command(
    name="bench",
    summary="Measure on a VM of our own, and print the medians.",
    description="Ratios (unit x) are of runs that followed one another on the same VM.",
    arguments=(
        argument(
            "names",
            nargs="+",
            choices=(*_BENCHES, *_TIMED),
            metavar="NAME",
            help="probes (both tiers), stop or resident; bpftrace (of resident); leaks; kmemleak "
            "(beside ours); kgdb; shell: its prompt while events stream; stress: exact under load; "
            "mixed: a scan after mixed work",
        ),
        argument("--rounds", type=int, default=5, metavar="N", help="runs (default 5)"),
        argument("--minutes", type=float, default=2, help="of stress and mixed (default 2)"),
        argument("--json", action="store_true", help="one JSON object a line"),
    ),
)
def bench(out: TextIO, args: argparse.Namespace) -> None:
    for name in args.names:
        for each in itertools.chain.from_iterable(_runs(name, args)):
            if args.json:
                print(json_line(dataclasses.asdict(each)), file=out, flush=True)
            else:
                print(
                    f"{each.name:<32} {each.value:>10.4g} {each.unit:<4} "
                    f"({each.runs} runs, {each.min:.4g} to {each.max:.4g})",
                    file=out,
                    flush=True,
                )


def _runs(name: str, args: argparse.Namespace) -> list[Iterator[Figure]]:
    if name in _TIMED:
        return [_TIMED[name](args.minutes)]
    return [run(args.rounds) for run in _BENCHES[name]]
