"""trace: every call of some functions, or of many, as text, JSON, or a stream for programs."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import drgn

from kgdbx.commands.buffer import BUFFER_ARGUMENT, tell_buffer, use_buffer
from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.probe import (
    END_ARGUMENTS,
    TARGET_ARGUMENTS,
    open_session,
    run_session,
)
from kgdbx.commands.registry import argument
from kgdbx.commands.session.listing import probe_table
from kgdbx.definitions import Refused, Tier
from kgdbx.errors import CommandError, ProbeError, SymbolError
from kgdbx.probes.definition import ProbeDefinition
from kgdbx.probes.probe import Probe
from kgdbx.render import pick_style
from kgdbx.session import Session
from kgdbx.symbols.kernel import Kernel
from kgdbx.trace.chrome import ChromeSink
from kgdbx.trace.endpoint import Endpoint, FifoEndpoint, SocketEndpoint
from kgdbx.trace.errors import TraceError
from kgdbx.trace.fifo import Fifo
from kgdbx.trace.functions import definitions, is_pattern, refusals
from kgdbx.trace.json_lines import JsonLinesSink
from kgdbx.trace.map_sink import MapSink
from kgdbx.trace.recording import Recording
from kgdbx.trace.recording_writer import RecordingWriter
from kgdbx.trace.sink import RecordSink, Sink
from kgdbx.trace.streams import Outputs
from kgdbx.trace.text import TextSink

# A second of a million events of the smallest size, dealt out over four CPUs.
_BUFFER_BYTES = 16 << 20
_MANY_PROBES = 20
_MOST_ROWS = 100


@PROGRAM_COMMANDS.command(
    name="trace",
    summary="Trace calls of functions until ^C, a count, a duration, or a command's end.",
    description="""\
FUNC is a function, a pattern such as 'vfs_*', or MODULE:FUNC; MODULE: stands for all of a module.
The calls are recorded inside the kernel, which runs on. With -r an event is a call that returned,
with its result and duration.

  kgdbx trace --vm a vfs_read --fields 'file->f_inode->i_ino count' --filter '$comm == "dd"'
  kgdbx trace --vm a -r 'ext4_*' -d 5 -o chrome -w trace.json
  kgdbx trace --vm a 'tcp_*' -d 60 --raw trace.kgdbx
  kgdbx trace --read trace.kgdbx -o json

With --agg nothing is recorded: the calls are summed up inside the kernel, as bpftrace does it, and
the sums are printed at the end. count(), sum(X), min(X), max(X), avg(X), hist(X) and
lhist(X, MIN, MAX, STEP) are known; several maps need several names.

  kgdbx trace --vm a vfs_read --agg '@[$comm] = hist(count)' --interval 1
  kgdbx trace --vm a -r 'vfs_*' --agg '@ns[$func] = avg($duration_ns)'

