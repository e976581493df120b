"""nullify: have a function return at once, until ^C, a number of calls, or a duration."""

import argparse
import sys
from collections.abc import Callable
from typing import TextIO

from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.probe import TARGET_ARGUMENTS, open_session, run_session
from kgdbx.commands.registry import argument
from kgdbx.commands.session.listing import probe_table
from kgdbx.commands.session.nullify import (
    CALL_ARGUMENTS,
    NULLIFY_ARGUMENTS,
    NULLIFY_HELP,
    register_nullify,
)
from kgdbx.commands.session.probe import describe
from kgdbx.errors import CommandError
from kgdbx.render import pick_style
from kgdbx.resident.verdict import VerdictProbe
from kgdbx.session import Session

__all__ = ("RUN_ARGUMENTS", "hold")

RUN_ARGUMENTS = (
    *TARGET_ARGUMENTS,
    argument("-n", dest="calls", type=int, metavar="N", help="end when N calls were dealt with"),
    argument("-d", "--duration", type=float, metavar="S", help="end after S seconds"),
    argument("-e", "--exec", metavar="COMMAND", help="run in the guest; end when it ends"),
    *CALL_ARGUMENTS,
)
"""Options of nullify and replace: which kernel, which calls, and when it ends besides ``^C``."""


class _Enough(Exception):
    """As many calls were dealt with as were asked for."""


def hold(
    args: argparse.Namespace, register: Callable[[Session, argparse.Namespace], VerdictProbe]
) -> int:
    """Attach, register, run as long as the options say, and undo it.

    :return: exit status
    """
    args.count = None
    with open_session(args) as session:
        if args.calls is not None and not session.resident.engine.host.live:
            raise CommandError("-n needs a VM of ours: what the guest counts is seen in its RAM")
        probe = register(session, args)
        print(describe(probe), file=sys.stderr)

        def count() -> None:
            if probe.decided >= args.calls:
                raise _Enough

        if args.calls is not None:
            session.idle_hooks.append(count)
        status = 0
        try:
            status = run_session(session, args)
        except _Enough:
            session.target.interrupt()
        print(probe_table([probe], pick_style(sys.stderr, "auto")), file=sys.stderr)
        faults = probe.nfaults
    return 1 if faults or status else 0


@PROGRAM_COMMANDS.command(
    name="nullify",
    summary="Have a function return at once, until ^C; undone at the end.",
    description=f"""{NULLIFY_HELP}

  kgdbx nullify --vm a do_sys_openat2 -ENOENT --if 'filename ~ "/etc/*"'
""",
    arguments=(*RUN_ARGUMENTS, *NULLIFY_ARGUMENTS),
)
def nullify(out: TextIO, args: argparse.Namespace) -> int:
    return hold(args, register_nullify)
