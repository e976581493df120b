"""KGDB's line for a gdb: ``target remote | python -m kgdbx.machine.kgdb_line LINE``.

gdb's ``^C`` is a byte on the line, to which KGDB does not listen while the kernel runs. In its
place SysRq-g goes to the console.
"""

import argparse
import contextlib
import functools
import os
import select
import signal
import sys
import time

from kgdbx.errors import KgdbxError, TargetLost
from kgdbx.machine.info import read_info
from kgdbx.machine.sysrq import sysrq_g
from kgdbx.target.break_in import BreakIn, sysrq_over_console
from kgdbx.target.serial_line import SerialLine

__all__ = ("carry",)

_INTERRUPT = b"\x03"
_DETACH = b"+$D#44"
_CONNECT_S = 5.0
# One more would stop the kernel once more, so a break-in is waited for: long on a busy host, and a
# little also behind a stop, which may be that of a breakpoint that has overtaken it.
_UNANSWERED_S, _ANSWERED_S = 10.0, 2.0
_LATE_S = 2.0
_NO_WAY_IN = (
    "kgdbx: KGDB does not listen while the kernel runs; stop it there: echo g > "
    "/proc/sysrq-trigger, or attach with --sysrq LINE\n"
)


def carry(line: SerialLine, break_in: BreakIn | None) -> None:
    """Carry bytes between standard input and output and a line until gdb ends.

    :param break_in: stops a kernel that runs; None if there is no way
    :raises TargetLost: if the line is gone
    """
    asked_at, wait_s = -_LATE_S, 0.0
    with contextlib.ExitStack() as way:
        while True:
            ready = select.select([0, line.fileno()], [], [])[0]
            if line.fileno() in ready:
                os.write(1, line.read(0))
                way.close()
                wait_s = _ANSWERED_S
            if 0 in ready:
                data = os.read(0, 4096)
                if not data:
                    break
                if _INTERRUPT in data:
                    data = data.replace(_INTERRUPT, b"")
                    if break_in is None:
                        sys.stderr.write(_NO_WAY_IN)
                    elif time.monotonic() - asked_at > wait_s:
                        way.close()
                        way.enter_context(break_in())
                        asked_at, wait_s = time.monotonic(), _UNANSWERED_S
                line.write(data)
    if time.monotonic() - asked_at < _LATE_S and line.drain(_LATE_S, _LATE_S):
        # A breakpoint was faster than our break-in, which now stops a kernel nobody waits for.
        line.write(_DETACH)
        line.drain(_LATE_S, _LATE_S)
        line.write(b"+")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="kgdbx.machine.kgdb_line")
    parser.add_argument("line")
    parser.add_argument("--vm")
    parser.add_argument("--sysrq")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGHUP):  # meant for gdb
        signal.signal(number, signal.SIG_IGN)
    try:
        break_in: BreakIn | None = None
        if args.vm is not None:
            break_in = functools.partial(sysrq_g, read_info(args.vm))
        elif args.sysrq is not None:
            break_in = sysrq_over_console(args.sysrq)
        line = SerialLine(args.line, _CONNECT_S)
        try:
            carry(line, break_in)
        finally:
            line.close()
    except TargetLost:
        return 0  # gdb sees the end of it
    except KgdbxError as e:
        sys.stderr.write(f"kgdbx: {e}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