Events go to the standard output; what was not traced and why, the table of probes and the number
of events that were lost to the standard error output.
""",
    arguments=(
        *TARGET_ARGUMENTS,
        argument("functions", nargs="*", metavar="FUNC", help="see above", completes="function"),
        argument(
            "-f",
            "--fields",
            action="append",
            default=[],
            metavar="FIELDS",
            help="what to record, as in a probe definition; more than once if need be",
        ),
        argument(
            "--filter", default="", metavar="EXPR", help="record only calls that this is true of"
        ),
        argument(
            "--agg",
            action="append",
            default=[],
            metavar="MAP",
            help="sum up in place of recording, see above; more than once if need be",
        ),
        argument("--interval", type=float, metavar="S", help="print the sums every S seconds, too"),
        argument("-r", "--return", dest="returns", action="store_true", help="results, durations"),
        *END_ARGUMENTS,
        BUFFER_ARGUMENT,
        argument("-o", "--output", choices=("text", "json", "chrome"), help="default: text"),
        argument("-w", "--write", metavar="FILE", help="where to, instead of the standard output"),
        argument("--raw", metavar="FILE", help="keep the records, for --read"),
        argument("--fifo", metavar="PATH", help="a FIFO that a program can read records from"),
        argument("--socket", metavar="PATH", help="a Unix socket, for any number of readers"),
        argument("--wait", action="store_true", help="begin when somebody reads those"),
        argument("--read", metavar="FILE", help="show what --raw has kept; no kernel is needed"),
        argument(
            "--tier",
            choices=("auto", "resident", "stop"),
            help="inside the kernel, by stopping it at each call, or the first that can be (auto);"
            " default: auto, but resident with a pattern",
        ),
        argument("--color", choices=("auto", "always", "never"), default="auto"),
    ),
)
def trace(out: TextIO, args: argparse.Namespace) -> int:
    if args.read:
        return _show_recording(out, args)
    if not args.functions:
        raise CommandError("give a function or a pattern, or a recording with --read")
    if args.wait and not (args.fifo or args.socket):
        raise CommandError("--wait needs --fifo or --socket")
    if args.agg:
        return _sum_up(out, args)
    if args.interval is not None:
        raise CommandError("--interval is for --agg")
    # The outputs are closed when the kernel runs again: a reader may take its time.
    with contextlib.ExitStack() as ends, open_session(args) as session:
        use_buffer(session, args, _BUFFER_BYTES)
        probes = _place(session, args)
        outputs = _open_outputs(session, out, args, ends)
        session.event_listeners.append(outputs.event)
        session.idle_hooks.append(outputs.idle)
        session.resident.reader.batch_listeners.append(outputs.batch)
        status = run_session(session, args)
        outputs.tell_lost()
        _summarize(args, probes, outputs.lost)
        tell_buffer(session, args, outputs.lost)
        faults = sum(p.nfaults for p in probes)
    return 1 if faults or status else 0


def _sum_up(out: TextIO, args: argparse.Namespace) -> int:
    refused = ("fields", "count", "buffer", "write", "raw", "fifo", "socket")
    if given := [name for name in refused if getattr(args, name) not in (None, [])]:
        raise CommandError(f"--{given[0]} is for events, and --agg has none")
    if args.output == "chrome":
        raise CommandError("--agg is printed as text or json")
    with open_session(args) as session:
        probes = _place(session, args)
        maps = session.resident.maps
        sink = MapSink(out, maps.read, interval_s=args.interval, is_json=args.output == "json")
        session.idle_hooks.append(sink.idle)
        status = run_session(session, args)
        sink.write()
        _summarize(args, probes, sink.lost)
        faults = sum(p.nfaults for p in probes)
    return 1 if faults or status else 0


def _place(session: Session, args: argparse.Namespace) -> list[Probe]:
    fields = " ".join(args.fields)
    wanted: list[ProbeDefinition] = []
    for number, each in enumerate(args.agg or [fields or ("$retval" if args.returns else "")]):
        found = definitions(
            args.functions,
            session.function_names,
            fields=each,
            condition=args.filter,
            returns=args.returns,
        )
        # A probe for each map: no name twice.
        wanted += (
            dataclasses.replace(d, name=f"{d.name}_{number}") if number else d for d in found
        )
    if args.returns and not fields and not args.agg:
        wanted = [_without_result(session.kernel, each) for each in wanted]
    patterns = any(map(is_pattern, args.functions))
    tier: Tier = args.tier or ("resident" if patterns else "auto")
    try:
        probes = session.define_many(wanted, tier=tier, inlined_copies=False)
    except Refused as e:
        lines = list(refusals(e.errors))
        if not e.placed:
            raise ProbeError("\n".join(lines)) from e
        for line in lines:
            print(f"kgdbx: {line}" if line[0] != " " else line, file=sys.stderr)
        probes = e.placed
    return probes


def _without_result(kernel: Kernel, definition: ProbeDefinition) -> ProbeDefinition:
    # A function that returns nothing shows its duration only.
    assert definition.function is not None
    try:
        module = kernel.modules.find(definition.module) if definition.module else None
        found = kernel.functions(definition.function, module)
        type_ = kernel.function_type(found[0])
    except SymbolError:
        return definition  # why, is said when it is placed
    if type_ is None or type_.type.kind is not drgn.TypeKind.VOID:
        return definition
    return dataclasses.replace(definition, fields=())


def _open_outputs(
    session: Session, out: TextIO, args: argparse.Namespace, ends: contextlib.ExitStack
) -> Outputs:
    engine, reader = session.resident.engine, session.resident.reader
    records: list[RecordSink] = []
    fifos: list[Fifo] = []
    endpoints: list[Endpoint] = []
    if args.fifo:
        endpoints.append(FifoEndpoint(Path(args.fifo)))
    if args.socket:
        endpoints.append(SocketEndpoint(Path(args.socket)))
    for endpoint in endpoints:
        fifo = Fifo(endpoint, engine.clock)
        ends.callback(_close_fifo, fifo)
        fifos.append(fifo)
    records += fifos
    if args.raw:
        writer = RecordingWriter(Path(args.raw), engine.clock)
        ends.callback(writer.close)
        records.append(writer)
    sinks: list[Sink] = []
    if args.output or args.write or not records:
        sinks.append(_event_sink(out, args, ends, cpus=len(session.target.cpus())))
    reader.makes_events = bool(sinks) or args.count is not None
    outputs = Outputs(sinks, records, engine.lost, args.count)
    outputs.describe(reader.layouts())
    # Functions of a module that is loaded later, or again.
    reader.layout_listeners.append(lambda layout: outputs.describe([layout]))
    for fifo in fifos:
        print(f"kgdbx: records are at {fifo.path}", file=sys.stderr)
    if args.wait:
        for fifo in fifos:
            fifo.wait_for_reader()
    return outputs


def _event_sink(
    out: TextIO, args: argparse.Namespace, ends: contextlib.ExitStack, cpus: int
) -> Sink:
    style = pick_style(out, args.color)
    is_file = args.write is not None
    if is_file:
        out = ends.enter_context(_new_file(Path(args.write)))
        style = pick_style(None, "never")
    sink: Sink
    if args.output == "json":
        sink = JsonLinesSink(out)
    elif args.output == "chrome":
        sink = ChromeSink(out)
    else:
        # The header, and the thread groups, are for the programs that import it.
        sink = TextSink(out, style, header=is_file, cpus=cpus, tgid=is_file)
    ends.callback(sink.close)
    return sink


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as e:
        raise TraceError(f"{path}: {e.strerror}") from e
    with file:
        yield file


def _close_fifo(fifo: Fifo) -> None:
    fifo.close()
    lost = sum(delivery.lost for delivery in fifo.deliveries())
    for count, what in ((fifo.unread, "while nobody read"), (lost, "that readers did not take")):
        if count:
            print(f"kgdbx: {fifo.path}: {count:,} events {what}", file=sys.stderr)


def _summarize(args: argparse.Namespace, probes: list[Probe], lost: int) -> None:
    shown = probes
    if len(probes) > _MANY_PROBES:
        shown = sorted((p for p in probes if p.hits), key=lambda p: -p.hits)[:_MOST_ROWS]
    if shown:
        print(probe_table(shown, pick_style(sys.stderr, args.color)), file=sys.stderr)
    hits = sum(p.hits for p in probes)
    missed = sum(p.nmissed for p in probes)
    functions = {probe.where for probe in probes}
    text = f"kgdbx: {len(functions)} functions, {hits:,} hits, {lost:,} events lost"
    print(text + (f", {missed:,} calls missed" if missed else ""), file=sys.stderr)


def _show_recording(out: TextIO, args: argparse.Namespace) -> int:
    if args.functions or args.vm or args.connect:
        raise CommandError("--read takes no function and no kernel")
    with contextlib.ExitStack() as ends:
        recording = ends.enter_context(Recording(Path(args.read)))
        recording.convert(_event_sink(out, args, ends, cpus=1))
    return 0
