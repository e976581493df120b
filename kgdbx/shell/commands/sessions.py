"""open, close, reopen, session, sessions: which kernels, and which of them."""

import argparse
from typing import TYPE_CHECKING

from kgdbx.commands.registry import argument
from kgdbx.render import table
from kgdbx.shell.commands import SHELL_COMMANDS

if TYPE_CHECKING:
    from kgdbx.shell.shell import Shell

_WHICH = argument("which", nargs="?", help="number or name", completes="session")


@SHELL_COMMANDS.command(
    name="open",
    summary="Open a session on a VM, a stub's socket, or host:port; over KGDB behind 'kgdb:'.",
    arguments=(
        argument("where", nargs="?", default="", help="left out: gdb alone", completes="vm"),
        argument("vmlinux", nargs="?", help="the kernel's debug symbols", completes="file"),
        argument("--name", default="", help="what the prompt calls it"),
        argument(
            "--sysrq", metavar="LINE", help="console of KGDB's kernel: tty or telnet:host:port"
        ),
    ),
)
async def open_(shell: "Shell", args: argparse.Namespace) -> None:
    await shell.open(args.where, args.vmlinux, args.name, sysrq=args.sysrq)


@SHELL_COMMANDS.command(
    name="close",
    summary="Close a session: its probes are removed, and its kernel runs on.",
    arguments=(_WHICH,),
)
async def close(shell: "Shell", args: argparse.Namespace) -> None:
    number, session = shell.find(args.which or shell.session.name)
    await shell.close_session(number)
    shell.say(f"closed {session.name}")


@SHELL_COMMANDS.command(
    name="reopen",
    summary="Start a session again whose gdb or VM has ended, with its probes.",
    arguments=(
        argument("where", nargs="?", default="", help="another VM or stub", completes="vm"),
    ),
)
async def reopen(shell: "Shell", args: argparse.Namespace) -> int:
    failed = await shell.reopen(shell.session, args.where)
    for line in failed:
        shell.say(f"not placed again: {line}", fault=True)
    return bool(failed)


@SHELL_COMMANDS.command(
    name="session",
    summary="Switch to a session, or list them.",
    arguments=(_WHICH,),
    aliases=("sessions",),
)
def session(shell: "Shell", args: argparse.Namespace) -> None:
    if args.which:
        _, shell.current = shell.find(args.which)
        shell.on_change()
        return
    rows = [
        (
            "*" if each is shell.current else "",
            number,
            each.name,
            each.state,
            each.status.get("where", ""),
            len(each.probes),
            sum(probe["hits"] for probe in each.probes),
            each.where,
        )
        for number, each in shell.sessions.items()
    ]
    columns = ("", "num", "name", "state", "at", "probes", "hits", "kernel")
    shell.say(table(columns, rows, shell.style))
