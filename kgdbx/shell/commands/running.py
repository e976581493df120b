"""wait, guest: time that passes, and commands in the guest."""

import argparse
import asyncio
from typing import TYPE_CHECKING

from kgdbx.commands.registry import argument
from kgdbx.errors import CommandError
from kgdbx.machine.vm import find_vm
from kgdbx.shell.commands import SHELL_COMMANDS

if TYPE_CHECKING:
    from kgdbx.shell.shell import Shell

_POLL_S = 0.02


@SHELL_COMMANDS.command(
    name="wait",
    summary="Wait until the kernel stops, or for some seconds.",
    arguments=(argument("seconds", nargs="?", type=float, help="at most"),),
)
async def wait(shell: "Shell", args: argparse.Namespace) -> None:
    session = shell.session
    try:
        await session.wait_stopped(args.seconds)
        if args.seconds is None:
            await session.refresh()
    except TimeoutError:
        await session.refresh()


@SHELL_COMMANDS.command(
    name="guest",
    summary="Run a shell command in the VM; waits for its end if the kernel runs.",
    description="In a kernel that stands it starts when the kernel goes on.",
    arguments=(argument("command", help="the command", rest=True),),
)
async def guest(shell: "Shell", args: argparse.Namespace) -> int:
    session = shell.session
    if session.info is None:
        raise CommandError("commands in the guest need a VM of ours: open NAME")
    command = find_vm(session.info.name).start(args.command)
    if session.state != "running":
        shell.say("starts when the kernel goes on")
        return 0
    try:
        while command.poll() is None:
            if session.state != "running":
                shell.say("the kernel stands; the command goes on with it")
                return 0
            await asyncio.sleep(_POLL_S)
        shell.write(command.output.decode(errors="replace"))
        await session.refresh()
        return command.poll() or 0
    finally:
        command.discard()
