"""audit: run a command under watch, look through the heap, and give one verdict."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.leaks import remember_gone
from kgdbx.commands.program.leaks_watch import say, to_audit
from kgdbx.commands.program.probe import TARGET_ARGUMENTS, open_session
from kgdbx.commands.registry import argument
from kgdbx.commands.session.leaks_watch import WATCH_ARGUMENTS, begin_watch
from kgdbx.errors import CommandError
from kgdbx.leaks.dangling import find_dangling, old_pointers, ranges_in_use
from kgdbx.leaks.describe import describe_block
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.layout import read_layout
from kgdbx.leaks.native import load_native
from kgdbx.leaks.report.finding import AuditReport, CacheGrowth, Finding, tell_lost
from kgdbx.leaks.report.junit import junit_text
from kgdbx.leaks.report.kmemleak import kmemleak_text
from kgdbx.leaks.report.page import audit_page
from kgdbx.leaks.report.sarif import audit_sarif
from kgdbx.leaks.report.summary import audit_json, audit_text
from kgdbx.leaks.scan import scan_heap
from kgdbx.leaks.snapshot import Growth, Snapshot, growth_since, take_snapshot
from kgdbx.leaks.watch import LeakWatch
from kgdbx.machine.vm import find_vm
from kgdbx.session import Session
from kgdbx.views.leaks import all_registers

_FORMS: dict[str, tuple[str, Callable[[AuditReport], str]]] = {
    "junit": ("JUnit's XML", junit_text),
    "sarif": ("SARIF 2.1.0", lambda report: _dump(audit_sarif(report))),
    "kmemleak": ("leaks in kmemleak's words", kmemleak_text),
    "html": ("a page with a flame graph", audit_page),
}


@PROGRAM_COMMANDS.command(
    name="audit",
    summary="Run a command under watch, look through the heap, and give one verdict.",
    description="""\
Watches what modules allocate and free while a command or a script runs in the guest; then looks
for memory that nothing points to any more, and for pointers into modules that were unloaded.

  kgdbx audit --vm a --modules mymod --command 'insmod /mymod.ko; test_it; rmmod mymod'
  kgdbx audit --vm a --modules cfg80211,mac80211 --junit audit.xml --html audit.html test.sh

