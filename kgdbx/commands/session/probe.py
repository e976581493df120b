"""probe, kprobe, jprobe, kretprobe, watch: register what a definition says."""

import argparse

from kgdbx.commands.context import Context
from kgdbx.commands.registry import Argument, argument
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.probes.probe import Probe, State

_GRAMMAR = """\
Fields are separated by blanks: parameters by name (file->f_inode->i_ino, filename:string),
$retval $comm $pid $cpu $arg1 $stack0, registers (%di), or kprobe_events' own forms
(+0(%si):string). A condition is a C expression: if count > 100 && $comm == "dd"."""

_OPTIONS = (
    argument("--hardware", action="store_true", help="use a debug register"),
    argument("--stop", action="store_true", help="leave the kernel standing after each event"),
)


def _definition(help_text: str, completes: str = "function") -> Argument:
    return argument("definition", help=help_text, completes=completes, rest=True)


def _register(context: Context, args: argparse.Namespace, text: str) -> None:
    probes = context.session.define(text, hardware=args.hardware, stop=args.stop)
    for probe in probes:
        context.write(describe(probe))


def describe(probe: Probe) -> str:
    """One line about a probe that was just placed."""
    where = ", ".join(
        f"{p.function.qualified_name}+{p.offset_bytes:#x} at {p.address:#x}"
        for p in probe.points[:4]
    )
    more = f" and {len(probe.points) - 4} more places" if len(probe.points) > 4 else ""
    notes = "".join(f"; {note}" for note in probe.notes)
    if probe.state is State.PENDING:
        return f"Probe {probe.number} ({probe.name}) pending{notes}"
    if probe.state is State.UNREGISTERED:
        return f"Probe {probe.number} ({probe.name}) deleted"
    return f"Probe {probe.number} ({probe.name}): {where or probe.text}{more}{notes}"


@SESSION_COMMANDS.command(
    name="probe",
    summary="Register a probe definition, as in kprobe_events or perf probe.",
    description="p[:NAME] [MODULE:]FUNC[+OFFS|:LINE] [FIELDS] [if EXPR]    at an instruction\n"
    "r[MAXACTIVE][:NAME] [MODULE:]FUNC [FIELDS] [if EXPR]      when a function returns\n"
    "w[:NAME] DATA [r|w|rw] [FIELDS] [if EXPR]                 when data is accessed\n"
    "-:NAME                                                    delete\n\n" + _GRAMMAR,
    arguments=(*_OPTIONS, _definition("p|r|w[:NAME] PLACE [FIELDS] [if EXPR]")),
    needs_session=True,
)
def probe(context: Context, args: argparse.Namespace) -> None:
    _register(context, args, args.definition)


@SESSION_COMMANDS.command(
    name="kprobe",
    aliases=("kp",),
    summary="Show fields each time an instruction is reached.",
    description=_GRAMMAR,
    arguments=(*_OPTIONS, _definition("[MODULE:]FUNC[+OFFS|:LINE] [FIELDS] [if EXPR]")),
    needs_session=True,
)
def kprobe(context: Context, args: argparse.Namespace) -> None:
    _register(context, args, f"p {args.definition}")


@SESSION_COMMANDS.command(
    name="jprobe",
    aliases=("jp",),
    summary="Show all arguments each time a function is called.",
    description="The arguments are named and typed by the debug information.",
    arguments=(*_OPTIONS, _definition("[MODULE:]FUNC [FIELDS] [if EXPR]")),
    needs_session=True,
)
def jprobe(context: Context, args: argparse.Namespace) -> None:
    place, _, rest = args.definition.partition(" ")
    _register(context, args, f"p {place} $params {rest}".rstrip())


@SESSION_COMMANDS.command(
    name="kretprobe",
    aliases=("krp",),
    summary="Show the result each time a function returns.",
    description="Without fields, $retval is shown. Parameters mean their values at the call.\n"
    + _GRAMMAR,
    arguments=(
        *_OPTIONS,
        argument("--maxactive", type=int, default=0, help="calls in progress at once"),
        _definition("[MODULE:]FUNC [FIELDS] [if EXPR]"),
    ),
    needs_session=True,
)
def kretprobe(context: Context, args: argparse.Namespace) -> None:
    place, _, rest = args.definition.partition(" ")
    fields = rest.strip()
    if not fields or fields.startswith("if "):
        fields = f"$retval {fields}".rstrip()
    _register(context, args, f"r{args.maxactive or ''} {place} {fields}")


@SESSION_COMMANDS.command(
    name="watch",
    summary="Show each access to kernel data, with a debug register.",
    description="DATA is a variable or an expression such as init_task.comm; 1, 2, 4 or 8 bytes.",
    arguments=(*_OPTIONS, _definition("DATA[:SIZE] [r|w|rw] [FIELDS] [if EXPR]", "variable")),
    needs_session=True,
)
def watch(context: Context, args: argparse.Namespace) -> None:
    _register(context, args, f"w {args.definition}")
