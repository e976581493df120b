"""Commands of the command line: ``kgdbx NAME``, without gdb."""

from kgdbx.commands.registry import CommandNamespace

PROGRAM_COMMANDS = CommandNamespace()
