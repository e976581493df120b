"""replace: have another function, or C code, run in place of a function."""

import argparse
from typing import TextIO

from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.nullify import RUN_ARGUMENTS, hold
from kgdbx.commands.session.nullify import REPLACE_ARGUMENTS, REPLACE_HELP, register_replace


@PROGRAM_COMMANDS.command(
    name="replace",
    summary="Have other code run in place of a function, until ^C.",
    description=f"""{REPLACE_HELP}
What was replaced is undone at the end.

  kgdbx replace --vm a vfs_read handler.c --if '$comm == "dd"'
""",
    arguments=(*RUN_ARGUMENTS, *REPLACE_ARGUMENTS),
)
def replace(out: TextIO, args: argparse.Namespace) -> int:
    return hold(args, register_replace)
