"""What the first words of a line mean: gdb's commands, kgdbx's in it, and the shell's own."""

from kgdbx.commands import session as session_commands
from kgdbx.commands.registry import Command
from kgdbx.commands.session import SESSION_COMMANDS

__all__ = ("changes_kernel", "find_session_command", "kgdbx_command", "short_names")

# gdb has commands of these names, which stay gdb's.
_GDBS = frozenset(("attach", "delete", "detach", "disable", "enable", "info", "list", "watch"))
# These read only, and do so while the kernel runs.
_READERS = frozenset(("doctor", "info", "list"))

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
    words = kgdbx_command(line).split(None, 2)
    if len(words) < 2 or words[0] != "kgdbx":
        return None
    return next((c for c in SESSION_COMMANDS if words[1] in (c.name, *c.aliases)), None)


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
