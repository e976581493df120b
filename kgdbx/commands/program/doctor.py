"""doctor: what is there, what is missing, and what to do about it."""

import argparse
import dataclasses
from typing import TextIO

from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.probe import TARGET_ARGUMENTS, open_session
from kgdbx.commands.registry import argument
from kgdbx.doctor import host_checks, session_checks
from kgdbx.render import checks_table, pick_style
from kgdbx.trace.json_lines import json_line


@PROGRAM_COMMANDS.command(
    name="doctor",
    summary="Check the host, and a kernel if one is named; exit 1 if something is missing.",
    arguments=(
        *TARGET_ARGUMENTS,
        argument("--json", action="store_true", help="one JSON object a line"),
    ),
)
def doctor(out: TextIO, args: argparse.Namespace) -> int:
    checks = list(host_checks())
    if args.vm or args.connect:
        with open_session(args) as session:
            checks += session_checks(session)
    if args.json:
        for check in checks:
            print(json_line(dataclasses.asdict(check)), file=out)
    else:
        print(checks_table(checks, pick_style(out)), file=out)
    return 0 if all(check.ok for check in checks) else 1
