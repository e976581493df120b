"""probe: definitions and probe scripts against a VM or a stub, without gdb."""

import argparse
import signal
import sys
from pathlib import Path
from typing import TextIO

from kgdbx.attach import connect
from kgdbx.commands.buffer import BUFFER_ARGUMENT, tell_buffer, use_buffer
from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.registry import argument
from kgdbx.commands.session.listing import probe_table
from kgdbx.commands.session.probe import describe
from kgdbx.definitions import Refused
from kgdbx.endings import raise_interrupt
from kgdbx.errors import CommandError
from kgdbx.machine.vm import find_vm
from kgdbx.probes.probe import HandlerFault, Probe
from kgdbx.render import pick_style
from kgdbx.session import Session
from kgdbx.target.serial_line import is_tty
from kgdbx.trace.json_lines import JsonLinesSink, json_line
from kgdbx.trace.map_text import map_json, map_text
from kgdbx.trace.sink import Sink
from kgdbx.trace.streams import Outputs
from kgdbx.trace.text import TextSink

__all__ = (
    "END_ARGUMENTS",
    "LINE_ARGUMENTS",
    "TARGET_ARGUMENTS",
    "is_over_kgdb",
    "open_session",
    "run_session",
    "where_of",
)

LINE_ARGUMENTS = (
    argument(
        "--connect",
        metavar="ADDRESS",
        help="a stub: path of a Unix socket, or host:port; KGDB: /dev/ttyS0[,115200]",
    ),
    argument(
        "--kgdb",
        action="store_true",
        help="KGDB over a serial line, that of the VM or the one behind the socket",
    ),
    argument(
        "--sysrq",
        metavar="LINE",
        help="console of KGDB's kernel, to stop it there: /dev/ttyS1[,115200] or telnet:host:port",
    ),
)
"""Options that say by which line, if not a VM's own."""

TARGET_ARGUMENTS = (
    argument("--vm", metavar="NAME", help="a VM of 'kgdbx vm list'", completes="vm"),
    *LINE_ARGUMENTS,
    argument("--vmlinux", metavar="FILE", help="the kernel's debug symbols, with --connect"),
)
"""Options that say which kernel."""

END_ARGUMENTS = (
    argument("-n", "--count", type=int, metavar="N", help="end after N events"),
    argument("-d", "--duration", type=float, metavar="S", help="end after S seconds"),
    argument("-e", "--exec", metavar="COMMAND", help="run in the guest; end when it ends"),
)
"""Options that say when it ends, besides ``^C``."""


def open_session(args: argparse.Namespace, *, leave_standing: bool = False) -> Session:
    """Attach to the kernel that the options name.

    :param leave_standing: of a VM of ours; see :func:`~kgdbx.attach.attach_vm`
    :raises CommandError: unless they name one, or ``--exec`` is given without a VM
    """
    if getattr(args, "exec", None) and not args.vm:
        raise CommandError("--exec needs a VM of ours: --vm NAME")
    if bool(args.vm) == bool(args.connect):
        raise CommandError("name a kernel: --vm NAME, or --connect ADDRESS --vmlinux FILE")
    where = where_of(args.vm or args.connect, kgdb=args.kgdb)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, raise_interrupt)
    session = connect(where, args.vmlinux, sysrq=args.sysrq, leave_standing=leave_standing)
    if session.recovery is not None:
        print(f"kgdbx: {session.recovery.text}", file=sys.stderr)
    return session


def is_over_kgdb(args: argparse.Namespace) -> bool:
    """Whether the options name a kernel behind KGDB."""
    where = args.connect or ""
    return bool(args.kgdb) or where.startswith("kgdb:") or (bool(where) and is_tty(where))


def where_of(where: str, *, kgdb: bool) -> str:
    """What :func:`~kgdbx.attach.connect` takes for a VM or a line.

    :param kgdb: over KGDB
    """
    return f"kgdb:{where.removeprefix('kgdb:')}" if kgdb else where


def run_session(session: Session, args: argparse.Namespace) -> int:
    """Let the kernel run as long as the options say.

    :return: exit status of the guest command; 0 if there is none, or the run ended before it;
        1 if the kernel panicked
    """
    if not args.exec:
        session.run(timeout_s=args.duration, count=args.count)
        return _panicked(session)
    command = find_vm(args.vm).start(args.exec)
    try:
        session.run(timeout_s=args.duration, count=args.count, command=command)
        status = command.poll()
        sys.stderr.write(command.output.decode(errors="replace"))
        if status:
            print(f"kgdbx: the guest command ended with status {status}", file=sys.stderr)
        return status or _panicked(session)
    finally:
        command.discard()


