"""Commands of the shell itself; everything else goes to gdb and to kgdbx in it."""

from kgdbx.commands.registry import CommandNamespace

SHELL_COMMANDS = CommandNamespace()
