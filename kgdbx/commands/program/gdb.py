"""gdb: start gdb on a VM with kgdbx in it."""

import argparse
import os
from typing import TextIO

from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.probe import where_of
from kgdbx.commands.registry import argument
from kgdbx.gdb_launch import gdb_argv
from kgdbx.machine.vm import find_vm


@PROGRAM_COMMANDS.command(
    name="gdb",
    summary="Start gdb, attached to a VM, with kgdbx's commands in it.",
    arguments=(
        argument("--vm", required=True, metavar="NAME", help="a VM of 'kgdbx vm list'"),
        argument("--kgdb", action="store_true", help="over its KGDB's serial line"),
        argument("arguments", nargs=argparse.REMAINDER, help="more arguments for gdb"),
    ),
)
def gdb(out: TextIO, args: argparse.Namespace) -> None:
    info = find_vm(args.vm).info
    more = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    attach = f"kgdbx attach {where_of(info.name, kgdb=args.kgdb)}"
    argv = [*gdb_argv(load=True), "-ex", attach, *more, str(info.vmlinux)]
    out.flush()
    os.execvp(argv[0], argv)