def _panicked(session: Session) -> int:
    if session.kernel.panicked:
        print("kgdbx: the kernel has panicked; these were its last events", file=sys.stderr)
    return int(session.kernel.panicked)


@PROGRAM_COMMANDS.command(
    name="probe",
    summary="Probe a kernel until ^C, a count, a duration, or a guest command's end.",
    description="""\
A definition is one argument:
  p[:NAME] [MODULE:]FUNC[+OFFS|:LINE] [FIELDS] [if EXPR]   at an instruction
  r[MAXACTIVE][:NAME] [MODULE:]FUNC [FIELDS] [if EXPR]     when a function returns
  w[:NAME] DATA [r|w|rw] [FIELDS] [if EXPR]                when data is accessed
Events go to the standard output, the table of probes to the standard error output.

  kgdbx probe --vm a 'p do_sys_openat2 filename:string' 'r do_sys_openat2 $retval if $retval < 0'
""",
    arguments=(
        *TARGET_ARGUMENTS,
        argument("definitions", nargs="*", metavar="DEFINITION", help="see above"),
        argument(
            "-s", "--script", action="append", default=[], metavar="FILE", help="a probe script"
        ),
        *END_ARGUMENTS,
        BUFFER_ARGUMENT,
        argument(
            "--tier",
            choices=("auto", "resident", "stop"),
            default="auto",
            help="inside the kernel, by stopping it at each hit, or the first that can be (auto)",
        ),
        argument("--hardware", action="store_true", help="use debug registers"),
        argument("--json", action="store_true", help="one JSON object a line"),
        argument("--color", choices=("auto", "always", "never"), default="auto"),
    ),
)
def probe(out: TextIO, args: argparse.Namespace) -> int:
    if not args.definitions and not args.script:
        raise CommandError("give a probe definition, or a script with -s")
    with open_session(args) as session:
        use_buffer(session, args)
        outputs = _show(session, out, args)
        for text in args.definitions:
            _say(args, _define(session, text, args))
        for path in args.script:
            _say(args, session.load_script(Path(path)))
        status = run_session(session, args)
        outputs.tell_lost()
        for each in session.resident.maps.read():
            out.write((map_json(each) if args.json else map_text(each)) + "\n")
        probes = list(session.probes)
        _summarize(out, args, probes)
        tell_buffer(session, args, outputs.lost)
        faults = sum(p.nfaults for p in probes)
    return 1 if faults or status else 0


def _define(session: Session, text: str, args: argparse.Namespace) -> list[Probe]:
    try:
        return session.define(text, hardware=args.hardware, tier=args.tier)
    except Refused as e:
        if not e.placed:
            raise
        print(f"kgdbx: {e}", file=sys.stderr)
        return e.placed


def _show(session: Session, out: TextIO, args: argparse.Namespace) -> Outputs:
    sink: Sink
    if args.json:
        sink = JsonLinesSink(out)
    else:
        sink = TextSink(out, pick_style(out, args.color), header=False)
    outputs = Outputs([sink], [], session.resident.engine.lost)

    def show_fault(probe: Probe, fault: HandlerFault) -> None:
        if probe.nfaults == 1:
            print(f"kgdbx: {probe.name}: {fault.handler} raised:\n{fault.trace}", file=sys.stderr)

    session.event_listeners.append(outputs.event)
    session.idle_hooks.append(outputs.idle)
    session.probes.fault_listeners.append(show_fault)
    return outputs


def _say(args: argparse.Namespace, probes: list[Probe]) -> None:
    if not args.json:
        for probe in probes:
            print(describe(probe), file=sys.stderr)


def _summarize(out: TextIO, args: argparse.Namespace, probes: list[Probe]) -> None:
    if not args.json:
        print(probe_table(probes, pick_style(sys.stderr, args.color)), file=sys.stderr)
        return
    for p in probes:
        record = {
            "probe": p.name,
            "definition": p.text,
            "tier": p.tier,
            "state": p.state.value,
            "hits": p.hits,
            "nmissed": p.nmissed,
            "faults": p.nfaults,
        }
        print(json_line({"summary": record}), file=out)
