"""leaks watch: what modules allocate and do not free, from their load to their unload."""

import argparse
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TextIO

from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.leaks import remember_gone
from kgdbx.commands.program.probe import TARGET_ARGUMENTS, open_session, run_session
from kgdbx.commands.registry import argument
from kgdbx.commands.session.leaks_watch import (
    MODULES,
    WATCH_ARGUMENTS,
    begin_watch,
    ended_sessions,
)
from kgdbx.leaks.findings import WatchReport
from kgdbx.leaks.report.finding import AuditReport, from_watch
from kgdbx.leaks.report.summary import audit_json
from kgdbx.leaks.report.text import watch_text
from kgdbx.leaks.watch import LeakWatch
from kgdbx.session import Session
from kgdbx.trace.json_lines import json_line

_LINE_BYTES = 4096

__all__ = ("say", "to_audit")


@PROGRAM_COMMANDS.command(
    name="leaks watch",
    summary="Watch what modules allocate and free, from load to unload.",
    description="""\
A block belongs to a module if any frame of the stack that allocated it is in the module. What is
left when the last of the modules has gone is a possible leak; a free by a module of what is not
known to be allocated is told as well. Modules that are not loaded yet are watched from before
their init; of others the earlier allocations are not known.

  kgdbx leaks watch mymod --vm a -e 'insmod mymod.ko; rmmod mymod' --ko mymod.ko
  kgdbx leaks watch cfg80211 mac80211 --vm a --every 60

Ends with ^C, the duration, or the command. The exit status is 1 if there is anything to look into.
""",
    arguments=(
        *TARGET_ARGUMENTS,
        MODULES,
        argument("-d", "--duration", type=float, metavar="S", help="end after S seconds"),
        argument("-e", "--exec", metavar="COMMAND", help="run in the guest; end when it ends"),
        *WATCH_ARGUMENTS,
        argument("--every", type=float, metavar="S", help="report every S seconds"),
        argument(
            "--stdin",
            action="store_true",
            help="obey lines of the standard input: 'flush' reports now, 'clear' forgets",
        ),
        argument("--json", action="store_true", help="one JSON object for each report"),
    ),
)
def leaks_watch(out: TextIO, args: argparse.Namespace) -> int:
    args.count = None
    with open_session(args) as session:
        watch = begin_watch(session, args, args.modules, say)
        told: dict[int, WatchReport] = {}

        def tell(number: int, again: bool = False) -> None:
            report = watch.report(number)
            if again or told.get(number) != report:
                told[number] = report
                _write(out, session, watch, number, args)

        session.idle_hooks.append(ended_sessions(watch, tell))
        if args.every:
            session.idle_hooks.append(_every(args.every, lambda: _tell_last(watch, tell)))
        if args.stdin:
            session.idle_hooks.append(_Orders(watch, lambda: _tell_last(watch, tell)).obey)
        status = run_session(session, args)
        watch.stop()
        remember_gone(session, args, watch)
        for number in range(1, watch.sessions + 1):
            tell(number)
        reports = [watch.report(number) for number in range(1, watch.sessions + 1)]
    if not reports:
        say(f"{', '.join(args.modules)}: not loaded meanwhile")
    return 1 if status or any(not report.clean for report in reports) else 0


def say(text: str) -> None:
    """Tell something that is not the report."""
    print(f"kgdbx: {text}", file=sys.stderr)


def to_audit(
    session: Session, watch: LeakWatch, number: int, *, command: str = "", status: int | None = 0
) -> AuditReport:
    """What a watch has found in a session, in the form of an audit."""
    report = watch.report(number)
    return AuditReport(
        report.modules,
        _release(session),
        sum(report.allocations.values()),
        tuple(from_watch(report, watch.frames)),
        command,
        status,
        report.notes,
    )


def _write(
    out: TextIO, session: Session, watch: LeakWatch, number: int, args: argparse.Namespace
) -> None:
    if args.json:
        print(json_line(audit_json(to_audit(session, watch, number))), file=out, flush=True)
    else:
        out.write(watch_text(watch.report(number), watch.frames))
        out.flush()


def _release(session: Session) -> str:
    name = session.kernel.program["init_uts_ns"].name
    return str(name.release.string_().decode("utf-8", "replace"))


def _tell_last(watch: LeakWatch, tell: Callable[[int, bool], None]) -> None:
    if watch.sessions:
        tell(watch.sessions, True)
    else:
        say("no module was loaded yet")


def _every(interval_s: float, tell: Callable[[], None]) -> Callable[[], None]:
    due = time.monotonic() + interval_s

    def hook() -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + interval_s
            tell()

    return hook


class _Orders:
    def __init__(self, watch: LeakWatch, flush: Callable[[], None]) -> None:
        self._watch = watch
        self._flush = flush
        self._text = b""
        self._open = True

    def obey(self) -> None:
        # Not by readline(): lines in Python's own buffer would not be seen by select().
        descriptor = sys.stdin.fileno()
        while self._open and select.select([descriptor], [], [], 0)[0]:
            data = os.read(descriptor, _LINE_BYTES)
            self._open = bool(data)
            *lines, self._text = (self._text + data).split(b"\n")
            for line in lines:
                self._do(line.decode(errors="replace").strip())

    def _do(self, order: str) -> None:
        if order == "flush":
            self._flush()
        elif order == "clear":
            self._watch.clear()
        elif order:
            say(f"{order!r} is neither flush nor clear")