Exit status: 0 passed, 1 a finding that counts or a command that failed. What is only a hint, such
as a free by other code on the module's behalf, does not count; nor what a module that is still
loaded has not freed yet, unless nothing points to it any more.
""",
    arguments=(
        *TARGET_ARGUMENTS,
        argument("script", nargs="?", metavar="SCRIPT", help="a shell script to run in the guest"),
        argument("--modules", action="append", default=[], required=True, metavar="MODULE,..."),
        argument("--command", metavar="COMMAND", help="a command to run in the guest"),
        argument("-d", "--duration", type=float, metavar="S", help="give up after S seconds"),
        *WATCH_ARGUMENTS,
        argument("--no-scan", action="store_true", help="only watch"),
        argument("--json", action="store_true", help="one JSON object instead of text"),
        *(
            argument(f"--{name}", metavar="FILE", help=f"write {what}")
            for name, (what, _) in _FORMS.items()
        ),
    ),
)
def audit(out: TextIO, args: argparse.Namespace) -> int:
    command = _command(args)
    modules = [name for text in args.modules for name in text.split(",") if name]
    args.exec = command
    with open_session(args) as session:
        watch = begin_watch(session, args, modules, say)
        before = None if args.no_scan else _before(session)
        status = _run(session, args, command)
        watch.stop()
        remember_gone(session, args, watch)
        if not watch.sessions:
            raise CommandError(f"{', '.join(modules)}: not loaded while the command ran")
        report = _all_sessions(session, watch, command, status)
        if before is not None:
            report = _look_through(session, watch, before, report)
    for name, (_, form) in _FORMS.items():
        if path := getattr(args, name):
            _write(Path(path), form(report))
    out.write(_dump(audit_json(report)) if args.json else audit_text(report))
    return 0 if report.passed else 1


def _command(args: argparse.Namespace) -> str:
    if bool(args.command) == bool(args.script):
        raise CommandError("give a command with --command, or a script")
    if args.command:
        return str(args.command)
    try:
        return Path(args.script).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CommandError(f"cannot read {args.script}: {e}") from e


def _run(session: Session, args: argparse.Namespace, command: str) -> int | None:
    started = find_vm(args.vm).start(command)
    try:
        session.run(timeout_s=args.duration, command=started)
        sys.stderr.write(started.output.decode(errors="replace"))
        return started.poll()
    finally:
        started.discard()


def _all_sessions(
    session: Session, watch: LeakWatch, command: str, status: int | None
) -> AuditReport:
    # A command may load and unload the modules several times.
    reports = [
        to_audit(session, watch, n, command=command, status=status)
        for n in range(1, watch.sessions + 1)
    ]
    still = ", ".join(watch.report().loaded)
    notes = [note for r in reports for note in r.notes]
    notes += [f"still loaded: {still}; what is not freed yet may be freed later"] if still else []
    return dataclasses.replace(
        reports[-1],
        modules=tuple(dict.fromkeys(name for r in reports for name in r.modules)),
        allocations=sum(r.allocations for r in reports),
        findings=tuple(finding for r in reports for finding in r.findings),
        notes=tuple(dict.fromkeys(notes)),
    )


@dataclasses.dataclass(frozen=True)
class _Before:
    # What there was before the command: blocks, and pointers to modules that were gone then.
    heap: Snapshot
    pointers: frozenset[tuple[int, int]]


def _before(session: Session) -> _Before | None:
    if session.ram is None:
        print("kgdbx: the heap is not looked at: that needs a VM of ours", file=sys.stderr)
        return None
    read_layout(session.kernel.program)
    load_native()
    heap = read_heap(session.kernel, session.ram)
    return _Before(take_snapshot(heap), old_pointers(heap, all_registers(session)))


def _look_through(
    session: Session, watch: LeakWatch, before: _Before, report: AuditReport
) -> AuditReport:
    assert session.ram is not None
    registers = all_registers(session)
    scan = scan_heap(session.kernel, session.ram, registers, session.resident.engine.taken)
    known = {address for finding in report.findings for address in finding.addresses}
    lost = {block.address for block in scan.leaks}
    findings = [part for finding in report.findings for part in tell_lost(finding, lost)]
    for block in scan.leaks:
        if not before.heap.holds(block) and block.address not in known:
            about = describe_block(scan.heap, block).text
            text = f"{block.size_bytes:,} bytes of {block.cache} that nothing points to"
            # Anything in the kernel may have lost it meanwhile.
            findings.append(
                Finding(
                    "unreferenced",
                    "",
                    f"{text}: {about}" if about else text,
                    (block.address,),
                    (block.size_bytes,),
                    failing=False,
                )
            )
    notes = [*report.notes, *scan.errors]
    for module, ranges in watch.gone.items():
        found, truncated = find_dangling(scan.heap, registers, ranges)
        findings += (
            Finding(
                "dangling",
                module,
                f"{each.place} points to {each.offset:#x} in the module, which is gone",
                (each.address,),
                (8,),
            )
            for each in found
            if (each.address, each.value) not in before.pointers
        )
        notes += [f"there are more pointers into {module}"] if truncated else []
        if ranges_in_use(scan.heap, ranges):
            notes.append(f"pointers into {module} cannot be told: something else is there now")
    return dataclasses.replace(
        report,
        findings=tuple(findings),
        notes=tuple(dict.fromkeys(notes)),
        checks=("watch", "scan", "dangling"),
        caches=tuple(_growth(growth_since(before.heap, scan.heap))),
    )


def _growth(grown: tuple[Growth, ...]) -> Iterator[CacheGrowth]:
    for each in grown:
        then = each.objects - each.more_objects
        size = each.more_bytes // each.more_objects if each.more_objects else 0
        yield CacheGrowth(each.cache, then, each.objects, size)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as e:
        raise CommandError(f"cannot write {path}: {e.strerror}") from e


def _dump(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"
