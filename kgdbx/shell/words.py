"""What the first words of a line mean: gdb's commands, kgdbx's in it, and the shell's own."""

import re

from kgdbx.commands import session as session_commands
from kgdbx.commands.registry import Command
from kgdbx.commands.session import SESSION_COMMANDS

__all__ = (
    "changes_kernel",
    "find_session_command",
    "kgdbx_command",
    "session_arguments",
    "short_names",
)

# gdb has commands of these names, which stay gdb's.
_GDBS = frozenset(("attach", "delete", "detach", "disable", "enable", "info", "list", "watch"))
# These read only, and do so while the kernel runs.
_READERS = frozenset(("doctor", "info", "leaks report", "list"))

SESSION_COMMANDS.discover(session_commands)


def short_names() -> dict[str, Command]:
    """kgdbx's commands in gdb that need no ``kgdbx`` before them at the shell's prompt."""
    return {
        name: command
        for command in SESSION_COMMANDS
        for name in (command.name, *command.aliases)
        if name not in _GDBS
    }


def find_session_command(line: str) -> Command | None:
    """The command of kgdbx in gdb that a line begins with."""
    command, _ = _split(line)
    return command


def session_arguments(line: str) -> str:
    """What stands behind the command of kgdbx in gdb that a line begins with."""
    return _split(line)[1]


def _split(line: str) -> tuple[Command | None, str]:
    words = re.split(r"\s+", kgdbx_command(line), maxsplit=3)
    known = {name: c for c in SESSION_COMMANDS for name in (c.name, *c.aliases)}
    for count in (2, 1):  # "leaks watch" is a command, and so is "leaks"
        name = " ".join(words[1 : 1 + count])
        if words[0] == "kgdbx" and len(words) > count and name in known:
            return known[name], " ".join(words[1 + count :])
    return None, ""


def kgdbx_command(line: str) -> str:
    """The line as gdb wants it: ``kprobe`` and ``kx kprobe`` become ``kgdbx kprobe``."""
    word, _, rest = line.strip().partition(" ")
    if word == "kx":
        return f"kgdbx {rest}"
    return f"kgdbx {line.strip()}" if word in short_names() else line.strip()


def changes_kernel(line: str) -> bool:
    """Whether a running kernel has to be stopped for a line."""
    command = find_session_command(line)
    return command is not None and command.name not in _READERS
