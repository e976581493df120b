"""Completion of arguments in gdb."""

import itertools
from collections.abc import Iterable

import gdb

from kgdbx.commands.context import Context
from kgdbx.commands.registry import Command
from kgdbx.errors import KgdbxError
from kgdbx.machine.vm import list_vms

__all__ = ("complete",)

_MOST = 500


def complete(command: Command, context: Context, text: str, word: str) -> list[str] | int:
    """Candidates for the last word of a command's arguments.

    :param text: everything behind the command's name
    :param word: its last word as gdb splits words
    """
    words = text.split(" ")
    if words[-1].startswith("-"):
        options = [n for a in command.arguments for n in a.names if n.startswith("--")]
        return _matching([o.removeprefix("--") for o in options], word)
    positional = [a for a in command.arguments if not a.names[0].startswith("-")]
    given = [w for w in words[:-1] if w and not w.startswith("-")]
    if not positional:
        return gdb.COMPLETE_NONE
    argument = positional[min(len(given), len(positional) - 1)]
    if argument.completes == "file":
        return gdb.COMPLETE_FILENAME
    if argument.completes == "vm":
        return _matching([vm.name for vm in list_vms()], word)
    if not context.attached:
        return gdb.COMPLETE_NONE
    session = context.session
    if argument.completes == "probe":
        return _matching([probe.name for probe in session.probes], word)
    try:
        if argument.completes == "function" and given:
            return _matching(session.parameter_names(given[0]), word)
        if argument.completes == "function":
            module, colon, _ = words[-1].rpartition(":")
            return _matching(session.function_names(module if colon else None), word)
        if argument.completes == "variable":
            return _matching(session.kernel.vmlinux.names(), word)
    except KgdbxError:
        return gdb.COMPLETE_NONE
    return gdb.COMPLETE_NONE


def _matching(names: Iterable[str], word: str) -> list[str]:
    return list(itertools.islice((name for name in names if name.startswith(word)), _MOST))
