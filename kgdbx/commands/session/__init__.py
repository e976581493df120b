"""Commands of an attached kernel, for gdb and the shell."""

from kgdbx.commands.registry import CommandNamespace

SESSION_COMMANDS = CommandNamespace()
