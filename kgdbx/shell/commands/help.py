"""help: the shell's own commands, and gdb's help for all others."""

import argparse
from typing import TYPE_CHECKING

from kgdbx.commands.registry import argument
from kgdbx.errors import CommandError
from kgdbx.render import table
from kgdbx.shell.commands import SHELL_COMMANDS
from kgdbx.shell.words import find_session_command, short_names

if TYPE_CHECKING:
    from kgdbx.shell.shell import Shell

_MORE = """
Everything else is gdb's, with kgdbx in it: 'help kgdbx', 'help breakpoints'.
>>> EXPRESSION evaluates Python with drgn: >>> find_task(1).comm; >>> alone stays in that mode.
Several lines: '@kprobe("vfs_read")' and a Python function; 'replace FUNC {' and C;
'python', 'define', 'commands' of gdb.
Keys: TAB or typing completes, ^R searches the history, ^C stops the kernel, ^D leaves,
F2 top, F3 hist, F4 stop, F5 tasks, F6 modules, F7 slabs, Alt-1..9 sessions."""


@SHELL_COMMANDS.command(
    name="help",
    summary="List the commands, or tell about one.",
    arguments=(argument("topic", nargs="*", help="a command", completes="command"),),
)
async def help_(shell: "Shell", args: argparse.Namespace) -> int:
    topic = " ".join(args.topic)
    if not topic:
        own = [(f"  {c.name}", c.summary) for c in SHELL_COMMANDS]
        short = [(f"  {name}", c.summary) for name, c in short_names().items() if name == c.name]
        shell.say(table(("The shell", ""), own, shell.style))
        shell.say(table(("Probes", ""), short, shell.style) + _MORE)
        return 0
    command = find_session_command(topic)
    prefix = "kgdbx " if command is not None else ""
    if command is None:
        try:
            command = SHELL_COMMANDS.find(topic)
        except CommandError:
            return bool((await shell.session.execute(f"help {topic}")).error)
    shell.say(command.parser(prefix).format_help())
    return 0
