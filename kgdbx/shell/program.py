"""shell: the place to spend the day."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TextIO

from kgdbx.commands.program import PROGRAM_COMMANDS
from kgdbx.commands.program.probe import LINE_ARGUMENTS, where_of
from kgdbx.commands.registry import argument
from kgdbx.errors import CommandError, KgdbxError


@PROGRAM_COMMANDS.command(
    name="shell",
    summary="One prompt for kernels, gdb, probes and drgn, with events as they come.",
    description="""\
With -c, or if the standard input is no terminal, it runs commands until one fails; a kernel that
runs after the last one does so until it stops. The exit status is 1 if a command failed.

  kgdbx shell --vm a -c 'kprobe vfs_read count $comm' -c continue -c 'wait 3' -c 'kgdbx list'
  kgdbx shell --vm k --kgdb
""",
    arguments=(
        argument(
            "--vm",
            action="append",
            default=[],
            metavar="NAME",
            help="a VM of 'kgdbx vm list'; several times for several sessions",
            completes="vm",
        ),
        *LINE_ARGUMENTS,
        argument("vmlinux", nargs="?", help="the kernel's debug symbols, with --connect"),
        argument(
            "-c", "--command", action="append", metavar="COMMAND", help="run it; several times"
        ),
        argument("--log", type=Path, metavar="FILE", help="write a transcript that can be run"),
        argument("--vi", action="store_true", help="vi's keys (default: Emacs')"),
        argument("--color", choices=("auto", "always", "never"), default="auto"),
    ),
)
def shell(out: TextIO, args: argparse.Namespace) -> int:
    if args.connect and not args.vmlinux:
        raise CommandError("--connect needs the vmlinux with debug symbols of that kernel")
    return asyncio.run(_main(out, args))


async def _main(out: TextIO, args: argparse.Namespace) -> int:
    # Imported here: other commands of the program need none of it.
    from kgdbx.render import pick_style
    from kgdbx.shell.batch import run_lines
    from kgdbx.shell.printer import Printer
    from kgdbx.shell.shell import Shell
    from kgdbx.shell.transcript import Transcript

    interactive = args.command is None and sys.stdin.isatty() and sys.stdout.isatty()
    transcript = Transcript(args.log) if args.log else None
    printer = Printer(_screen_rows if interactive else None)
    shell = Shell(printer, transcript=transcript, style=pick_style(out, args.color))
    try:
        await _open_all(shell, args)
    except BaseException:
        await shell.close()
        out.write(printer.frame())
        raise
    if not interactive:
        lines = args.command if args.command is not None else sys.stdin
        text = "\n".join(each.rstrip("\n") for each in lines)
        return await run_lines(shell, text.split("\n"), out)
    from kgdbx.shell.repl import run_repl

    return await run_repl(shell, vi=args.vi)


async def _open_all(shell: "object", args: argparse.Namespace) -> None:
    from kgdbx.shell.shell import Shell

    assert isinstance(shell, Shell)
    for name in args.vm:
        await shell.open(where_of(name, kgdb=args.kgdb))
    if args.connect:
        where = where_of(args.connect, kgdb=args.kgdb)
        await shell.open(where, args.vmlinux, sysrq=args.sysrq)
    if not shell.sessions:
        try:
            await shell.open("", args.vmlinux)
        except KgdbxError as e:
            raise CommandError(f"{e}; 'kgdbx doctor' says what is missing") from e
    shell.current = next(iter(shell.sessions.values()))


def _screen_rows() -> int:
    import shutil

    return shutil.get_terminal_size().lines
